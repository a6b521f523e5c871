"""DPM-Solver-2 with fresh noise, like k-diffusion's sample_dpm_2_ancestral."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from minidiff.sampling.samplers._sampler import Ask, Draw, derivative
from minidiff.sampling.samplers._two_calls import TwoCallSampler
from minidiff.sampling.spacing import Schedule


@dataclass(frozen=True, kw_only=True)
class DPM2Ancestral(TwoCallSampler):
    """DPM2's step to down = end^2 / start, then noise back up to end. The midpoint of start and down in log sigma is
    end itself. Karras timesteps are rounded.
    """

    name: ClassVar[str] = "dpm2_ancestral"
    draws: ClassVar[bool] = True
    rounds: ClassVar[bool] = True

    def _middle(self, start: float, end: float) -> float:
        return end

    def run(self, ask: Ask, x: Tensor, schedule: Schedule, fresh: Draw) -> Iterator[Tensor]:
        kind, calls = schedule.prediction_type, iter(enumerate(schedule.spans))
        for call, (start, end) in calls:
            x, output = ask(x, call)
            slope, down = derivative(x, output, start, kind), end**2 / start
            if end > 0:
                half, output = ask(x + (end - start) * slope, next(calls)[0])
                slope = derivative(half, output, end, kind)
            x = x + (down - start) * slope
            if end > 0:
                x = x + math.sqrt(end**2 - down**2) * fresh()
            yield x
