"""Layouts: phrases with boxes or masks, and the tensors that objectives and edits read.

Shapes: B images, O objects (the most in any image), h x w cells of an attention grid, L text tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checks import is_number, number, shown, whole
from ..networks.attention import mask_name
from .lines import Stroke, read_line
from .relations import Relation, relation_tensor

if TYPE_CHECKING:
    from ..networks.attention import Inputs
    from ..networks.sites import Grid

Box: TypeAlias = tuple[float, float, float, float]
Boxes: TypeAlias = Mapping[Any, object]  # Any: the key type of Mapping is invariant, and callers have dict[str, ...]
"""Maps a phrase of the prompt, or token positions, to a box (x0, y0, x1, y1) in [0,1] from the upper left, several
boxes (a list, or an array [n,4]), a mask (an image, or an array [H,W] in [0,1]), a Point, Stroke or Curve,
None for a phrase without a position,
or one of these in {"boxes": ..., "weight": 2.0} or {"mask": ..., "weight": ...}. Several boxes are one object that may
lie in any of them; a list of such mappings, [{"box": ...}, {"box": ...}], is as many objects of that phrase.
{"box": ..., "order": 1} lies in front of what has a lower order (0 unless given): where they overlap, it alone is.
"""

_LINES = ("stroke", "curve")
_TOKENS = re.compile(r"tokens:(\d{1,9}(?:,\d{1,9})*)")  # token positions where keys must be strings, as in JSON
_ROUNDING = 1e-9  # of a covered cell, whose parts are sums: the rest of one that is covered whole
_MOST = 256  # phrases, and boxes per phrase: the union of n boxes takes 4 n^3 bytes, here 67 MB


@dataclass(frozen=True, eq=False)
class PlacedObject:
    """One object: its token positions, and its boxes or its mask [H,W] in [0,1]; with neither, its position is free.

    `name` is the phrase, or e.g. "tokens:2,3". `weight` is its weight in an objective relative to other objects.
    `line`: what the mask was drawn from. `order`: where objects overlap, only those of the highest one are.
    `stretched`: whether it will be stretched to its box (stretch.py).
    """

    name: str
    tokens: tuple[int, ...]
    boxes: tuple[Box, ...] = ()
    mask: Tensor | None = None
    weight: float = 1.0
    line: Stroke | None = None
    order: float = 0.0
    stretched: bool = False

    def coverage(self, grid: Grid) -> Tensor:
        """The exact fraction of each cell that is inside, [h,w] in [0,1], nonzero somewhere however small the box;
        all 0 without boxes and mask. On the CPU in float64, whatever torch's defaults."""
        if self.mask is not None:
            rows, columns = (torch.arange(n + 1, dtype=torch.float64, device="cpu") / n for n in self.mask.shape)
            inside = self.mask.double()
        elif not self.boxes:
            return torch.zeros(grid, dtype=torch.float64, device="cpu")
        else:  # boxes of one object may overlap: split the picture at every edge of every box
            boxes = torch.tensor(self.boxes, dtype=torch.float64, device="cpu")
            columns, rows = (boxes[:, axis::2].flatten().unique() for axis in (0, 1))
            x, y = (columns[1:] + columns[:-1]) / 2, (rows[1:] + rows[:-1]) / 2
            x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
            across, down = (x0 < x) & (x < x1), (y0 < y) & (y < y1)
            inside = (down[:, :, None] & across[:, None, :]).any(dim=0).double()
        return overlap(rows[:-1], rows[1:], grid[0]).T @ inside @ overlap(columns[:-1], columns[1:], grid[1])


