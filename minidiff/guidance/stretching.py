"""What stretches the objects of a run to their boxes while it is drawn: see stretch.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..networks.attention import HEAD_MEAN, Record
from ..networks.sites import UP_1
from .evaluate import Forward
from .guide import Guide, row_index, some_rows
from .layout import PlacedObject
from .stretch import Stretch, stretches

if TYPE_CHECKING:
    from ..sampling.sample import Predicted

SEEN = Record(UP_1, HEAD_MEAN, rows="all", stop=True)
"""What `stretches` reads."""
ETA = 2.0
"""How fresh the noise is, relative to that of SDE-DPM-Solver++ (Lu et al. 2022): of a step's noise exp(-ETA h) stays, h
the step's change in log signal-to-noise."""


@dataclass(frozen=True, eq=False)
class Stretching:
    """The stretches of a run. The sampling loop calls `renew`.

    regions: each image's objects, in their layout's order; one at least is to be stretched. record: SEEN, its sites
    chosen. noise: draws [B,C,h,w]. decode: clean latents [n,4,h,w] -> pictures [n,3,H,W] in [0,1]; encode: pictures in
    [-1,1] -> latents.
    """

    guide: Guide
    regions: Sequence[Sequence[PlacedObject]]
    forward: Forward
    record: Record
    noise: Callable[[], Tensor]
    decode: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def renew(self, x: Tensor, t: Tensor, abar: float, index: int, before: Predicted) -> Tensor:
        """x [B,4,h,w], variance-preserving -> the same with fresh noise in images with objects to be stretched; after
        the last guided step with these stretched. Other images stay as they are, bit for bit.
        """
        last = self.guide.guidance.steps
        assert isinstance(last, int)  # of_run
        if index > last:
            return x
        rows = [i for i, some in enumerate(self.regions) if any(one.stretched for one in some)]
        own, clean, fresh = (some_rows(value.to(x), rows, len(x)) for value in (x, before.clean, self.noise()))
        level, sigma = math.sqrt(abar), math.sqrt((1 - abar) / abar)
        if index == last:
            target = self._stretched(x, t, abar, index, rows, clean.cpu()).to(x)
            there = (target != clean).any(dim=1, keepdim=True)
            new = torch.where(there, level * (target + sigma * fresh), own)
        else:
            kept = (sigma / before.sigma) ** ETA
            new = level * (clean + kept * (own / level - clean) + math.sqrt(1 - kept**2) * sigma * fresh)
        return x.index_copy(0, row_index(rows, x.device), new)

    def _stretched(self, x: Tensor, t: Tensor, abar: float, index: int, rows: Sequence[int], clean: Tensor) -> Tensor:
        """The clean latents of some images, on the CPU, with their objects stretched."""
        self.guide.turn_to(index)
        looked = range(len(x)) if self.guide.whole_batch else rows
        edits, t, context, layout, inputs = self.guide.read(t, abar, looked, index)
        seen = some_rows(x, looked, len(x)).to(context.dtype)
        _, maps = self.forward(seen, t, context, self.record, edits, inputs)
        every = stretches(maps, layout, [self.regions[row] for row in looked])
        found = clean.clone()
        for i, row in enumerate(rows):
            todo = every[looked.index(row)]
            found[i] = self._shrunk(clean[i], [one for one in todo if one.shrinks])
            for one in todo:
                found[i] = found[i] if one.shrinks else one(found[i])
        return found

    def _shrunk(self, clean: Tensor, todo: Sequence[Stretch]) -> Tensor:
        """Latents [4,h,w] of a stretched picture: what becomes small has details that latents, made small, lose, while
        what becomes large stays smoother as latents.
        """
        if not todo:
            return clean
        picture = moved = self.decode(clean[None])[0]
        for stretch in todo:
            moved = stretch(moved)
        changed = (moved != picture).any(dim=0, keepdim=True).float()
        there = F.adaptive_max_pool2d(changed, clean.shape[1:]) > 0
        return torch.where(there, self.encode(2 * moved[None].clamp(0, 1) - 1)[0].to(clean), clean)
