"""DPM-Solver-2, Lu et al. 2022 (arXiv 2206.00927), like k-diffusion's sample_dpm_2."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from minidiff.sampling.samplers._sampler import Ask, Draw, derivative
from minidiff.sampling.samplers._two_calls import TwoCallSampler
from minidiff.sampling.spacing import Schedule


@dataclass(frozen=True, kw_only=True)
class DPM2(TwoCallSampler):
    """Alg. 1 with r = 1/2: a step along the slope at its midpoint in log sigma. Karras timesteps are rounded."""

    name: ClassVar[str] = "dpm2"
    rounds: ClassVar[bool] = True

    def _middle(self, start: float, end: float) -> float:
        return math.sqrt(start * end)

    def run(self, ask: Ask, x: Tensor, schedule: Schedule, fresh: Draw) -> Iterator[Tensor]:
        kind, calls = schedule.prediction_type, iter(enumerate(schedule.spans))
        for call, (start, end) in calls:
            x, output = ask(x, call)
            slope = derivative(x, output, start, kind)
            if end > 0:
                middle, (call, (_, after)) = end, next(calls)
                half, output = ask(x + (middle - start) * slope, call)
                slope, end = derivative(half, output, middle, kind), after
            x = x + (end - start) * slope
            yield x
