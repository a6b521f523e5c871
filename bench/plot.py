"""A plot of named points (Pillow only)."""

import math
from collections.abc import Mapping

from PIL import Image, ImageDraw, ImageFont

_SIZE, _LEFT, _BELOW, _ABOVE, _RIGHT = (760, 460), 64, 48, 20, 150
_INK, _GRID, _POINT, _FRONT = "black", (225, 225, 225), (35, 75, 225), (220, 30, 35)


def scatter(points: Mapping[str, tuple[float, float]], x_name: str, y_name: str) -> Image.Image:
    """Points (cost, share in [0,1]); those that no other beats in both, joined by a line, are the Pareto front."""
    image = Image.new("RGB", _SIZE, "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=13)
    right = _ceiling(max(x for x, _ in points.values()))

    def place(x: float, y: float) -> tuple[float, float]:
        across, down = _SIZE[0] - _LEFT - _RIGHT, _SIZE[1] - _ABOVE - _BELOW
        return _LEFT + across * x / right, _ABOVE + down * (1 - y)

    for i in range(6):
        x, y = right * i / 5, i / 5
        pen.line([place(x, 0), place(x, 1)], fill=_GRID)
        pen.line([place(0, y), place(right, y)], fill=_GRID)
        pen.text((place(x, 0)[0], place(x, 0)[1] + 8), f"{x:.2g}", fill=_INK, font=font, anchor="mt")
        pen.text((place(0, y)[0] - 8, place(0, y)[1]), f"{y:.0%}", fill=_INK, font=font, anchor="rm")
    pen.text(((_LEFT + _SIZE[0] - _RIGHT) / 2, _SIZE[1] - 6), x_name, fill=_INK, font=font, anchor="mb")
    pen.text((_LEFT + 6, _ABOVE - 3), y_name, fill=_INK, font=font, anchor="lt")
    pen.line([place(*points[name]) for name in front(points)], fill=_FRONT, width=2)
    taken: list[float] = []
    for name, point in sorted(points.items(), key=lambda item: -item[1][1]):
        x, y = place(*point)
        pen.ellipse([x - 5, y - 5, x + 5, y + 5], fill=_FRONT if name in front(points) else _POINT)
        label = y
        while any(abs(label - other) < 15 for other in taken):  # names of neighbours stand below each other
            label += 3
        taken.append(label)
        pen.text((x + 10, label), name, fill=_INK, font=font, anchor="lm")
    return image


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the points with no other that is both cheaper and better, from the cheapest on."""
    found: list[str] = []
    for name, (_, y) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if not found or y > points[found[-1]][1]:
            found.append(name)
    return found


def _ceiling(value: float) -> float:
    """A round number that is no less."""
    power = 10 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.5, 2, 3, 4, 5, 7.5, 10) if step * power >= value)
