"""Choosing attention layers: `cross & (place("mid") | block("up", 1))`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from .attention import Grid, Place, Site

Test = Callable[[Site, Grid, int], bool]


@dataclass(frozen=True)
class Where:
    """Which sites: `test(site, (h, w), level)`, where level counts halvings of the grid up from the mid block's, its 0.

    Combine with `&`, `|` and `~`. Two are equal when their texts are.
    """

    text: str
    test: Test = field(compare=False, repr=False)

    def __and__(self, other: Where) -> Where:
        return Where(f"({self} & {other})", lambda *site: self.test(*site) and other.test(*site))

    def __or__(self, other: Where) -> Where:
        return Where(f"({self} | {other})", lambda *site: self.test(*site) or other.test(*site))

    def __invert__(self) -> Where:
        return Where(f"~{self}", lambda *site: not self.test(*site))

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Position:
    """Of a site in its UNet: its grid at the size in question, and its level (see `Where`)."""

    grid: Grid
    level: int


cross = Where("cross", lambda site, grid, level: site.kind == "cross")
"""Attention of the pixels to the text."""
self_ = Where("self_", lambda site, grid, level: site.kind == "self")
"""Attention of the pixels to each other."""


def place(*places: Place) -> Where:
    """In one of "down", "mid", "up"."""
    wrong = [name for name in places if name not in ("down", "mid", "up")]
    if wrong or not places:
        raise ValueError(f'place got {", ".join(map(repr, wrong)) or "nothing"}; expected "down", "mid" or "up"')
    return Where(f"place({', '.join(map(repr, places))})", lambda site, grid, level: site.place in places)


def block(name: Place, number: int) -> Where:
    """In one block: `block("up", 1)`, counted from 0 in the order in which they run."""
    where = place(name)
    return Where(f"block({name!r}, {number})", lambda *site: where.test(*site) and site[0].block == number)


def at_most(edge: int) -> Where:
    """Whose grid's longer edge has at most so many cells, at the size of the image in question."""
    return Where(f"at_most({edge})", lambda site, grid, level: max(grid) <= edge)


def level(number: int) -> Where:
    """Whose grid is so many doublings finer than the mid block's, at any size of the image.

    In SD 1.5 at 512 pixels `level(0)` is 8x8, `level(1)` 16x16.
    """
    return Where(f"level({number})", lambda site, grid, level: level == number)


def choose(where: Where | Iterable[Site], sites: Mapping[Site, Position]) -> frozenset[Site]:
    """The sites that `where` means, of those there are. ValueError, with a list of them, where it means none."""
    if not isinstance(where, Where):
        return frozenset(where)
    found = frozenset(site for site, at in sites.items() if where.test(site, at.grid, at.level))
    if not found:
        there = ", ".join(f"{site} ({at.grid[0]}x{at.grid[1]})" for site, at in sites.items())
        raise ValueError(f"no attention site is {where}; expected a choice of {there}")
    return found