class Layout(NamedTuple):
    """The objects of a batch as tensors, zero-padded for images with fewer objects than others.

    masks: {(h, w): [B,O,h,w]} for each grid, in [0,1].
    token_weights: [B,O,L], uniform over the tokens of each object; they sum to 1.
    words: [B,L], 1 for the prompt's own tokens, 0 for start, end and padding.
    weights: [B,O], the object weights; 0 for padding.
    relations: [B,O,O,3], as `relation_tensor` makes them: 1 or -1 where one object's x, y or size is to be larger or
        smaller than another's.
    siblings: [B,O,O]: 1 between different objects of the same tokens, such as two boxes of "cat", each a cat; else 0.
    stretched: [B,O]: 1 for objects that will be stretched to their boxes, whose size is not guided; else 0.
    """

    masks: dict[Grid, Tensor]
    token_weights: Tensor
    words: Tensor
    weights: Tensor
    relations: Tensor
    siblings: Tensor
    stretched: Tensor

    def inputs(self) -> Inputs:
        """The tensors by the names under which keeps and edits look them up."""
        tensors = {"token_weights": self.token_weights, "words": self.words, "object_weights": self.weights}
        return mask_inputs(self.masks) | tensors

    def images(self, index: Tensor) -> Layout:
        """The layout of some of the images."""
        return Layout({grid: mask[index] for grid, mask in self.masks.items()}, *(one[index] for one in self[1:]))


def mask_inputs(masks: Mapping[Grid, Tensor]) -> dict[str, Tensor]:
    """The objects' masks [B,O,h,w] as inputs."""
    return {mask_name(grid): mask for grid, mask in masks.items()}


def make_layout(
    regions: Sequence[Sequence[PlacedObject]],
    num_tokens: Sequence[int],
    length: int,
    grids: Iterable[Grid],
    device: torch.device | None = None,
    relations: Sequence[Sequence[Relation]] | None = None,
) -> Layout:
    """Build the tensors for B images. num_tokens: per prompt, without start and end; length: L."""
    objects = max((len(some) for some in regions), default=0)
    zeros = partial(torch.zeros, dtype=torch.float32, device="cpu")
    token_weights = zeros(len(regions), objects, length)
    words = zeros(len(regions), length)
    weights, stretched = zeros(len(regions), objects), zeros(len(regions), objects)
    masks = {grid: zeros(len(regions), objects, *grid) for grid in grids}
    for i, some in enumerate(regions):
        words[i, 1 : num_tokens[i] + 1] = 1
        for o, region in enumerate(some):
            if not region.tokens:  # the text of this step lacks the phrase
                continue
            token_weights[i, o, list(region.tokens)] = 1 / len(region.tokens)
            weights[i, o], stretched[i, o] = region.weight, region.stretched
            for grid, mask in masks.items():
                mask[i, o] = _seen(region, some, grid)
    on_device = {grid: mask.to(device) for grid, mask in masks.items()}
    names = [[region.name for region in some] for some in regions]
    related = relation_tensor(names, [()] * len(regions) if relations is None else relations)
    there = (weights > 0).float()
    both = torch.einsum("bi,bj->bij", there, there)
    same = (token_weights[:, :, None] == token_weights[:, None]).all(dim=3) & ~torch.eye(
        objects, dtype=torch.bool, device="cpu"
    )
    tensors = token_weights, words, weights, related * both[..., None], same * both, stretched
    return Layout(on_device, *(one.to(device) for one in tensors))


def _seen(region: PlacedObject, some: Sequence[PlacedObject], grid: Grid) -> Tensor:
    """What of its place [h,w] no object of a higher order lies in front of: exact for cells that each covers whole or
    not at all; in others each covers the same part of what the rest leaves free, wherever in the cell it lies.
    """
    own = region.coverage(grid)
    left = own.clone()
    for other in some:
        if other.order > region.order and other.tokens:
            free = 1 - other.coverage(grid)
            left *= torch.where(free > _ROUNDING, free, 0)
    if own.any() and not left.any():
        raise ValueError(
            f"boxes[{region.name!r}] lies wholly behind what has a higher order than {region.order:g}; expected a part "
            "that is seen"
        )
    return left


def read_objects(
    boxes: Boxes, find: Callable[[str], tuple[int, ...]] = lambda phrase: (1,), length: int = 1 << 30
) -> tuple[PlacedObject, ...]:
    """Parse and check boxes. find: maps a phrase to its token positions; ValueError for a phrase without any.

    Without find and length, phrases and token positions stay unchecked until the model is known.
    """
    if not isinstance(boxes, Mapping):
        raise ValueError(
            f"boxes is {shown(boxes)}; expected a mapping from phrases of the prompt to boxes, such as "
            '{"ball": (0.55, 0.4, 0.95, 0.8)}'
        )
    if len(boxes) > _MOST:
        raise ValueError(f"boxes holds {len(boxes):,} phrases; expected at most {_MOST}")
    found = tuple(one for key, value in boxes.items() for one in _instances(key, value, find, length))
    if len(found) > _MOST:
        raise ValueError(f"boxes holds {len(found):,} objects; expected at most {_MOST}")
    return found


