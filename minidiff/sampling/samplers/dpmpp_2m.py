"""DPM-Solver++, Lu et al. 2022 (arXiv 2211.01095)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from torch import Tensor

from minidiff.sampling.samplers._sampler import Ask, Draw, Sampler, Settings, predict, signal
from minidiff.sampling.spacing import Schedule, sigmas_at, spaced_timesteps, timesteps_at, training_karras, vp_schedule

if TYPE_CHECKING:
    from minidiff.sampling.schedule import Floats, NoiseSchedule


@dataclass(frozen=True, kw_only=True)
class DPMpp2M(Sampler):
    """DPM-Solver++ 2M, Alg. 2, midpoint; first order in the first and last step.

    Space "vp". karras: sigmas (eq. 5 of Karras et al. 2022) over the whole training range, timesteps rounded. A run of
    n steps is spaced as n + 1 points, and the lowest is dropped.
    """

    name: ClassVar[str] = "dpmpp_2m"
    settings: ClassVar[Settings] = {
        "algorithm_type": ("dpmsolver++", "deis"),  # diffusers reads deis as dpmsolver++ and these types as midpoint
        "solver_order": (2,),
        "solver_type": ("midpoint", "bh1", "bh2", "logrho"),
        "final_sigmas_type": ("zero",),
        "lambda_min_clipped": (-math.inf,),
        "use_lu_lambdas": (False,),
        "use_flow_sigmas": (False,),
        "use_exponential_sigmas": (False,),
        "use_beta_sigmas": (False,),
        "rescale_betas_zero_snr": (False,),
        "thresholding": (False,),
    }
    karras: bool = False

    def _schedule(self, noise: NoiseSchedule, steps: int, times: Floats | None, levels: Floats | None) -> Schedule:
        if levels is None and not self.karras:
            if times is None:
                times = spaced_timesteps(noise, steps, self._spacing(noise), drop_last=True)
            levels = np.append(sigmas_at(noise, times), 0.0)
        else:
            levels = training_karras(noise, steps) if levels is None else levels
            times = timesteps_at(noise, levels[:-1])
            # diffusers rounds, but truncates with cosine betas
            times = np.floor(times) if noise.beta_schedule == "squaredcos_cap_v2" else times.round()
        levels = levels.astype(np.float32).astype(np.float64)
        return vp_schedule(self.name, noise, times, levels[:-1], levels[1:])

    def run(self, ask: Ask, x: Tensor, schedule: Schedule, fresh: Draw) -> Iterator[Tensor]:
        before, last = 0.0, None  # the previous call's sigma and clean latents
        for call, (start, end) in enumerate(schedule.spans):
            x, output = ask(x, call)
            clean, _ = predict(x, output, start, schedule.prediction_type)
            target = clean
            # Two of 1000 linspace steps share a timestep: no line goes through both (diffusers' latents become NaN)
            if last is not None and call < len(schedule.spans) - 1 and before > start > end:
                ratio = math.log(before / start) / math.log(start / end)  # h_0 / h, in lambda = -log sigma
                target = clean + (clean - last) / (2 * ratio)
            # alpha' * (1 - exp(-h)) is alpha' * (1 - end / start)
            x = signal(end) / signal(start) * end / start * x + signal(end) * (1 - end / start) * target
            before, last = start, clean
            yield x
