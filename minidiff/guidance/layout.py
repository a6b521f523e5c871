"""Where things shall be: phrases with boxes or masks, and the tensors that objectives and edits read.

Shapes: B images, O objects (of the image that has most), h x w cells of an attention grid, L text tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..networks.attention import mask_name

if TYPE_CHECKING:
    from ..networks.attention import Inputs
    from ..networks.sites import Grid

Box: TypeAlias = tuple[float, float, float, float]
Mask: TypeAlias = Tensor | NDArray[np.generic] | Image.Image
Boxes: TypeAlias = Mapping[Any, object]  # Any: a mapping's type of keys is invariant, and callers have dict[str, ...]
"""A phrase of the prompt, or token positions, to a box (x0, y0, x1, y1) in [0,1] (from the left, from the top), a list
of boxes or a mask; or to {"boxes": ..., "weight": 2.0} or {"mask": ..., "weight": ...}.
"""

_TOKENS = re.compile(r"tokens:(\d+(?:,\d+)*)")  # token positions where a key must be a text, as in JSON


@dataclass(frozen=True, eq=False)
class Region:
    """One object: the positions of its tokens, and its boxes or its mask [H,W] in [0,1].

    `name` is the phrase, or such as "tokens:2,3". `weight` is its share in an objective beside the other objects.
    """

    name: str
    tokens: tuple[int, ...]
    boxes: tuple[Box, ...] = ()
    mask: Tensor | None = None
    weight: float = 1.0

    def coverage(self, grid: Grid) -> Tensor:
        """How much of each cell is inside, exactly, [h,w] in [0,1]: never empty, however small the box."""
        if self.mask is not None:
            rows, columns = (torch.arange(n + 1, dtype=torch.float64) / n for n in self.mask.shape)
            inside = self.mask.double()
        else:  # boxes of one object may overlap: cut the picture at every edge of every box
            boxes = torch.tensor(self.boxes, dtype=torch.float64)
            columns, rows = (boxes[:, axis::2].flatten().unique() for axis in (0, 1))
            x, y = (columns[1:] + columns[:-1]) / 2, (rows[1:] + rows[:-1]) / 2
            x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
            across, down = (x0 < x) & (x < x1), (y0 < y) & (y < y1)
            inside = (down[:, :, None] & across[:, None, :]).any(dim=0).double()
        return overlap(rows[:-1], rows[1:], grid[0]).T @ inside @ overlap(columns[:-1], columns[1:], grid[1])


class Layout(NamedTuple):
    """The regions of a batch as tensors. An image with fewer objects than another has zeros in the places left.

    masks: {(h, w): [B,O,h,w]} for every grid in question, in [0,1].
    token_weights: [B,O,L], the tokens of each object; they sum to one.
    words: [B,L], 1 for the prompt's own tokens, 0 for start, end and padding.
    weights: [B,O] of the objects; 0 where there is none.
    """

    masks: dict[Grid, Tensor]
    token_weights: Tensor
    words: Tensor
    weights: Tensor

    def inputs(self) -> Inputs:
        """By the names under which kinds of keep and edits find them."""
        masks = {mask_name(grid): mask for grid, mask in self.masks.items()}
        return {**masks, "token_weights": self.token_weights, "words": self.words, "object_weights": self.weights}

    def images(self, index: Tensor) -> Layout:
        """Those of some images."""
        masks = {grid: mask[index] for grid, mask in self.masks.items()}
        return Layout(masks, self.token_weights[index], self.words[index], self.weights[index])


def make_layout(
    regions: Sequence[Sequence[Region]],
    num_tokens: Sequence[int],
    length: int,
    grids: Iterable[Grid],
    device: torch.device | None = None,
) -> Layout:
    """Tensors of B images' regions. num_tokens: of each image's prompt, without start and end; length: L."""
    objects = max((len(some) for some in regions), default=0)
    token_weights = torch.zeros(len(regions), objects, length)
    words = torch.zeros(len(regions), length)
    weights = torch.zeros(len(regions), objects)
    masks = {grid: torch.zeros(len(regions), objects, *grid) for grid in grids}
    for i, some in enumerate(regions):
        words[i, 1 : num_tokens[i] + 1] = 1
        for o, region in enumerate(some):
            token_weights[i, o, list(region.tokens)] = 1 / len(region.tokens)
            weights[i, o] = region.weight
            for grid, mask in masks.items():
                mask[i, o] = region.coverage(grid)
    on_device = {grid: mask.to(device) for grid, mask in masks.items()}
    return Layout(on_device, token_weights.to(device), words.to(device), weights.to(device))


def read_regions(boxes: Boxes, find: Callable[[str], tuple[int, ...]], length: int) -> tuple[Region, ...]:
    """What a caller wrote, checked. find: a phrase to the positions of its tokens; ValueError where it has none."""
    if not isinstance(boxes, Mapping):
        raise ValueError(
            f"boxes is {boxes!r}; expected a mapping of phrases of the prompt to boxes, such as "
            '{"ball": (0.55, 0.4, 0.95, 0.8)}'
        )
    return tuple(_region(key, value, find, length) for key, value in boxes.items())


def _region(key: object, value: object, find: Callable[[str], tuple[int, ...]], length: int) -> Region:
    named = _TOKENS.fullmatch(key) if isinstance(key, str) else None
    if named is not None:
        key = tuple(int(number) for number in named[1].split(","))
    if isinstance(key, str):
        name, tokens = key, find(key)
    else:
        tokens = _tokens(key, length)
        name = f"tokens:{','.join(map(str, tokens))}"
    weight = 1.0
    if isinstance(value, Mapping):
        if not value.keys() <= {"boxes", "mask", "weight"} or len(value.keys() & {"boxes", "mask"}) != 1:
            raise ValueError(
                f'boxes[{key!r}] is {dict(value)!r}; expected {{"boxes": ..., "weight": 1.0}} or {{"mask": ...}}'
            )
        weight = _weight(key, value.get("weight", 1.0))
        value = value["boxes"] if "boxes" in value else value["mask"]
    if isinstance(value, Image.Image | np.ndarray | Tensor):
        return Region(name, tokens, mask=_mask(key, value), weight=weight)
    return Region(name, tokens, boxes=_boxes(key, value), weight=weight)


def _tokens(key: object, length: int) -> tuple[int, ...]:
    tokens = (key,) if isinstance(key, int) and not isinstance(key, bool) else key
    if (
        not isinstance(tokens, tuple)
        or not tokens
        or not all(isinstance(token, int) and not isinstance(token, bool) and 0 < token < length for token in tokens)
    ):
        raise ValueError(
            f"boxes has the key {key!r}; expected a phrase of the prompt, or token positions from 1 to {length - 1} "
            "(position 0 is the start marker) as a number or a tuple"
        )
    return tokens


def _weight(key: object, weight: object) -> float:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise ValueError(f"boxes[{key!r}] has the weight {weight!r}; expected a number above 0")
    return float(weight)


def _boxes(key: object, value: object) -> tuple[Box, ...]:
    expected = "expected (x0, y0, x1, y1) in [0,1] with x0 < x1 and y0 < y1, a list of such boxes, or a mask"
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"boxes[{key!r}] is {value!r}; {expected}")
    boxes = value if isinstance(value[0], list | tuple) else (value,)
    for box in boxes:
        if not isinstance(box, list | tuple) or len(box) != 4 or not all(_is_number(edge) for edge in box):
            raise ValueError(f"boxes[{key!r}] holds {box!r}; {expected}")
        x0, y0, x1, y1 = box
        if min(box) < 0 or max(box) > 1:
            raise ValueError(
                f"boxes[{key!r}] holds {box!r}, which reaches outside of the picture; {expected}. "
                "Divide pixels by the picture's width and height"
            )
        if x1 <= x0 or y1 <= y0:
            why = "has no area" if x1 == x0 or y1 == y0 else "has its corners out of order (is it x, y, width, height?)"
            raise ValueError(f"boxes[{key!r}] holds {box!r}, which {why}; {expected}")
    return tuple((float(x0), float(y0), float(x1), float(y1)) for x0, y0, x1, y1 in boxes)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _mask(key: object, value: Mask) -> Tensor:
    """[H,W] in [0,1]."""
    if isinstance(value, Image.Image):
        value = np.asarray(value.convert("L"), dtype=np.float32) / 255
    mask = torch.as_tensor(value if isinstance(value, Tensor) or value.dtype.kind in "biuf" else np.zeros(0))
    whole = not mask.is_floating_point() and not mask.is_complex()
    if mask.ndim != 2 or mask.is_complex() or mask.numel() == 0:
        raise ValueError(
            f"the mask of {key!r} has shape {list(mask.shape)} and dtype {mask.dtype}; expected [H,W] of booleans, "
            "of numbers from 0 to 1, or an image"
        )
    mask = mask.double()
    if whole and mask.max() == 255 and mask.unique().tolist() in ([255.0], [0.0, 255.0]):
        mask = mask / 255  # a mask as image files hold it
    if not mask.isfinite().all() or mask.min() < 0 or mask.max() > 1:
        raise ValueError(
            f"the mask of {key!r} holds values from {mask.min():g} to {mask.max():g}; expected 0 to 1 (or 0 and 255)"
        )
    if mask.max() == 0:
        raise ValueError(f"the mask of {key!r} is empty; expected some of it above 0")
    return mask


def overlap(start: Tensor, end: Tensor, cells: int) -> Tensor:
    """How much of each of `cells` equal parts of [0,1] lies between start and end: [...] -> [...,cells] in [0,1]."""
    edges = torch.arange(cells + 1, dtype=start.dtype, device=start.device) / cells
    inside = torch.minimum(end[..., None], edges[1:]) - torch.maximum(start[..., None], edges[:-1])
    return inside.clamp_min(0) * cells


def box_coverage(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes [...,4] in [0,1] -> how much of each cell of a grid they cover, [...,height,width]."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    return overlap(y0, y1, height)[..., :, None] * overlap(x0, x1, width)[..., None, :]