def _instances(
    key: object, value: object, find: Callable[[str], tuple[int, ...]], length: int
) -> Iterable[PlacedObject]:
    """One object, or one for each of a list of mappings."""
    values: Sequence[object] = value if isinstance(value, list | tuple) and value else (None,)
    several = all(isinstance(one, Mapping) for one in values)
    return [_region(key, one, find, length) for one in (values if several else (value,))]


def _region(key: object, value: object, find: Callable[[str], tuple[int, ...]], length: int) -> PlacedObject:
    named = _TOKENS.fullmatch(key) if isinstance(key, str) else None
    if named is not None:
        key = tuple(int(position) for position in named[1].split(","))
    if isinstance(key, str):
        return _placed(f"boxes[{key[:100]!r}]", value, key, find(key))
    tokens = _tokens(key, length)
    return _placed(f"boxes[{shown(key)}]", value, f"tokens:{','.join(map(str, tokens))}", tokens)


def read_place(name: str, value: object) -> PlacedObject:
    """Parse and check a value as in `boxes`: one or several boxes, or a mask. The object has no tokens."""
    found = _placed(name, value, name, ())
    if found.weight != 1 or not (found.boxes or found.mask is not None):
        raise ValueError(f"{name} is {shown(value)}; expected a box, several or a mask, without a weight")
    return found


def _placed(where: str, value: object, name: str, tokens: tuple[int, ...]) -> PlacedObject:
    weight, masked, order = 1.0, False, 0.0
    if isinstance(value, Mapping):
        places = value.keys() & {"box", "boxes", "mask", *_LINES}
        lines = {"width"} if places & set(_LINES) else set()
        if len(places) != 1 or not value.keys() <= {*places, *lines, "weight", "order"}:
            raise ValueError(
                f'{where} is {shown(value)}; expected one of "box", "boxes", "mask", "stroke" and "curve", such as '
                '{"box": ...}, beside it at most "weight", "order" and, of a line, "width"'
            )
        order = number(f"{where}: order", value.get("order", 0.0))
        weight, masked = value.get("weight", 1.0), "mask" in value
        if not is_number(weight) or not float(weight) > 0:
            raise ValueError(f"{where} has the weight {shown(weight)}; expected a number above 0")
        (place,) = places
        value = read_line(place, value[place], value.get("width")) if lines else value[place]
    made = partial(PlacedObject, name, tokens, weight=float(weight), order=order)
    if isinstance(value, Stroke):
        return made(mask=value.mask(), line=value)
    value = to_array(where, value)
    if value is None and not masked:
        return made()
    if masked or _is_mask(value):
        return made(mask=_mask(where, value))
    return made(boxes=_boxes(where, value))


def to_array(name: str, value: Any) -> Any:
    """A tensor as a numpy array; any other value unchanged."""
    if not isinstance(value, Tensor):
        return value
    try:
        found = value.detach().cpu()  # numpy has neither bfloat16 nor float8
        exact = found.dtype in (torch.float32, torch.float64) or not found.is_floating_point()
        return (found if exact else found.float()).numpy()
    except (NotImplementedError, RuntimeError, TypeError) as error:  # on device "meta", sparse or quantized
        raise ValueError(f"{name} is {shown(value)}, which cannot be read as an array: {error}") from error


def _tokens(key: object, length: int) -> tuple[int, ...]:
    try:
        tokens = tuple(whole("", token, 1, length - 1) for token in (key if isinstance(key, tuple) else (key,)))
    except ValueError:
        tokens = ()
    if not tokens:
        raise ValueError(
            f"boxes has the key {shown(key)}; expected a phrase of the prompt, or token positions from 1 to "
            f"{length - 1} (position 0 is the start marker) as a number or a tuple"
        )
    return tuple(dict.fromkeys(tokens))


