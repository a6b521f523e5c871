"""DPM-Solver++(2S) on the reverse SDE, like k-diffusion's sample_dpmpp_sde."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from minidiff.sampling.samplers._sampler import Ask, Draw, cleaned
from minidiff.sampling.samplers._two_calls import TwoCallSampler
from minidiff.sampling.spacing import Schedule


@dataclass(frozen=True, kw_only=True)
class DPMppSDE(TwoCallSampler):
    """r = 1/2, eta 1: an ancestral step to the midpoint in log sigma, and one to the end with the output from there.

    Both add noise from one Brownian motion in sigma. k-diffusion and diffusers draw it from torchsde's tree, which has
    its own seed; here the two increments of a step are drawn in turn: other numbers, the same distribution.
    """

    name: ClassVar[str] = "dpmpp_sde"
    draws: ClassVar[bool] = True

    def _middle(self, start: float, end: float) -> float:
        return math.sqrt(start * end)

    def run(self, ask: Ask, x: Tensor, schedule: Schedule, fresh: Draw) -> Iterator[Tensor]:
        kind, calls = schedule.prediction_type, iter(enumerate(schedule.spans))
        for call, (start, middle) in calls:
            x, output = ask(x, call)
            clean = cleaned(x, output, start, kind)
            if middle > 0:
                call, (_, end) = next(calls)
                walked = math.sqrt(start - middle) * fresh()  # W(start) - W(middle)
                half, output = ask(_ancestral(x, clean, start, middle, walked), call)
                walked = walked + math.sqrt(middle - end) * fresh()
                x = _ancestral(x, cleaned(half, output, middle, kind), start, end, walked)
            else:
                x = clean
            yield x


def _ancestral(x: Tensor, clean: Tensor, start: float, end: float, walked: Tensor) -> Tensor:
    """An Euler step to down = end^2 / start, then back up to end with the Brownian increment over the step."""
    down = end**2 / start
    up = math.sqrt(end**2 - down**2) / math.sqrt(start - end)
    return clean + down / start * (x - clean) + up * walked
