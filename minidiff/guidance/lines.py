"""Points, strokes and curves as places: where an object lies along, instead of inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from ..checks import is_number, number, shown

_SIDE = 128  # cells of a drawn line's mask along an edge
_MOST = 256  # points of a line
_BETWEEN = 12  # parts of a curve between two of its points
Pair: TypeAlias = tuple[float, float]


@dataclass(frozen=True)
class Stroke:
    """Straight lines through points [(x, y), ...] in [0,1], from the left and top; width as a fraction of the edge."""

    points: Sequence[Pair]
    width: float = 0.1
    kind: ClassVar[str] = "stroke"

    def __post_init__(self) -> None:
        if not isinstance(self.points, list | tuple) or not 1 <= len(self.points) <= _MOST:
            raise ValueError(f"a {self.kind} has the points {shown(self.points)}; expected 1 to {_MOST} of (x, y)")
        object.__setattr__(self, "points", tuple(map(_pair, self.points)))
        object.__setattr__(self, "width", number("width of a line", self.width, 0.02, 1.0))

    def line(self) -> Tensor:
        """The ends of its parts, [n,2], float64."""
        return torch.tensor(self.points, dtype=torch.float64, device="cpu")

    def mask(self) -> Tensor:
        """The fraction of each cell within half the width of the line, [128,128] in [0,1], float64."""
        at = (torch.arange(_SIDE, dtype=torch.float64, device="cpu") + 0.5) / _SIDE
        cells = torch.stack(torch.meshgrid(at, at, indexing="xy"), dim=2)  # [y,x,2]
        return ((self.width / 2 - distances(self.line(), cells)) * _SIDE + 0.5).clamp(0, 1)

    def plain(self) -> dict[str, object]:
        """As `read_line` reads it."""
        return {self.kind: [list(point) for point in self.points], "width": self.width}


@dataclass(frozen=True)
class Curve(Stroke):
    """A smooth curve through points [(x, y), ...]: Catmull and Rom's spline, 1974."""

    kind: ClassVar[str] = "curve"

    def line(self) -> Tensor:
        """The ends of its parts, [n,2], float64."""
        p = super().line()
        if len(p) < 3:
            return p
        p = torch.cat([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
        t = (torch.arange(_BETWEEN, dtype=torch.float64, device="cpu") / _BETWEEN)[:, None, None]
        a, b, c, d = p[:-3], p[1:-2], p[2:-1], p[3:]
        way = 2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3
        return torch.cat([(way / 2).movedim(0, 1).flatten(0, 1), p[-2:-1]])


def Point(x: float, y: float, width: float = 0.2) -> Stroke:
    """A disc of that width around (x, y): a stroke of one point."""
    return Stroke(((x, y),), width)


def distances(line: Tensor, points: Tensor) -> Tensor:
    """From points [...,2] to the nearest of the straight parts between the ends [n,2]: [...]."""
    start, end = (line, line) if len(line) == 1 else (line[:-1], line[1:])
    way = end - start
    along = ((points[..., None, :] - start) * way).sum(dim=-1) / way.square().sum(dim=-1).clamp_min(1e-12)
    nearest = start + along.clamp(0, 1)[..., None] * way
    return (points[..., None, :] - nearest).norm(dim=-1).amin(dim=-1)


def read_line(kind: str, points: Any, width: Any) -> Stroke:
    """A line from the parts of its mapping, such as {"stroke": [[0.1, 0.2], [0.8, 0.9]], "width": 0.1}."""
    made = {one.kind: one for one in (Stroke, Curve)}[kind]
    return made(points) if width is None else made(points, width)


def _pair(value: Any) -> Pair:
    if not isinstance(value, list | tuple) or len(value) != 2 or not is_number(*value):
        raise ValueError(f"a line has the point {shown(value)}; expected (x, y) in [0,1]")
    x, y = float(value[0]), float(value[1])
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise ValueError(f"a line has the point {shown(value)}; expected (x, y) in [0,1], as fractions of the picture")
    return x, y
