"""DPM-Solver++(2S), Lu et al. 2022 (arXiv 2211.01095), with fresh noise, as k-diffusion's sample_dpmpp_2s_ancestral."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from minidiff.sampling.samplers._sampler import Ask, Draw, cleaned
from minidiff.sampling.samplers._two_calls import TwoCallSampler
from minidiff.sampling.spacing import Schedule


@dataclass(frozen=True, kw_only=True)
class DPMpp2SAncestral(TwoCallSampler):
    """Alg. 1 with r = 1/2 to down = end^2 / start, then noise back up to end. Not in diffusers.

    The midpoint of start and down in log sigma is end itself.
    """

    name: ClassVar[str] = "dpmpp_2s_ancestral"
    draws: ClassVar[bool] = True

    def _middle(self, start: float, end: float) -> float:
        return end

    def run(self, ask: Ask, x: Tensor, schedule: Schedule, fresh: Draw) -> Iterator[Tensor]:
        kind, calls = schedule.prediction_type, iter(enumerate(schedule.spans))
        for call, (start, end) in calls:
            x, output = ask(x, call)
            clean, down = cleaned(x, output, start, kind), end**2 / start
            if end > 0:
                half, output = ask(clean + end / start * (x - clean), next(calls)[0])
                clean = cleaned(half, output, end, kind)
            x = clean + down / start * (x - clean)
            if end > 0:
                x = x + math.sqrt(end**2 - down**2) * fresh()
            yield x
