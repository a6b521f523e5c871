"""DDPM, Ho et al. 2020 (arXiv 2006.11239)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from minidiff.sampling.samplers._sampler import Ask, ConfigValues, Draw, Sampler, predict, signal
from minidiff.sampling.spacing import Schedule, exact_schedule, spaced_timesteps

if TYPE_CHECKING:
    from minidiff.sampling.schedule import Floats, NoiseSchedule


@dataclass(frozen=True, kw_only=True)
class DDPM(Sampler):
    """The posterior of eq. 6 and 7, with its own variance, between the timesteps of the run. Space "vp".

    Equal to DDIM with eta 1 and exact steps.
    """

    name: ClassVar[str] = "ddpm"
    draws: ClassVar[bool] = True
    usual_spacing: ClassVar[str] = "leading"
    settings: ClassVar[ConfigValues] = {
        "variance_type": ("fixed_small", "fixed_small_log"),
        "thresholding": (False,),
    }
    zero_snr: ClassVar[float | None] = 0.0

    def _schedule(self, noise: NoiseSchedule, steps: int, times: Floats | None, levels: Floats | None) -> Schedule:
        if times is None and levels is None:
            times = spaced_timesteps(noise, steps, self._spacing(noise))
        return exact_schedule(self.name, noise, times, levels)

    def run(self, ask: Ask, x: Tensor, schedule: Schedule, fresh: Draw) -> Iterator[Tensor]:
        for call, (start, end) in enumerate(schedule.spans):
            x, output = ask(x, call)
            clean, _ = predict(x, output, start, schedule.prediction_type)
            spread, rest = (start * signal(start)) ** 2, (end * signal(end)) ** 2  # 1 - abar at both ends
            alpha = (signal(start) / signal(end)) ** 2
            x = signal(end) * (1 - alpha) / spread * clean + math.sqrt(alpha) * rest / spread * x
            if end > 0:
                x = x + math.sqrt(rest / spread * (1 - alpha)) * fresh()
            yield x
