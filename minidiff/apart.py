"""Regions that are pictures of their own in a run's first steps, so that what their texts ask for lies inside them.

The windows of MultiDiffusion (Bar-Tal et al. 2023, arXiv 2302.08113), whose predictions are averaged: here the regions'
boxes. They do what its bootstrapping does with flat backgrounds, to keep objects of the first steps in their regions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .guidance.regions import Region, share_edits, shares
from .networks.attention import Edit, Inputs
from .networks.sites import Grid, Site
from .networks.unet import MASKED

_LEAST = 1e-6
"""The share from which a text counts: what rounding leaves to the prompt costs no pass."""
# x [N,C,h,w], context [N,L,D], edits, inputs -> the network's output [N,C,h,w]
Pass = Callable[[Tensor, Tensor, Sequence[Edit], Inputs], Tensor]


class Window(NamedTuple):
    """What one text sees: of image `image`, rows and columns of its latents; share: how much it counts there, [h,w].
    text: 0 for the prompt, then its regions."""

    image: int
    text: int
    rows: slice
    columns: slice
    share: Tensor


@dataclass(frozen=True, eq=False)
class Apart:
    """How a step takes the regions apart.

    steps: in how many, the first ones. areas: each image's regions. grid: of the latents. base_weight: the request's.
    length, own: positions in a context of the prompt and of each region behind it. hidden: a bias [B,1,1,1,L] that
    hides positions without a text, if there are any. sites: the cross-attention layers. multiple: of cells, an edge.
    """

    steps: int
    areas: Sequence[Sequence[Region]]
    grid: Grid
    base_weight: float
    length: int
    own: int
    hidden: Tensor | None
    sites: frozenset[Site]
    multiple: int
    windows: tuple[Window, ...] = field(init=False)

    def __post_init__(self) -> None:
        parts = shares(self.areas, self.grid, self.base_weight)
        parts = parts / parts.sum(dim=1, keepdim=True)
        parts = parts.where(parts > _LEAST, 0).float()
        found = [
            Window(image, text, *self._edges(part), part)
            for image, texts in enumerate(parts)
            for text, part in enumerate(texts)
            if part.any()
        ]
        windows = tuple(one._replace(share=one.share[one.rows, one.columns]) for one in found)
        object.__setattr__(self, "windows", windows)

    def _edges(self, part: Tensor) -> tuple[slice, slice]:
        """The smallest rectangle around a part's cells whose edges are multiples, and not thinner than two of them."""
        edges = []
        for total, inside in zip(part.shape, (part.any(dim=1), part.any(dim=0)), strict=True):
            cells = inside.nonzero().flatten()
            first, last = int(cells[0]), int(cells[-1]) + 1
            least = min(2 * self.multiple, total)
            first = min(first, total - least) // self.multiple * self.multiple
            last = max(last, first + least)
            edges.append(slice(first, min(-(-last // self.multiple) * self.multiple, total)))
        return edges[0], edges[1]

    def __call__(self, run: Pass, x: Tensor, context: Tensor, inputs: Inputs) -> Tensor:
        """The output [N,C,h,w] for latents x [B,C,h,w], where context [N,L,D] holds B rows, or [uncond, cond]."""
        batch, halves = len(x), len(context) // len(x)
        found = x.new_zeros(len(context), *x.shape[1:], dtype=torch.float32)
        sizes: dict[object, list[Window]] = defaultdict(list)
        for window in self.windows:
            sizes[window.share.shape, window.text == 0].append(window)
        for windows in sizes.values():
            every = [(window, half * batch + window.image) for half in range(halves) for window in windows]
            seen = torch.stack([x[one.image, :, one.rows, one.columns] for one, _ in every])
            texts = torch.stack([context[row, self._part(one)] for one, row in every])
            own, edits = dict[str, Tensor](), tuple[Edit, ...]()
            if MASKED in inputs:
                own[MASKED] = torch.stack([inputs[MASKED][one.image, :, one.rows, one.columns] for one, _ in every])
            if self.hidden is not None:
                own["unread"] = torch.stack([self.hidden[one.image, ..., self._part(one)] for one, _ in every])
                edits = tuple(replace(edit, rows="all") for edit in share_edits(self.sites, negative=False))
            for output, (one, row) in zip(run(seen, texts, edits, own), every, strict=True):
                found[row, :, one.rows, one.columns] += one.share.to(output.device) * output
        return found

    def _part(self, window: Window) -> slice:
        """Where a context has the window's text."""
        if window.text == 0:
            return slice(0, self.length)
        first = self.length + (window.text - 1) * self.own
        return slice(first, first + self.own)
