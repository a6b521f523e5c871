"""Attention layers: their names, and how to choose among them: `cross & (place("mid") | block("up", 1))`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, cast

from ..checks import choice, shown, whole

Place = Literal["down", "mid", "up"]
Grid = tuple[int, int]
PLACES = ("down", "mid", "up")


@dataclass(frozen=True)
class Site:
    """One attention layer.

    `block` counts within its place and `layer` within its block, both from 0 in execution order.
    """

    place: Place
    block: int
    layer: int
    kind: Literal["cross", "self"]

    @classmethod
    def named(cls, name: str) -> Site:
        """The site with a name such as "up.1.0.cross"."""
        found = (
            re.fullmatch(r"(down|mid|up)\.(\d{1,4})\.(\d{1,4})\.(cross|self)", name) if isinstance(name, str) else None
        )
        if found is None:
            raise ValueError(f'site is {shown(name)}; expected a name such as "up.1.0.cross"')
        place, block, layer, kind = found.groups()
        return cls(cast("Place", place), int(block), int(layer), cast('Literal["cross", "self"]', kind))

    @property
    def name(self) -> str:
        """For example "up.1.0.cross"."""
        return f"{self.place}.{self.block}.{self.layer}.{self.kind}"

    @property
    def key(self) -> str:
        """The path of the module in the UNet and in its weight file."""
        block = "mid_block" if self.place == "mid" else f"{self.place}_blocks.{self.block}"
        return f"{block}.attentions.{self.layer}.transformer_blocks.0.attn{1 if self.kind == 'self' else 2}"

    def __str__(self) -> str:
        return self.name


Test = Callable[[Site, Grid, int], bool]


@dataclass(frozen=True)
class Where:
    """A choice of sites: `test(site, (h, w), level)`, where level counts doublings of the grid from the mid block's, 0.

    Combine with `&`, `|` and `~` (not with `and`, `or`, `not`, which Python does not let us define). Two choices are
    equal if their texts are.
    """

    text: str
    test: Test = field(compare=False, repr=False)

    def __and__(self, other: Where) -> Where:
        return Where(f"({self} & {_where(other)})", partial(_both, self.test, other.test))

    def __or__(self, other: Where) -> Where:
        return Where(f"({self} | {_where(other)})", partial(_either, self.test, other.test))

    def __invert__(self) -> Where:
        return Where(f"~{self}", partial(_not, self.test))

    def __bool__(self) -> bool:
        raise TypeError(f"a choice of sites is neither true nor false; combine with &, | and ~, as in ({self} & cross)")

    def __str__(self) -> str:
        return self.text


def _where(other: object) -> Where:
    if not isinstance(other, Where):
        raise TypeError(f'got {shown(other)}; expected another choice of sites, such as cross or place("up")')
    return other


# Module-level functions, so that a choice of sites can be pickled.


def _both(one: Test, other: Test, site: Site, grid: Grid, level: int) -> bool:
    return one(site, grid, level) and other(site, grid, level)


def _either(one: Test, other: Test, site: Site, grid: Grid, level: int) -> bool:
    return one(site, grid, level) or other(site, grid, level)


def _not(one: Test, site: Site, grid: Grid, level: int) -> bool:
    return not one(site, grid, level)


def _is_of_kind(kind: str, site: Site, grid: Grid, level: int) -> bool:
    return site.kind == kind


def _is_in(places: tuple[str, ...], number: int | None, site: Site, grid: Grid, level: int) -> bool:
    return site.place in places and number in (None, site.block)


def _is_at_most(edge: int, site: Site, grid: Grid, level: int) -> bool:
    return max(grid) <= edge


def _is_on(number: int, site: Site, grid: Grid, level: int) -> bool:
    return level == number


@dataclass(frozen=True)
class Position:
    """A site's grid at a given image size, and its level (see `Where`)."""

    grid: Grid
    level: int


cross = Where("cross", partial(_is_of_kind, "cross"))
"""Attention of the pixels to the text."""
self_ = Where("self_", partial(_is_of_kind, "self"))
"""Attention of the pixels to each other."""


def place(*places: Place) -> Where:
    """Sites in any of these places: "down", "mid", "up"."""
    if not places:
        raise ValueError('place is empty; expected some of "down", "mid", "up"')
    for name in places:
        choice("place", name, PLACES)
    return Where(f"place({', '.join(map(repr, places))})", partial(_is_in, places, None))


def block(name: Place, number: int) -> Where:
    """Sites in one block, such as `block("up", 1)`; blocks count from 0 in execution order."""
    choice("place", name, PLACES)
    return Where(f"block({name!r}, {number})", partial(_is_in, (name,), whole("block", number, 0)))


def at_most(edge: int) -> Where:
    """Sites whose grid has at most `edge` cells along its longer edge, at the given image size."""
    return Where(f"at_most({edge})", partial(_is_at_most, whole("edge", edge, 1)))


def level(number: int) -> Where:
    """Sites whose grid is `number` doublings finer than the mid block's, at any image size.

    In SD 1.5 at 512 pixels `level(0)` is 8x8, `level(1)` 16x16.
    """
    return Where(f"level({number})", partial(_is_on, whole("level", number, 0)))


_UP_1 = block("up", 1)
UP_1 = cross & _UP_1
MID_AND_UP_1 = cross & (place("mid") | _UP_1)
"""Where Chen, Laina and Vedaldi 2024 guide."""
SECOND_COARSEST = cross & level(1)
"""The cross-attention on the second-coarsest grid: 16x16 in SD 1.5 at 512 pixels."""


def read_sites(name: str, sites: object) -> Where | frozenset[Site]:
    """Read a caller's sites: a choice, a site, a name, or several. ValueError, with `name`, for anything else."""
    if isinstance(sites, Where):
        return sites
    several = (sites,) if isinstance(sites, str | Site) else sites
    found = tuple(several) if isinstance(several, Set | list | tuple) else ()
    if not found or not all(isinstance(one, str | Site) for one in found):
        raise ValueError(
            f"{name} is {shown(sites)}; expected a choice such as minidiff.cross & minidiff.at_most(16), or some sites"
        )
    return frozenset(Site.named(one) if isinstance(one, str) else one for one in found)


def choose(where: Where | Iterable[Site], sites: Mapping[Site, Position]) -> frozenset[Site]:
    """The sites that `where` selects. ValueError, which lists all sites, if it selects none."""
    if not isinstance(where, Where):
        return frozenset(where)
    found = frozenset(site for site, at in sites.items() if where.test(site, at.grid, at.level))
    if not found:
        there = ", ".join(f"{site} ({at.grid[0]}x{at.grid[1]})" for site, at in sites.items())
        raise ValueError(f"no attention site matches {where}; expected a choice from {there}")
    return found


def picture_name(adapter: int, number: int, grid: Grid | None = None) -> str:
    """The key in `inputs` of the pictures' tokens [B,T,D] for an IP-Adapter, or, with a grid, of their weight in each
    cell, [B or 1,h,w]. number: counts the pictures that the adapter reads separately.
    """
    return f"pictures.{adapter}.{number}{'' if grid is None else f'.{grid[0]}x{grid[1]}'}"
