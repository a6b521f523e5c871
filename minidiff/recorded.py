"""Attention maps of a whole run: combined over steps, and read by phrase."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from io import BytesIO
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .checks import number, shown, whole
from .draw import heatmaps

if TYPE_CHECKING:
    from .guidance.layout import Box
    from .networks.attention import Keep, Maps
    from .networks.sites import Grid, Site
    from .networks.text import Phrases

Reduce: TypeAlias = "Callable[[Maps | None, Maps, int], Maps]"
"""How to combine maps over steps: (the result so far or None, the maps of step n, n) -> the new result."""


def MEAN(kept: Maps | None, maps: Maps, n: int) -> Maps:
    """The mean over steps: one map per site."""
    if kept is None:
        return maps
    return {site: kept[site] + (found - kept[site]) / (n + 1) for site, found in maps.items()}


def LAST(kept: Maps | None, maps: Maps, n: int) -> Maps:
    """The last step only: one map per site."""
    return maps


def PER_STEP(kept: Maps | None, maps: Maps, n: int) -> Maps:
    """Every step, [S,...]: grows with the run, so it is kept on the CPU."""
    new = {site: found.cpu()[None] for site, found in maps.items()}
    return new if kept is None else {site: torch.cat([kept[site], found]) for site, found in new.items()}


class SiteMaps(dict["Site", Tensor]):
    """The maps kept per site, also by its name ("up.1.0.cross")."""

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or any(site.name == key for site in self)

    def __missing__(self, key: object) -> Tensor:
        named = {site.name: kept for site, kept in self.items()}
        if key in named:
            return named[str(key)]
        raise KeyError(f"{key} was not recorded; recorded sites: {', '.join(named) or 'nothing'}")


@dataclass(frozen=True, eq=False)
class Attention:
    """The maps of a run's images: `attention["ball"]` is [B,h,w], the probability that a pixel attends to the phrase.

    maps: what was kept per site, on the CPU, in the shape of its Keep and the reduction over steps.
    kinds: the Keep of each site. text, prompts: to find phrases in each image's prompt (the negative one if the
    unconditional rows were recorded); prompts is None if there was none. words: the positions of phrases that were
    asked for besides (see minidiff.look), which are read before the prompt's.
    """

    maps: SiteMaps
    kinds: Mapping[Site, Keep]
    images: int
    text: Phrases = field(repr=False)
    prompts: tuple[str, ...] | None = None
    per_step: bool = False
    words: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __getitem__(self, phrase: str) -> Tensor:
        """[B,h,w], or [B,S,h,w] if each step is kept. ValueError if an image's prompt lacks the phrase."""
        if self.prompts is not None and len(set(self.prompts)) > 1:
            for image in range(self.images):
                try:
                    self._tokens(image, phrase, None)
                except ValueError as error:
                    raise ValueError(
                        f"image {image}: {error} (use attention.of(image, phrase) for one image's map)"
                    ) from error
        return torch.stack([self.of(image, phrase) for image in range(self.images)])

    def of(self, image: int, phrase: str, grid: Grid | None = None, occurrence: int | None = None) -> Tensor:
        """One image's map of a phrase, [h,w] (or [S,h,w]): the mean over its tokens, heads, and the cross-attention
        sites on `grid`.

        grid: (h, w); default: the finest recorded. Grids are not mixed. occurrence: which one, if the prompt has the
        phrase several times (0 is the first); default: the mean over all.
        """
        tokens = list(self._tokens(image, phrase, occurrence))
        found = self._on_grid(image, "cross", grid)
        return torch.stack([kept[..., tokens].mean(dim=-1) for kept in found]).mean(dim=0)

    def mask(self, phrase: str, image: int = 0, grid: Grid | None = None, occurrence: int | None = None) -> Tensor:
        """Where the phrase's object is, 1, and is not, 0: [8h,8w] for maps [h,w] (see `of`), as `boxes` takes it.

        Otsu's threshold (1979) of the map, enlarged; of the mean over steps. Nothing asks whether it is there at all:
        `score` is about that.
        """
        enlarged = F.interpolate(
            self._mean(phrase, image, grid, occurrence)[None, None], scale_factor=8, mode="bicubic"
        )
        return (enlarged[0, 0] > _otsu(enlarged)).float()

    def box(self, phrase: str, image: int = 0, grid: Grid | None = None, occurrence: int | None = None) -> Box:
        """The box around the largest piece of `mask`: (x0, y0, x1, y1) in [0,1]."""
        mask = self.mask(phrase, image, grid, occurrence)
        rows, columns = _largest_piece(mask).nonzero(as_tuple=True)
        height, width = mask.shape
        left, top, right, bottom = columns.min() / width, rows.min() / height, columns.max() + 1, rows.max() + 1
        return float(left), float(top), float(right) / width, float(bottom) / height

    def score(self, phrase: str, image: int = 0, grid: Grid | None = None, occurrence: int | None = None) -> float:
        """How much of a phrase the picture holds, in [0,1]: above a half, it is what is seen most where it is seen.

        The mean of p / (p + r) over the twentieth of the picture with the largest p: p is the attention to the phrase,
        r that to whichever other word gets most there, of the prompt's and of `words`; 1 if there is no other.
        """
        own = self._mean(phrase, image, grid, occurrence)
        others = list(self._others(phrase, image, grid, occurrence))
        most = torch.stack(others).amax(dim=0) if others else torch.zeros_like(own)
        best = own.flatten().topk(max(1, own.numel() // 20)).indices
        return float((own / (own + most).clamp_min(1e-12)).flatten()[best].mean())

    def _others(self, phrase: str, image: int, grid: Grid | None, occurrence: int | None) -> Iterator[Tensor]:
        """[h,w] for each token of the prompt that is not the phrase's, and for each of the other `words`."""
        own = set(self._tokens(image, phrase, occurrence))
        places: Sequence[int] = ()
        if self.prompts is not None:
            places = self.text.read(self.prompts[image]).places
            with suppress(ValueError):  # not in the prompt, or lost by truncation
                own |= set(self.text.all_spans(self.prompts[image], phrase))
        for token in places:
            if token not in own:
                yield self._mean(f"tokens:{token}", image, grid, None)
        for word in self.words:
            if word != phrase:
                yield self._mean(word, image, grid, None)

    def _mean(self, phrase: str, image: int, grid: Grid | None, occurrence: int | None) -> Tensor:
        """[h,w], over steps too."""
        found = self.of(image, phrase, grid, occurrence).float()
        return found.mean(dim=0) if self.per_step else found

    def alone(self, image: int) -> Attention:
        """The maps of one image. Maps of other shapes, from a custom Keep, stay whole."""
        steps = int(self.per_step)
        own = {
            site: kept.narrow(steps, image, 1) if kept.ndim > steps and kept.shape[steps] == self.images else kept
            for site, kept in self.maps.items()
        }
        prompts = None if self.prompts is None else self.prompts[image : image + 1]
        return replace(self, maps=SiteMaps(own), images=1, prompts=prompts)

    def _repr_png_(self) -> bytes | None:
        """For a notebook: the first image's attention to each word of its prompt, on one scale. None without them."""
        words = re.findall(r"\w+(?:['-]\w+)*", self.prompts[0]) if self.prompts else []
        maps: dict[str, Tensor] = {}
        for word in words:
            with suppress(ValueError):  # beyond what the text encoder reads, or of another kind of attention
                heat = self.of(0, word)
                maps.setdefault(word, heat.mean(dim=0) if self.per_step else heat)
        if not maps:
            return None
        file = BytesIO()
        height, width = next(iter(maps.values())).shape
        heatmaps(Image.new("RGB", (width * 24, height * 24)), maps).save(file, format="PNG")
        return file.getvalue()

    def from_pixel(self, image: int, x: float, y: float, grid: Grid | None = None) -> Tensor:
        """What the pixel at (x, y) in [0,1] attends to, [h,w] (or [S,h,w]), summing to one: the mean over heads and the
        self-attention sites on `grid`.
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
        if phrase in self.words:
            return self.words[phrase]
        if self.prompts is None:
            raise ValueError(f'there is no prompt to find {shown(phrase)} in; expected e.g. "tokens:2,3"')
        prompt = self.prompts[image]
        if occurrence is None:
            return self.text.all_spans(prompt, phrase)
        return self.text.spans(prompt, phrase, whole("occurrence", occurrence, 0))

    def _on_grid(self, image: int, kind: str, grid: Grid | None) -> list[Tensor]:
        """Head means [(S,)h,w,L] of an image, for the sites of one kind on one grid."""
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
                    "minidiff.ALL or minidiff.HEAD_MEAN for one half of the batch, the attention of each pixel "
                    "to each token. The kept maps are in attention.maps"
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


def _otsu(values: Tensor) -> Tensor:
    """The threshold that parts values best: of the largest variance between the two sides."""
    levels = values.flatten().double().sort().values
    below = levels.cumsum(0)[:-1]
    n = torch.arange(1, len(levels), dtype=torch.float64)
    rest = len(levels) - n
    between = n * rest * (below / n - (levels.sum() - below) / rest) ** 2
    best = int(between.argmax())
    return (levels[best] + levels[best + 1]) / 2


def _largest_piece(mask: Tensor) -> Tensor:
    """The largest connected component (8 neighbours) of a mask [h,w] that is not empty everywhere."""
    inside = (mask > 0).long()
    labels = torch.arange(1, mask.numel() + 1).reshape(mask.shape) * inside
    while True:
        spread = labels
        for dim in (0, 1):  # whole runs of cells at once
            spread = _run_maximum(_run_maximum(spread, inside, dim).flip(dim), inside.flip(dim), dim).flip(dim)
        spread = F.max_pool2d(spread[None, None].double(), 3, 1, 1)[0, 0].long() * inside
        if torch.equal(spread, labels):
            return labels == labels[mask > 0].mode().values if mask.any() else torch.ones_like(mask)
        labels = spread


def _run_maximum(labels: Tensor, inside: Tensor, dim: int) -> Tensor:
    """The largest label so far in each run of cells that are inside, along a dimension."""
    before = (1 - inside).cumsum(dim) * (labels.numel() + 1)  # grows from run to run
    return ((labels + before).cummax(dim).values - before) * inside