def _is_mask(value: object) -> bool:
    """True for an image, and for an array unless it holds boxes, i.e. numbers of shape [4] or [n,4]."""
    if not isinstance(value, np.ndarray):
        return isinstance(value, Image.Image)
    return value.ndim not in (1, 2) or value.shape[-1] != 4 or value.dtype.kind == "b"


def _boxes(where: str, value: Any) -> tuple[Box, ...]:
    """Read one box or several from any container."""
    expected = "expected (x0, y0, x1, y1) in [0,1] with x0 < x1 and y0 < y1, a list of such boxes, or a mask"
    if isinstance(value, np.ndarray):
        expected = f'{expected} (one of shape [n,4] as {{"mask": ...}})'
        value = value.tolist()
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{where} is {shown(value)}; {expected}")
    several = value if isinstance(value[0], list | tuple) or getattr(value[0], "ndim", 0) > 0 else (value,)
    if len(several) > _MOST:
        raise ValueError(f"{where} holds {len(several):,} boxes; expected at most {_MOST}")
    found = []
    for row in several:
        box = to_array(where, row)
        box = box.tolist() if isinstance(box, np.ndarray) else box
        if not isinstance(box, list | tuple) or len(box) != 4 or not is_number(*box):
            raise ValueError(f"{where} holds {shown(box)}; {expected}")
        x0, y0, x1, y1 = box = tuple(float(edge) for edge in box)
        if min(box) < 0 or max(box) > 1:
            raise ValueError(
                f"{where} holds {shown(box)}, which extends outside the picture; {expected}. "
                "Divide pixels by the picture's width and height"
            )
        if x1 <= x0 or y1 <= y0:
            why = "has no area" if x1 == x0 or y1 == y0 else "has its corners out of order (is it x, y, width, height?)"
            raise ValueError(f"{where} holds {shown(box)}, which {why}; {expected}")
        found.append((x0, y0, x1, y1))
    return tuple(found)


def _mask(where: str, value: object) -> Tensor:
    """[H,W] float64 in [0,1], on the CPU."""
    if isinstance(value, Image.Image):
        value = np.asarray(value.convert("L"), dtype=np.float32) / 255
    if not isinstance(value, np.ndarray) or value.ndim != 2 or value.dtype.kind not in "biuf" or value.size == 0:
        raise ValueError(f"the mask of {where} is {shown(value)}; expected [H,W] of numbers from 0 to 1, or an image")
    mask = torch.from_numpy(np.array(value, dtype=np.float64, order="C"))
    if value.dtype.kind in "iu" and mask.max() == 255 and ((mask == 0) | (mask == 255)).all():
        mask = mask / 255  # a mask as stored in image files
    if not mask.isfinite().all() or mask.min() < 0 or mask.max() > 1:
        raise ValueError(
            f"the mask of {where} holds values from {mask.min():g} to {mask.max():g}; expected 0 to 1 (or 0 and 255)"
        )
    if mask.max() == 0:
        raise ValueError(f"the mask of {where} is empty; expected some of it above 0")
    return mask


def overlap(start: Tensor, end: Tensor, cells: int) -> Tensor:
    """The fraction of each of `cells` equal parts of [0,1] between start and end: [...] -> [...,cells] in [0,1]."""
    edges = torch.arange(cells + 1, dtype=start.dtype, device=start.device) / cells
    inside = torch.minimum(end[..., None], edges[1:]) - torch.maximum(start[..., None], edges[:-1])
    return inside.clamp_min(0) * cells


def box_coverage(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes [...,4] in [0,1] -> the fraction of each grid cell that they cover, [...,height,width]."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    return overlap(y0, y1, height)[..., :, None] * overlap(x0, x1, width)[..., None, :]


def plain_boxes(regions: Sequence[PlacedObject]) -> dict[str, object]:
    """Regions in the form of a request's `boxes`, as plain values except for masks."""
    found: dict[str, list[dict[str, object]]] = {}
    for region in regions:
        place: dict[str, object] = {"boxes": region.boxes or None} if region.mask is None else {"mask": region.mask}
        place = place if region.line is None else region.line.plain()
        order = {"order": region.order} if region.order else {}
        found.setdefault(region.name, []).append({"weight": region.weight, **order, **place})
    return {name: several[0] if len(several) == 1 else several for name, several in found.items()}
