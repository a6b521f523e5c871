"""Trajectory consistency distillation, Zheng et al. 2024 (arXiv 2402.19159)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from torch import Tensor

from minidiff.checks import number
from minidiff.sampling.samplers._distilled import DistilledSampler
from minidiff.sampling.samplers._sampler import Ask, Draw, predict, signal
from minidiff.sampling.spacing import Schedule, vp_schedule

if TYPE_CHECKING:
    from minidiff.sampling.schedule import Floats, NoiseSchedule


@dataclass(frozen=True, kw_only=True)
class TCD(DistilledSampler):
    """Alg. 4, strategic stochastic sampling: DDIM's step down to (1 - eta) of the next timestep, then noise up to it.

    eta: the paper's gamma, 0 (diffusers' pipeline's default, no fresh noise) to 1; the authors advise 0.3.
    """

    name: ClassVar[str] = "tcd"
    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "eta", number("eta", self.eta, 0, 1))

    def _schedule(self, noise: NoiseSchedule, steps: int, times: Floats | None, levels: Floats | None) -> Schedule:
        if levels is not None:
            raise ValueError("tcd takes no sigmas, its eta is a share of the timestep; pass timesteps instead")
        times = self._times(noise, steps) if times is None else times
        known = noise.exact_sigmas()
        share = np.float32(1 - self.eta)  # in diffusers' precision, for the rounding down below
        lower = np.floor(share * np.append(times[1:], 0).astype(np.float32))
        return vp_schedule(self.name, noise, times, known[times.astype(int)], known[lower.astype(int)])

    def run(self, ask: Ask, x: Tensor, schedule: Schedule, fresh: Draw) -> Iterator[Tensor]:
        for call, (start, lower) in enumerate(schedule.spans):
            x, output = ask(x, call)
            clean, eps = predict(x, output, start, schedule.prediction_type)
            x = signal(lower) * clean + lower * signal(lower) * eps
            if self.eta > 0 and call + 1 < schedule.steps:
                kept = signal(float(schedule.sigmas[call + 1])) / signal(lower)
                x = kept * x + math.sqrt(max(1 - kept**2, 0.0)) * fresh()
            yield x
