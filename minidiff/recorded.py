"""Attention maps of a whole run: kept over its steps, and read by phrase."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .networks.attention import Grid, Site

Maps: TypeAlias = "dict[Site, Tensor]"
Reduce: TypeAlias = "Callable[[Maps | None, Maps, int], Maps]"
"""How maps are kept over steps: (what is kept so far or None, the maps of step n, n) -> what is kept."""


def MEAN(kept: Maps | None, maps: Maps, n: int) -> Maps:
    """The mean over steps: one map per site, however long the run."""
    if kept is None:
        return maps
    return {site: kept[site] + (found - kept[site]) / (n + 1) for site, found in maps.items()}


def LAST(kept: Maps | None, maps: Maps, n: int) -> Maps:
    """The last step's: one map per site, however long the run."""
    return maps


def PER_STEP(kept: Maps | None, maps: Maps, n: int) -> Maps:
    """Every step's, [S,...]: grows with the run, so it is kept on the CPU."""
    new = {site: found.cpu()[None] for site, found in maps.items()}
    return new if kept is None else {site: torch.cat([kept[site], found]) for site, found in new.items()}


@dataclass(frozen=True, eq=False)
class Attention:
    """The maps of a run's images: `attention["ball"]` is [B,h,w], the probability that a pixel looks at the phrase.

    maps: {site: what was kept}, on the CPU, as the kind of keep and of reduction have it.
    find: (image, phrase) -> the positions of its tokens in that image's prompt.
    heads: True for maps of `ALL`, False for those of `HEAD_MEAN`; None for others, which no phrase can be read from.
    """

    maps: Maps
    images: int
    find: Callable[[int, str], tuple[int, ...]] = field(repr=False)
    heads: bool | None = None
    per_step: bool = False

    def __getitem__(self, phrase: str) -> Tensor:
        """[B,h,w], or [B,S,h,w] where each step is kept. ValueError where an image's prompt has not the phrase."""
        return torch.stack([self.of(image, phrase) for image in range(self.images)])

    def of(self, image: int, phrase: str, grid: Grid | None = None) -> Tensor:
        """One image's map of a phrase, [h,w] (or [S,h,w]): the mean over its tokens, heads, and the sites on `grid`.

        grid: (h, w); default: the finest that was recorded. Grids are not mixed.
        """
        tokens = list(self.find(image, phrase))
        found = self._by_grid(image)
        if grid is None:
            grid = max(found, key=lambda size: size[0] * size[1])
        if grid not in found:
            raise ValueError(
                f"no attention was recorded on a grid {grid}; expected one of {', '.join(map(str, found))}"
            )
        return torch.stack([kept[..., tokens].mean(dim=-1) for kept in found[grid]]).mean(dim=0)

    def _by_grid(self, image: int) -> dict[Grid, list[Tensor]]:
        """Head means [(S,)h,w,L] of an image."""
        steps = int(self.per_step)
        grids: dict[Grid, list[Tensor]] = {}
        for site, kept in self.maps.items():
            if self.heads is None or kept.ndim != 4 + steps + self.heads or kept.shape[steps] != self.images:
                raise ValueError(
                    f"the maps of {site} are {list(kept.shape)}; expected those of minidiff.ALL or minidiff.HEAD_MEAN "
                    "for one half of the batch, which say how much each pixel looks at each token. What was kept is in "
                    "attention.maps"
                )
            own = kept.select(steps, image)
            own = own.mean(dim=steps) if self.heads else own
            grids.setdefault((own.shape[-3], own.shape[-2]), []).append(own)
        return grids
