"""Objects of sizes that a model does not draw by itself: placed without regard to their size, then stretched to it.

Not from a paper. Gradients place an object, but where they also have to change its size to one that the model has not
seen, its shape breaks. So guidance leaves the size of such an object alone (`Layout.stretched`), fresh noise between
its steps lets the network mend what gradients do, and after its last step the predicted picture is stretched once so
that the object fills its box. The steps that follow draw from there.
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


class Profile(NamedTuple):
    """How a map says where its object is: by its profiles along x and y, the norms of its columns and rows.

    peaked: their spread relative to that of uniform ones of the object's size, since maps peak in the middle. blur:
    what the grid adds to it, in cells. Both measured on the bundled model.
    """

    norm: int
    peaked: float
    blur: float


SHRINKING, GROWING = Profile(2, 0.84, 0.3), Profile(1, 0.66, 0.5)
"""Of objects that are too large, and of others. What little attention lies everywhere counts less in 2-norms, which so
find small objects better (an IoU of 0.75 instead of 0.69); stretched from there, fewer large ones keep their shape."""
LEAST = 0.03  # an object's edge: maps have cells
NEAR, FAR = 0.1, 0.4
"""Nothing is stretched where edges (their logarithms) and centre are off by less than NEAR of the object's size, so
that it fits already, or its centre by more than FAR, so that it is elsewhere."""
MARGIN = 0.08
"""How far around an object the picture is stretched with it."""
_ROUNDING = 1e-6  # of edges that are differences


@own_keywords
@dataclass(frozen=True)
class UsualSizes:
    """The sizes of boxes that a model fills by itself. Objects in one box (no mask, no line) of another are stretched.

    least, most: edges, in [0,1] of the picture's edge. aspect: the longer edge over the shorter, in pixels, at least 1.
    The defaults are those that the bundled model has seen in training, with a margin. ValueError for others.

    What it does is tested with the bundled model alone, whose maps `SHRINKING` and `GROWING` describe.
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
    """A part of a picture to be stretched: from a box to a box, but for what lies inside other boxes. shrinks: whether
    its object is too large.
    """

    now: Box
    to: Box
    others: tuple[Box, ...] = ()
    shrinks: bool = False

    def __call__(self, picture: Tensor) -> Tensor:
        """The picture [C,H,W], on the CPU, sampled bicubically: linear by parts on each axis, as it was MARGIN away."""
        height, width = picture.shape[1:]
        (x, across), (y, down) = self._axis(0, width), self._axis(1, height)
        inside = down[:, None] & across
        columns, rows = ((torch.arange(n, device="cpu") + 0.5) / n for n in (width, height))
        for x0, y0, x1, y1 in self.others:
            inside &= ~(((y0 <= rows) & (rows <= y1))[:, None] & (x0 <= columns) & (columns <= x1))
        at = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=2)[None].to(picture)
        moved = F.grid_sample(picture[None], 2 * at - 1, "bicubic", padding_mode="border", align_corners=False)
        return torch.where(inside, moved[0], picture)

    def _axis(self, axis: int, cells: int) -> tuple[Tensor, Tensor]:
        """Where each of the cells of an axis comes from [n] in [0,1], and whether it moves [n]."""
        now, to = self.now[axis::2], self.to[axis::2]
        ends = max(0.0, min(now[0], to[0]) - MARGIN), min(1.0, max(now[1], to[1]) + MARGIN)
        at = (np.arange(cells) + 0.5) / cells
        come = np.interp(at, (ends[0], *to, ends[1]), (ends[0], *now, ends[1]))
        return torch.from_numpy(come), torch.from_numpy((ends[0] <= at) & (at <= ends[1]))


def extents(maps: Maps, layout: Layout, profile: Profile) -> Tensor:
    """Where the objects are, boxes [B,O,4], by the centres and spreads of their profiles; from head means [B,h,w,L]."""
    found = []
    for (height, width), kept in grids(maps).items():
        own = own_maps(kept.float(), layout)
        rows, columns = (torch.linalg.vector_norm(own, profile.norm, dim=axis) for axis in (3, 2))
        centre, spread = centre_and_spread(rows[..., :, None] * columns[..., None, :])
        blur = constants(spread, profile.blur / width, profile.blur / height)
        edge = math.sqrt(12) / profile.peaked * (spread.square() - blur.square()).clamp_min(0).sqrt()
        half = edge.clamp_min(LEAST) / 2
        found.append(torch.cat([centre - half, centre + half], dim=2).clamp(0, 1))
    return torch.stack(found).mean(dim=0)


def stretches(maps: Maps, layout: Layout, regions: Sequence[Sequence[PlacedObject]]) -> tuple[tuple[Stretch, ...], ...]:
    """What fits the objects of each image to their boxes, where the layout says so; from head means [B,h,w,L]."""
    small, large = (extents(maps, layout, profile).tolist() for profile in (SHRINKING, GROWING))
    found = [list[Stretch]() for _ in regions]
    for image, o in layout.stretched.nonzero().tolist():
        one, seen = regions[image][o], small[image][o]
        (to,), shrinks = one.boxes, _area(one.boxes[0]) < _area(seen)
        now = tuple(seen if shrinks else large[image][o])
        if _is_worth_it(now, to):
            others = [box for other in regions[image] if other is not one for box in _kept(other, one)]
            found[image].append(Stretch(now, to, tuple(others), shrinks))
    return tuple(map(tuple, found))


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


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


def _is_worth_it(now: Box, to: Box) -> bool:
    """Whether the object is about where it shall be, and does not fit yet."""
    have, want = np.array(now).reshape(2, 2), np.array(to).reshape(2, 2)
    had, size = have[1] - have[0], want[1] - want[0]
    off = np.abs(want.mean(axis=0) - have.mean(axis=0))
    fits = np.abs(np.log(had / size)).max() < NEAR and (off / size).max() < NEAR
    return not fits and bool((off / np.maximum(had, size)).max() <= FAR)
