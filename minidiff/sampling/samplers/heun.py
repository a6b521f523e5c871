"""Heun's method on the probability flow ODE, Karras et al. 2022 (arXiv 2206.00364)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from minidiff.sampling.samplers._sampler import Ask, Draw, derivative
from minidiff.sampling.samplers._two_calls import TwoCallSampler
from minidiff.sampling.spacing import Schedule

if TYPE_CHECKING:
    from minidiff.sampling.schedule import NoiseSchedule


@dataclass(frozen=True, kw_only=True)
class Heun(TwoCallSampler):
    """Alg. 1: an Euler step, repeated with the mean of the slopes at both ends."""

    name: ClassVar[str] = "heun"

    def _middle(self, start: float, end: float) -> float:
        return end

    def _middle_time(self, noise: NoiseSchedule, middle: float, after: float | None) -> float:
        return super()._middle_time(noise, middle, after) if after is None else after

    def run(self, ask: Ask, x: Tensor, schedule: Schedule, fresh: Draw) -> Iterator[Tensor]:
        kind, calls = schedule.prediction_type, iter(enumerate(schedule.spans))
        for call, (start, end) in calls:
            x, output = ask(x, call)
            slope = derivative(x, output, start, kind)
            if end > 0:
                arrived, output = ask(x + (end - start) * slope, next(calls)[0])
                slope = (slope + derivative(arrived, output, end, kind)) / 2
            x = x + (end - start) * slope
            yield x
