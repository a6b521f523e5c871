"""What stretches the objects of a run to their boxes: see stretch.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..networks.attention import HEAD_MEAN, Record
from ..networks.sites import UP_1
from .evaluate import Forward
from .guide import Guide, row_index, some_rows
from .layout import PlacedObject
from .stretch import extents, stretch_objects

if TYPE_CHECKING:
    from ..sampling.sample import Predicted, SamplerStep

SEEN = Record(UP_1, HEAD_MEAN, rows="all", stop=True)
"""What `extents` reads."""
ETA = 2.0
"""How fresh the noise is, relative to that of SDE-DPM-Solver++ (Lu et al. 2022): of a step's noise exp(-ETA h) stays, h
the step's change in log signal-to-noise."""


@dataclass(frozen=True, eq=False)
class Stretching:
    """The stretches of a run. The sampling loop calls `renew`, and `finished` has the last word on its steps.

    regions: each image's objects, in their layout's order; one at least is to be stretched. record: SEEN, its sites
    chosen. noise: draws [B,C,h,w]. decode: clean latents [n,4,h,w] -> pictures [n,3,H,W] in [0,1], on the CPU; encode:
    pictures in [-1,1] -> latents.
    """

    guide: Guide
    regions: Sequence[Sequence[PlacedObject]]
    forward: Forward
    record: Record
    noise: Callable[[], Tensor]
    decode: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], Tensor]

    @property
    def rows(self) -> list[int]:
        """The images with objects to be stretched. The others stay as they are, bit for bit."""
        return [i for i, some in enumerate(self.regions) if any(one.stretched for one in some)]

    @torch.no_grad()
    def renew(self, x: Tensor, abar: float, index: int, before: Predicted) -> Tensor:
        """x [B,4,h,w], variance-preserving -> the same; before guided steps with fresh noise, where `rows` says so."""
        last = self.guide.guidance.steps
        assert isinstance(last, int)  # of_run
        if index >= last:
            return x
        rows = self.rows
        own, clean, fresh = (some_rows(value.to(x), rows, len(x)) for value in (x, before.clean, self.noise()))
        level, sigma = math.sqrt(abar), math.sqrt((1 - abar) / abar)
        kept = (sigma / before.sigma) ** ETA
        new = level * (clean + kept * (own / level - clean) + math.sqrt(1 - kept**2) * sigma * fresh)
        return x.index_copy(0, row_index(rows, x.device), new)

    def finished(self, steps: Iterator[SamplerStep], number: int) -> Iterator[SamplerStep]:
        """The `number` steps of a run, the last one's latents and prediction with objects stretched."""
        yield from islice(steps, number - 1)  # a loop would keep the previous step's maps
        for last in steps:
            found, there = self._stretched(last.latents, last.index), row_index(self.rows, last.latents.device)
            latents, denoised = (one.index_copy(0, there, found) for one in (last.latents, last.denoised))
            yield replace(last, latents=latents, denoised=denoised)

    @torch.no_grad()
    def _stretched(self, x: Tensor, index: int) -> Tensor:
        """Those of clean latents [B,4,h,w] that have objects to be stretched, with these stretched, [n,4,h,w].

        As pictures, since latents lose details where they are made small; what does not change keeps its latents.
        """
        self.guide.turn_to(index)
        rows = self.rows
        looked = list(range(len(x))) if self.guide.whole_batch else rows
        zero = torch.zeros((), dtype=torch.float32, device=x.device)
        edits, t, context, layout, inputs = self.guide.read(zero, 1.0, looked, index)
        _, maps = self.forward(some_rows(x, looked, len(x)).to(context.dtype), t, context, self.record, edits, inputs)
        seen = extents(maps, layout).tolist()
        found = some_rows(x, rows, len(x)).clone()
        for i, row in enumerate(rows):
            if not found[i].isfinite().all():
                continue  # black, as the run will say
            picture = self.decode(found[i : i + 1])[0]
            moved = stretch_objects(picture, seen[looked.index(row)], self.regions[row])
            changed = (moved != picture).any(dim=0, keepdim=True).float()
            there = (F.adaptive_max_pool2d(changed, x.shape[2:]) > 0).to(x.device)
            if there.any():
                found[i] = torch.where(there, self.encode(2 * moved[None].clamp(0, 1) - 1)[0].to(x), found[i])
        return found
