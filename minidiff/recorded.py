"""Attention maps of a whole run: kept over its steps, and read by phrase."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from .checks import number, shown, whole

if TYPE_CHECKING:
    from .networks.attention import Keep, Maps
    from .networks.sites import Grid, Site
    from .networks.text import Phrases

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


class SiteMaps(dict["Site", Tensor]):
    """What was kept of each site; a site's name ("up.1.0.cross") finds it too."""

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or any(site.name == key for site in self)

    def __missing__(self, key: object) -> Tensor:
        named = {site.name: kept for site, kept in self.items()}
        if key in named:
            return named[str(key)]
        raise KeyError(f"{key} was not recorded; what was: {', '.join(named) or 'nothing'}")


@dataclass(frozen=True, eq=False)
class Attention:
    """The maps of a run's images: `attention["ball"]` is [B,h,w], the probability that a pixel looks at the phrase.

    maps: what was kept of each site, on the CPU, as its kind of keep and the reduction over steps have it.
    kinds: the kind of keep of each site. text, prompts: how to find a phrase in the prompt of each image (the negative
    one where the unconditional rows were recorded); prompts None where there was none.
    """

    maps: SiteMaps
    kinds: Mapping[Site, Keep]
    images: int
    text: Phrases = field(repr=False)
    prompts: tuple[str, ...] | None = None
    per_step: bool = False

    def __getitem__(self, phrase: str) -> Tensor:
        """[B,h,w], or [B,S,h,w] where each step is kept. ValueError where an image's prompt has not the phrase."""
        if self.prompts is not None and len(set(self.prompts)) > 1:
            for image in range(self.images):
                try:
                    self._tokens(image, phrase, None)
                except ValueError as error:
                    raise ValueError(
                        f"image {image}: {error} (one image's map is attention.of(image, phrase))"
                    ) from error
        return torch.stack([self.of(image, phrase) for image in range(self.images)])

    def of(self, image: int, phrase: str, grid: Grid | None = None, occurrence: int | None = None) -> Tensor:
        """One image's map of a phrase, [h,w] (or [S,h,w]): the mean over its tokens, heads, and the cross-attention
        sites on `grid`.

        grid: (h, w); default: the finest that was recorded. Grids are not mixed. occurrence: which, where the prompt
        has the phrase several times (0 is the first); default: the mean over all of them.
        """
        tokens = list(self._tokens(image, phrase, occurrence))
        found = self._on_grid(image, "cross", grid)
        return torch.stack([kept[..., tokens].mean(dim=-1) for kept in found]).mean(dim=0)

    def alone(self, image: int) -> Attention:
        """The maps of one image. What a recorder of one's own kept in another shape stays whole."""
        steps = int(self.per_step)
        own = {
            site: kept.narrow(steps, image, 1) if kept.ndim > steps and kept.shape[steps] == self.images else kept
            for site, kept in self.maps.items()
        }
        prompts = None if self.prompts is None else self.prompts[image : image + 1]
        return replace(self, maps=SiteMaps(own), images=1, prompts=prompts)

    def from_pixel(self, image: int, x: float, y: float, grid: Grid | None = None) -> Tensor:
        """Where the pixel at (x, y) in [0,1] looks in the picture, [h,w] (or [S,h,w]): the mean over heads and the
        self-attention sites on `grid`; it sums to one.
        """
        x, y, image = number("x", x, 0, 1), number("y", y, 0, 1), whole("image", image, 0, self.images - 1)
        maps = []
        for kept in self._on_grid(image, "self", grid):
            height, width = kept.shape[-3:-1]
            row, column = min(int(y * height), height - 1), min(int(x * width), width - 1)
            maps.append(kept[..., row, column, :].unflatten(-1, (height, width)))
        return torch.stack(maps).mean(dim=0)

    def _tokens(self, image: int, phrase: str, occurrence: int | None) -> tuple[int, ...]:
        whole("image", image, 0, self.images - 1)
        named = re.fullmatch(r"tokens:(\d{1,9}(?:,\d{1,9})*)", phrase) if isinstance(phrase, str) else None
        if named is not None:
            return tuple(whole("tokens", int(token), 0, self.text.length - 1) for token in named[1].split(","))
        if self.prompts is None:
            raise ValueError(f'there is no prompt to find {shown(phrase)} in; expected positions such as "tokens:2,3"')
        prompt = self.prompts[image]
        if occurrence is None:
            return self.text.all_spans(prompt, phrase)
        return self.text.spans(prompt, phrase, whole("occurrence", occurrence, 0))

    def _on_grid(self, image: int, kind: str, grid: Grid | None) -> list[Tensor]:
        """Head means [(S,)h,w,L] of an image, of one kind of site, all on one grid."""
        steps = int(self.per_step)
        grids: dict[Grid, list[Tensor]] = {}
        sites = [site for site in self.maps if site.kind == kind]
        if not sites:
            there = ", ".join(map(str, self.maps))
            mend = "attention.from_pixel reads self-attention" if kind == "cross" else "record minidiff.self_"
            raise ValueError(f"no {kind}-attention was recorded, only {there}; {mend}")
        for site in sites:
            kept, heads = self.maps[site], self.kinds[site].heads
            if heads is None or kept.ndim != 4 + steps + heads or kept.shape[steps] != self.images:
                raise ValueError(
                    f"the maps of {site} are {list(kept.shape)}, kept as {self.kinds[site]}; expected those of "
                    "minidiff.ALL or minidiff.HEAD_MEAN for one half of the batch, which say how much each pixel looks "
                    "at each token. What was kept is in attention.maps"
                )
            own = kept.select(steps, image)
            own = own.mean(dim=steps) if heads else own
            grids.setdefault((own.shape[-3], own.shape[-2]), []).append(own)
        chosen = max(grids, key=lambda size: size[0] * size[1]) if grid is None else grid
        if not isinstance(chosen, tuple | list) or tuple(chosen) not in grids:
            raise ValueError(
                f"no {kind}-attention was recorded on a grid {shown(grid)}; expected one of "
                f"{', '.join(map(str, grids))}"
            )
        return grids[chosen[0], chosen[1]]
