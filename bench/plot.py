"""Plots: named points with their Pareto front, and lines (Pillow only)."""

import math
from collections.abc import Callable, Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

_SIZE, _LEFT, _BELOW, _ABOVE, _RIGHT = (760, 460), 64, 48, 20, 150
_INK, _GRID, _POINT, _FRONT = "black", (225, 225, 225), (35, 75, 225), (220, 30, 35)
_LINES = (_POINT, _FRONT, (20, 140, 60), (230, 140, 20))

Point = tuple[float, float]
Place = Callable[[float, float], Point]


def scatter(points: Mapping[str, Point], x_name: str, y_name: str) -> Image.Image:
    """Points (cost, fraction in [0,1]); a line connects the Pareto front."""
    image = Image.new("RGB", _SIZE, "white")
    pen = ImageDraw.Draw(image)
    place = _axes(pen, _ceiling(max(x for x, _ in points.values())), 1, x_name, y_name, lambda y: f"{y:.0%}")
    pen.line([place(*points[name]) for name in front(points)], fill=_FRONT, width=2)
    taken: list[tuple[float, ...]] = []
    for name, point in sorted(points.items(), key=lambda item: -item[1][1]):
        x, y = place(*point)
        pen.ellipse([x - 5, y - 5, x + 5, y + 5], fill=_FRONT if name in front(points) else _POINT)
        _write(pen, name, (x, y), _INK, taken)
    return image


def lines(curves: Mapping[str, Sequence[Point]], x_name: str, y_name: str) -> Image.Image:
    """Curves of points (x, y) >= 0, each labelled at its right end."""
    image = Image.new("RGB", _SIZE, "white")
    pen = ImageDraw.Draw(image)
    right, top = (_ceiling(max(point[i] for points in curves.values() for point in points)) for i in (0, 1))
    place = _axes(pen, right, top, x_name, y_name, lambda y: f"{y:.2g}")
    taken: list[tuple[float, ...]] = []
    for (name, points), colour in zip(curves.items(), _LINES, strict=False):
        placed = [place(*point) for point in points]
        pen.line(placed, fill=colour, width=2)
        for x, y in placed:
            pen.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colour)
        _write(pen, name, placed[-1], colour, taken)
    return image


def front(points: Mapping[str, Point]) -> list[str]:
    """Names of the points that no other point beats in both cost and quality, cheapest first."""
    found: list[str] = []
    for name, (_, y) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if not found or y > points[found[-1]][1]:
            found.append(name)
    return found


def _axes(
    pen: ImageDraw.ImageDraw, right: float, top: float, x_name: str, y_name: str, label: Callable[[float], str]
) -> Place:
    """Draw a grid from 0 to (right, top) with tick and axis labels; returns the map from values to pixels."""
    font = ImageFont.load_default(size=13)

    def place(x: float, y: float) -> Point:
        across, down = _SIZE[0] - _LEFT - _RIGHT, _SIZE[1] - _ABOVE - _BELOW
        return _LEFT + across * x / right, _ABOVE + down * (1 - y / top)

    for i in range(6):
        x, y = right * i / 5, top * i / 5
        pen.line([place(x, 0), place(x, top)], fill=_GRID)
        pen.line([place(0, y), place(right, y)], fill=_GRID)
        pen.text(
            (place(x, 0)[0], place(x, 0)[1] + 8),
            f"{x:.2g}" if x < 100 else f"{x:.0f}",
            fill=_INK,
            font=font,
            anchor="mt",
        )
        pen.text((place(0, y)[0] - 8, place(0, y)[1]), label(y), fill=_INK, font=font, anchor="rm")
    pen.text(((_LEFT + _SIZE[0] - _RIGHT) / 2, _SIZE[1] - 6), x_name, fill=_INK, font=font, anchor="mb")
    pen.text((_LEFT + 6, _ABOVE - 3), y_name, fill=_INK, font=font, anchor="lt")
    return place


def _write(pen: ImageDraw.ImageDraw, name: str, at: Point, colour: object, taken: list[tuple[float, ...]]) -> None:
    """Write a name to the right of a point, below earlier names, and add it to `taken`."""
    font = ImageFont.load_default(size=13)
    x, y = at[0] + 10, at[1]
    right = x + font.getlength(name)
    while any(abs(y - below) < 15 and x < end and start < right for start, end, below in taken):
        y += 3
    taken.append((x, right, y))
    pen.text((x, y), name, fill=colour, font=font, anchor="lm")


def _ceiling(value: float) -> float:
    """The next round number that is at least `value`."""
    power = 10 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.5, 2, 3, 4, 5, 7.5, 10) if step * power >= value)
