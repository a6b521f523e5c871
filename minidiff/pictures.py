"""Pictures as people bring them: read, fitted into a size, and as tensors of the networks that look at them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .checks import shown
from .draw import to_image
from .guidance.layout import to_array

ALPHA = "alpha"
"""The mask that a picture's own transparency gives."""
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def read_picture(name: str, value: Any) -> Image.Image:
    """A PIL image, a file's path, an array [H,W,3] or a tensor [3,H,W] (uint8, or floats in [0,1]) -> an image.

    A file or PIL image is turned as its EXIF orientation says and keeps its mode, "RGBA" for one with transparency.
    ValueError, with the `name` of the argument, for what cannot be read.
    """
    if isinstance(value, Mapping):
        raise ValueError(f"{name} holds a placeholder for a picture, which no file keeps; pass your own")
    try:
        if not isinstance(value, str | Path | Image.Image):
            return to_image(value)
        with Image.open(Path(value).expanduser()) if isinstance(value, str | Path) else value.copy() as opened:
            turned = ImageOps.exif_transpose(opened)
        if turned.mode[0] in "IF":
            raise ValueError(f"its pixels have mode {turned.mode}; expected 8 bits per channel")
        return turned.convert("RGBA") if turned.has_transparency_data else turned
    except (OSError, RuntimeError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's
        raise ValueError(f"{name} cannot be read: {error}") from error


def read_mask(name: str, value: Any) -> Image.Image | str:
    """A mask in grey, 255 where to paint: an image or its path, or numbers from 0 to 1 (or bool) [H,W]; or ALPHA."""
    if isinstance(value, str) and value == ALPHA:
        return ALPHA
    if isinstance(value, str | Path | Image.Image):
        return read_picture(name, value).convert("L")
    array = to_array(name, value)
    numbers = isinstance(array, np.ndarray) and array.ndim == 2 and array.size > 0 and array.dtype.kind in "biuf"
    if not numbers or not (array >= 0).all() or not (array <= 1).all():  # NaN is neither
        raise ValueError(f"{name} is {shown(value)}; expected an image, its path, or [H,W] of numbers from 0 to 1")
    return Image.fromarray((array.astype(np.float64) * 255).round().astype(np.uint8))


def read_each(name: str, value: Any, prompts: int, read: Callable[[str, Any], object]) -> tuple[object, ...]:
    """A field with one value for all prompts or one per prompt, each value read."""
    found = tuple(value) if isinstance(value, list | tuple) else (value,)
    if len(found) not in (1, prompts):
        raise ValueError(f"{name} holds {len(found)} for {prompts} prompts; expected one for all, or one each")
    return tuple(read(name, one) for one in found)


def opaque(image: Image.Image) -> Image.Image:
    """In RGB, over white where it is transparent."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def transparency(image: Image.Image) -> Image.Image:
    """The mask that paints where an image is transparent."""
    return ImageOps.invert(image.getchannel("A")) if image.mode == "RGBA" else Image.new("L", image.size)


def fitted(image: Image.Image, width: int, height: int, fit: str, fill: int | None = None) -> Image.Image:
    """An image at a size. "resize": stretched; "crop": the middle part of that shape; "pad": all of it, in the middle.

    fill: the value around a padded image; None: the image's edge goes on. Resized by Lanczos' filter, as in diffusers.
    """
    if fit == "resize":
        return image.resize((width, height), Image.Resampling.LANCZOS)
    scales = (width / image.width, height / image.height)
    scale = max(scales) if fit == "crop" else min(scales)
    inner = image.resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.LANCZOS
    )
    left, top = (width - inner.width) // 2, (height - inner.height) // 2
    if fit == "crop":
        return inner.crop((-left, -top, width - left, height - top))
    around = [(top, height - inner.height - top), (left, width - inner.width - left)]
    pixels = np.asarray(inner)
    around += [(0, 0)] * (pixels.ndim - 2)
    padded = np.pad(pixels, around, "edge") if fill is None else np.pad(pixels, around, constant_values=fill)
    return Image.fromarray(padded)


def clip_pixels(
    images: Sequence[Image.Image], edge: int = 224, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> Tensor:
    """RGB images -> [B,3,edge,edge] float32, as CLIP's image encoder reads them (transformers' CLIPImageProcessor).

    The shorter edge is resized to `edge`, bicubic in 8 bits, and the middle cut out; per channel (value - mean) / std
    of values in [0,1].
    """
    found = []
    for image in images:
        short = min(image.size)
        width, height = (edge if size == short else edge * size // short for size in image.size)
        left, top = (width - edge) // 2, (height - edge) // 2
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        found.append(np.asarray(resized.crop((left, top, left + edge, top + edge)), dtype=np.float32))
    pixels = torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2) / 255
    shift, scale = (torch.tensor(one, dtype=torch.float32, device="cpu")[:, None, None] for one in (mean, std))
    return (pixels - shift) / scale
