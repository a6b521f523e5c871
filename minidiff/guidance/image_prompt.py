"""Image prompts: a picture, its strength, and the region where it applies."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checks import number, shown, whole
from ..draw import Picture
from ..pictures import read_picture
from ..vocabulary import own_keywords
from .layout import PlacedObject, read_place

if TYPE_CHECKING:
    from ..networks.sites import Grid


@own_keywords
@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """A picture used as a prompt in addition to the text, for a model with an IP-Adapter (see with_image_prompt).

    image: a PIL image, an array [H,W,3] or a tensor [3,H,W] (uint8, or floats in [0,1]), or a file path. The vision
        model sees its central square.
    scale: strength, multiplied by `image_prompt_scale`; 1 is the value in training.
    box: where it applies, as in `boxes`: (x0, y0, x1, y1) in [0,1], several such boxes, or a mask. None is the whole
        image.
    adapter: index of the IP-Adapter that reads it. None means the only one; with several adapters, each reads one
        picture of a list, in order.
    name: name of the picture's file.
    """

    image: Picture | str | Path
    scale: float = 1.0
    box: object = None
    adapter: int | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.image, str | Path):
            object.__setattr__(self, "name", Path(self.image).name)
        object.__setattr__(self, "image", read_picture("image_prompt", self.image).convert("RGB"))
        object.__setattr__(self, "scale", number("image_prompt: scale", self.scale))
        if self.adapter is not None:
            object.__setattr__(self, "adapter", whole("image_prompt: adapter", self.adapter, 0))
        self._region()

    @property
    def picture(self) -> Image.Image:
        """The picture in RGB, in whatever form it was given."""
        assert isinstance(self.image, Image.Image)  # __post_init__
        return self.image

    def share(self, grid: Grid) -> Tensor:
        """The fraction of each cell where it applies, [h,w] in [0,1]; all 1 without a box. float64, on the CPU."""
        region = self._region()
        return torch.ones(grid, dtype=torch.float64, device="cpu") if region is None else region.coverage(grid)

    @cached_property
    def fingerprint(self) -> dict[str, object]:
        """What a recipe keeps of the picture, as png.chunk.plain would write it; hashed once for a whole batch."""
        pixels = np.asarray(self.picture)
        sha256 = hashlib.sha256(pixels.tobytes()).hexdigest()
        return {"tensor": {"shape": list(pixels.shape), "dtype": str(pixels.dtype), "sha256": sha256}}

    def plain(self) -> dict[str, object]:
        """The fields that are not at their defaults."""
        region = self._region()
        box = None if region is None else list(region.boxes) if region.mask is None else region.mask
        named = {"name": self.name, "image": self.fingerprint, "box": box, "adapter": self.adapter}
        found = {name: value for name, value in named.items() if value is not None}
        return found | ({} if self.scale == 1 else {"scale": self.scale})

    def _region(self) -> PlacedObject | None:
        return None if self.box is None else read_place("image_prompt: box", self.box)


def read_image_prompts(value: object) -> tuple[ImagePrompt, ...]:
    """Parse `image_prompt`: an ImagePrompt, a picture, a mapping of the fields, or a list of these."""
    several = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not several:
        raise ValueError("image_prompt is an empty list; expected at least one picture, or None")
    return tuple(map(_prompt, several))


def _prompt(value: Any) -> ImagePrompt:
    if isinstance(value, ImagePrompt):
        return value
    if not isinstance(value, Mapping):
        return ImagePrompt(value)
    names = [field.name for field in fields(ImagePrompt)]
    if "image" not in value or not value.keys() <= set(names):
        raise ValueError(f"image_prompt is {shown(value)}; expected a mapping with image and some of {names[1:]}")
    return ImagePrompt(**value)
