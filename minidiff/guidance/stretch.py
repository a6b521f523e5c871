"""Objects of sizes that a model does not draw by itself: placed without regard to their size, then stretched to it.

Not from a paper. Gradients place an object, but where they also have to change its size to one that the model has not
seen, its shape breaks. So guidance leaves the size of such an object alone (`Layout.stretched`), fresh noise between
its steps lets the network mend what gradients do, and the finished picture is stretched so that the object fills its
box. Not before: what is drawn after a stretch goes back to shapes and sizes that the model knows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import number, shown
from ..networks.attention import Maps
from ..vocabulary import own_keywords
from .layout import Box, Layout, PlacedObject
from .objectives._maps import centre_and_spread, constants, grids, own_maps

if TYPE_CHECKING:
    from ..networks.sites import Grid


NORM = 4
"""A map says where its object is by its profiles along x and y: the norms of its columns and rows."""
PEAKED, BLUR = 0.75, 0.3
"""Their spread relative to that of uniform ones of the object's size, since maps peak in the middle; and what the grid
adds to it, in cells. Measured on the bundled model, at timestep 0."""
LEAST = 0.03  # an object's edge: maps have cells
NEAR, FAR = 0.1, 0.4
"""Two boxes are the same where the logarithms of their edges differ by less than NEAR, and their centres by less than
NEAR of the larger edge. They are of different objects where centres differ by more than FAR of it, and what a picture
shows is another thing than what a map sees where edges do so, too."""
AROUND = 0.35
"""How far around where a map sees an object, in its edges, the ground and the rest of the object are looked for."""
MARGIN = 0.08
"""How far around an object the picture is stretched with it."""
_ROUNDING = 1e-6  # of edges that are differences


@own_keywords
@dataclass(frozen=True)
class UsualSizes:
    """The sizes of boxes that a model fills by itself. Objects in one box (no mask, no line) of another are stretched.

    least, most: edges, in [0,1] of the picture's edge. aspect: the longer edge over the shorter, in pixels, at least 1.
    The defaults are those that the bundled model has seen in training, with a margin. ValueError for others.

    What it does is tested with the bundled model alone, whose maps NORM, PEAKED and BLUR describe.
    """

    least: float = 0.2
    most: float = 0.66
    aspect: float = 2.2

    def __post_init__(self) -> None:
        for field, least, most in zip(fields(self), (0.0, 0.0, 1.0), (1.0, 1.0, math.inf), strict=True):
            value = number(f"usual_sizes: {field.name}", getattr(self, field.name), least, most)
            object.__setattr__(self, field.name, value)
        if self.least > self.most:
            raise ValueError(f"usual_sizes: least is {self.least:g}; expected at most `most`, {self.most:g}")

    @classmethod
    def read(cls, name: str, value: object) -> UsualSizes:
        """Read a mapping of the fields."""
        if isinstance(value, cls):
            return value
        own = [field.name for field in fields(cls)]
        if not isinstance(value, Mapping) or not value.keys() <= {*own}:
            raise ValueError(
                f"{name} is {shown(value)}; expected a minidiff.UsualSizes or a mapping with {', '.join(own)}, or None"
            )
        return cls(**value)

    def marked(
        self,
        regions: Sequence[Sequence[PlacedObject]],
        then: Sequence[Sequence[PlacedObject]],
        grid: Grid,
    ) -> tuple[tuple[PlacedObject, ...], ...]:
        """The objects of each image, with `stretched` where they will be. then: the same, as the text has them in that
        step. grid: the picture's height and width in any unit.
        """
        pairs = zip(regions, then, strict=True)
        return tuple(
            tuple(
                replace(one, stretched=bool(later.tokens) and self._lack(one, grid))
                for one, later in zip(some, others, strict=True)
            )
            for some, others in pairs
        )

    def _lack(self, one: PlacedObject, grid: Grid) -> bool:
        if len(one.boxes) != 1:
            return False
        x0, y0, x1, y1 = one.boxes[0]
        edges = x1 - x0, y1 - y0
        short, long = sorted((edges[0] * grid[1], edges[1] * grid[0]))
        small, large = min(edges) < self.least - _ROUNDING, max(edges) > self.most + _ROUNDING
        return small or large or long > (self.aspect + _ROUNDING) * short


class Stretch(NamedTuple):
    """A part of a picture to be stretched: from a box to a box, but for what lies inside other boxes."""

    now: Box
    to: Box
    others: tuple[Box, ...] = ()

    def __call__(self, picture: Tensor) -> Tensor:
        """The picture [C,H,W], on the CPU, sampled bicubically: linear by parts on each axis, as it was MARGIN away."""
        height, width = picture.shape[1:]
        (x, across), (y, down) = self._axis(0, width), self._axis(1, height)
        inside = down[:, None] & across
        for other in self.others:
            inside &= ~_inside(other, picture)
        at = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=2)[None].to(picture)
        moved = F.grid_sample(picture[None], 2 * at - 1, "bicubic", padding_mode="border", align_corners=False)
        return torch.where(inside, moved[0], picture)

    def spares(self, box: Box) -> bool:
        """Whether all of a box is outside of what moves."""
        ends = (self._ends(axis) for axis in (0, 1))
        return any(box[axis + 2] <= low or high <= box[axis] for axis, (low, high) in enumerate(ends))

    def _ends(self, axis: int) -> tuple[float, float]:
        """What moves, along an axis."""
        now, to = self.now[axis::2], self.to[axis::2]
        return max(0.0, min(now[0], to[0]) - MARGIN), min(1.0, max(now[1], to[1]) + MARGIN)

    def _axis(self, axis: int, cells: int) -> tuple[Tensor, Tensor]:
        """Where each of the cells of an axis comes from [n] in [0,1], and whether it moves [n]."""
        now, to, ends = self.now[axis::2], self.to[axis::2], self._ends(axis)
        at = (np.arange(cells) + 0.5) / cells
        come = np.interp(at, (ends[0], *to, ends[1]), (ends[0], *now, ends[1]))
        return torch.from_numpy(come), torch.from_numpy((ends[0] <= at) & (at <= ends[1]))


def extents(maps: Maps, layout: Layout) -> Tensor:
    """Where the objects are, boxes [B,O,4], by the centres and spreads of their profiles; from head means [B,h,w,L]."""
    found = []
    for (height, width), kept in grids(maps).items():
        own = own_maps(kept.float(), layout) * _nearest(layout, (height, width))
        rows, columns = (torch.linalg.vector_norm(own, NORM, dim=axis) for axis in (3, 2))
        centre, spread = centre_and_spread(rows[..., :, None] * columns[..., None, :])
        blur = constants(spread, BLUR / width, BLUR / height)
        edge = math.sqrt(12) / PEAKED * (spread.square() - blur.square()).clamp_min(0).sqrt()
        half = edge.clamp_min(LEAST) / 2
        found.append(torch.cat([centre - half, centre + half], dim=2).clamp(0, 1))
    return torch.stack(found).mean(dim=0)


def _nearest(layout: Layout, grid: Grid) -> Tensor:
    """Which cells are in an object's box, or at least as near to its middle as to those of its siblings, [B,O,h,w]:
    what lies outside of all boxes belongs to one of them, too.
    """
    mask = layout.masks[grid].float()
    middle, _ = centre_and_spread(mask)
    y, x = ((torch.arange(n, device=middle.device) + 0.5) / n for n in grid)
    away = (x - middle[:, :, 0, None, None]).square() + (y[:, None] - middle[:, :, 1, None, None]).square()
    nearer = (away[:, :, None] <= away[:, None]) | (layout.siblings == 0)[..., None, None]
    return (nearer.all(dim=2) | (mask > 0)).to(mask.dtype)


def outline(picture: Tensor, box: Box, others: Sequence[Box] = ()) -> Box:
    """The bounds of an object in a picture [3,H,W], on the CPU, given about where it is: maps have cells, and are
    wider for some shapes than for others.

    It is what has the colour that stands out in the box from the ground around it: is off by less than half of their
    contrast. The box itself where that is nothing, or of another place or size. Other boxes are left out.
    """
    x0, y0, x1, y1 = box
    across, down = AROUND * (x1 - x0), AROUND * (y1 - y0)
    around = _inside((x0 - across, y0 - down, x1 + across, y1 + down), picture)
    for other in others:
        around &= ~_inside(other, picture)
    there = around & _inside(box, picture)
    if not there.any() or not (around & ~there).any():
        return box
    ground = picture[:, around & ~there].median(dim=1).values
    contrast = (picture - ground[:, None, None]).square().sum(dim=0)[there]
    colour = (picture[:, there] * contrast).sum(dim=1) / contrast.sum()
    own = around & ((picture - colour[:, None, None]).norm(dim=0) < (colour - ground).norm() / 2)
    for _ in range(2):  # a neighbour beside it goes with its columns, one below with its rows
        own = own & _run(own.any(dim=1), (y0 + y1) / 2)[:, None]
        own = own & _run(own.any(dim=0), (x0 + x1) / 2)
    if not own.any():  # nothing stands out, so that all is NaN, or not in the middle
        return box
    found = _bounds(own)
    return found if max(_off(box, found)) < FAR else box


def stretch_objects(picture: Tensor, seen: Sequence[Sequence[float]], objects: Sequence[PlacedObject]) -> Tensor:
    """The picture [3,H,W], on the CPU, with its objects fitted to their boxes, where they are to be and do not fit yet.
    seen: about where each is.

    One with another that is to be stretched close to it stays as it is drawn: both would be torn.
    """
    todo = []
    for one, (x0, y0, x1, y1) in zip(objects, seen, strict=False):  # those of images with more objects are padded
        if one.stretched:
            others = [box for other in objects if other is not one for box in _kept(other, one)]
            todo.append(Stretch(outline(picture, (x0, y0, x1, y1), others), one.boxes[0], tuple(others)))
    found = picture
    for stretch in todo:
        size, place = _off(stretch.now, stretch.to)
        rest = [other for other in todo if other is not stretch]
        alone = all(stretch.spares(other.now) and stretch.spares(other.to) for other in rest)
        if max(size, place) >= NEAR and place <= FAR and alone:
            found = stretch(found)
    return found


def _inside(box: Box, picture: Tensor) -> Tensor:
    """Which pixels are, [H,W]."""
    (x0, y0, x1, y1), (height, width) = box, picture.shape[1:]
    columns, rows = ((torch.arange(n, device="cpu") + 0.5) / n for n in (width, height))
    return ((y0 <= rows) & (rows <= y1))[:, None] & ((x0 <= columns) & (columns <= x1))


def _run(line: Tensor, at: float) -> Tensor:
    """Those [n] of the true ones of a line that lie together around a place in [0,1]; none where it is not true."""
    gaps = [-1, *(~line).nonzero().flatten().tolist(), len(line)]
    middle = min(int(at * len(line)), len(line) - 1)
    first, last = max(gap for gap in gaps if gap <= middle), min(gap for gap in gaps if gap >= middle)
    cells = torch.arange(len(line), device="cpu")
    return (first < cells) & (cells < last)


def _kept(other: PlacedObject, one: PlacedObject) -> list[Box]:
    """Where another object must not be stretched with one: not behind it, nor where it lies inside the other's box."""
    if other.order < one.order:
        return []
    boxes = list(other.boxes) if other.mask is None else [_bounds(other.mask)]
    x, y = (one.boxes[0][0] + one.boxes[0][2]) / 2, (one.boxes[0][1] + one.boxes[0][3]) / 2
    return [box for box in boxes if not (box[0] < x < box[2] and box[1] < y < box[3])]


def _bounds(mask: Tensor) -> Box:
    """Of a mask [H,W] in [0,1]."""
    (y0, y1), (x0, x1) = (
        (int(line.nonzero().min()) / len(line), (int(line.nonzero().max()) + 1) / len(line))
        for line in ((mask > 0).any(dim=1), (mask > 0).any(dim=0))
    )
    return x0, y0, x1, y1


def _off(one: Box, other: Box) -> tuple[float, float]:
    """How much the sizes of two boxes differ, by the logarithms of their edges, and the places, by the larger edge."""
    (first, first_size), (second, second_size) = (
        ((low + high) / 2, high - low) for low, high in (np.array(box).reshape(2, 2) for box in (one, other))
    )
    place = np.abs(first - second) / np.maximum(first_size, second_size)
    return float(np.abs(np.log(first_size / second_size)).max()), float(place.max())
