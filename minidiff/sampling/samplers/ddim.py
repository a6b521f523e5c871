"""DDIM, Song et al. 2021 (arXiv 2010.02502)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from torch import Tensor

from minidiff.checks import number
from minidiff.sampling.samplers._sampler import Ask, ConfigValues, Draw, Sampler, predict, signal
from minidiff.sampling.spacing import Schedule, final_sigma, levels_back, spaced_timesteps, timesteps_at, vp_schedule

if TYPE_CHECKING:
    from minidiff.sampling.schedule import Floats, NoiseSchedule


@dataclass(frozen=True, kw_only=True)
class DDIM(Sampler):
    """DDIM, eq. 12 and 16. eta 0 is deterministic, 1 has DDPM's variance.

    Space "vp". As in diffusers (unlike the paper), a step counts back T // steps timesteps for any spacing, so with
    linspace or trailing the level reached differs slightly from the next call's. Custom timesteps and sigmas, which
    diffusers' DDIM does not take, step exactly from one to the next.
    """

    name: ClassVar[str] = "ddim"
    usual_spacing: ClassVar[str] = "leading"
    settings: ClassVar[ConfigValues] = {"thresholding": (False,)}
    zero_snr: ClassVar[float | None] = 0.0
    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        expected = "a number from 0 (no fresh noise) to 1 (DDPM's)"
        object.__setattr__(self, "eta", number("eta", self.eta, 0, 1, expected))

    def _schedule(self, noise: NoiseSchedule, steps: int, times: Floats | None, levels: Floats | None) -> Schedule:
        if levels is not None:
            return vp_schedule(self.name, noise, timesteps_at(noise, levels[:-1]), levels[:-1], levels[1:], whole=False)
        known, final = noise.exact_sigmas(), final_sigma(noise, alpha_to_one=True)
        if times is not None:
            ends = np.append(known[times[1:].astype(int)], final)
        else:
            times = spaced_timesteps(noise, steps, self._spacing(noise))
            ends = levels_back(noise, times, steps, final)
        return vp_schedule(self.name, noise, times, known[times.astype(int)], ends)

    def run(self, ask: Ask, x: Tensor, schedule: Schedule, fresh: Draw) -> Iterator[Tensor]:
        for call, (start, end) in enumerate(schedule.spans):
            x, output = ask(x, call)
            clean, eps = predict(x, output, start, schedule.prediction_type)
            rest = 1 - signal(end) ** 2
            # eq. 16: eta * sqrt((1 - abar') / (1 - abar)) * sqrt(1 - abar / abar'), with abar' at the end of the step
            variance = self.eta**2 * rest * (1 + start**2) / start**2 * (1 - (1 + end**2) / (1 + start**2))
            x = signal(end) * clean + math.sqrt(max(rest - variance, 0.0)) * eps
            if variance > 0:
                x = x + math.sqrt(variance) * fresh()
            yield x
