"""PNDM, Liu et al. 2022 (arXiv 2202.09778)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from minidiff.sampling.samplers._sampler import Ask, Draw, Sampler, predict, signal
from minidiff.sampling.spacing import Schedule, final_sigma, levels_back, spaced_timesteps, vp_schedule

if TYPE_CHECKING:
    from minidiff.sampling.schedule import Floats, NoiseSchedule


@dataclass(frozen=True, kw_only=True)
class PNDM(Sampler):
    """PNDM without its Runge-Kutta steps (PLMS), eq. 9 and 12: SD 1.5's default.

    Space "vp". n > 1 steps make n + 1 calls: after the first step, the network is called again at the new sample, and
    the step is repeated with the mean of both outputs. Two of diffusers' choices are kept: v outputs are combined
    directly and turned into eps once, at the sample stepped from; and formula (9) counts T // steps timesteps back (in
    the repeated call: up) for any spacing.
    """

    name: ClassVar[str] = "pndm"
    keeps_noise: ClassVar[bool] = True
    usual_spacing: ClassVar[str] = "leading"

    def _schedule(self, noise: NoiseSchedule, steps: int, times: Floats | None, levels: Floats | None) -> Schedule:
        if times is not None or levels is not None:
            raise ValueError("pndm takes no timesteps or sigmas, its formula needs even steps; use lms or dpmpp_2m")
        if not noise.skip_prk_steps:
            raise ValueError(
                "the scheduler config has skip_prk_steps false, which pndm does not implement; use ddim, lms or "
                "dpmpp_2m"
            )
        times = spaced_timesteps(noise, steps, self._spacing(noise))
        return self._of_calls(noise, times if steps == 1 else np.concatenate([times[:2], times[1:]]), steps)

    def rest(self, noise: NoiseSchedule, schedule: Schedule, skip: int) -> Schedule:
        """As in diffusers: the calls without the first `skip`, of which the second again repeats the first's step, now
        at the timestep after it. So the latents lag a step behind the timesteps, and keep a little noise.
        """
        return self._of_calls(noise, schedule.timesteps[skip:].numpy().astype(np.float64), schedule.steps)

    def _of_calls(self, noise: NoiseSchedule, times: Floats, steps: int) -> Schedule:
        """The Schedule of the calls at these timesteps, spaced for `steps` steps; the second repeats the first's."""
        known, ends = noise.exact_sigmas(), levels_back(noise, times, steps, final_sigma(noise, alpha_to_one=False))
        run = vp_schedule(self.name, noise, times, known[times.astype(int)], ends)
        if len(times) == 1:
            return run
        above = float(known[int(times[1]) + noise.num_train_timesteps // steps])
        return replace(run, spans=(run.spans[0], (above, float(run.sigmas[1])), *run.spans[2:]), steps=len(times) - 1)

    def run(self, ask: Ask, x: Tensor, schedule: Schedule, fresh: Draw) -> Iterator[Tensor]:
        spans, kind = schedule.spans, schedule.prediction_type
        x, output = ask(x, 0)
        outputs: tuple[Tensor, ...] = (output,)
        arrived = _moved(x, output, *spans[0], kind)
        if len(spans) == 1:
            yield arrived
            return
        there, second = ask(arrived, 1)
        x = x + (there - arrived)  # apply guidance's displacement here too
        x = _moved(x, (second + output) / 2, *spans[1], kind)
        yield x
        for call in range(2, len(spans)):
            x, output = ask(x, call)
            outputs = (*outputs[-3:], output)
            x = _moved(x, _adams_bashforth(outputs), *spans[call], kind)
            yield x


def _moved(x: Tensor, mixed: Tensor, start: float, end: float, prediction_type: str) -> Tensor:
    """Eq. 9, simplified: with x_ve = x / sqrt(abar) it is x_ve + (end - start) * eps."""
    eps = mixed if prediction_type == "epsilon" else predict(x, mixed, start, prediction_type)[1]
    return signal(end) / signal(start) * x + signal(end) * (end - start) * eps


def _adams_bashforth(outputs: tuple[Tensor, ...]) -> Tensor:
    """The weighted mean of the last 1 to 4 outputs, newest last: eq. 12 and its lower orders."""
    weights = ((1.0,), (-1 / 2, 3 / 2), (5 / 12, -16 / 12, 23 / 12), (-9 / 24, 37 / 24, -59 / 24, 55 / 24))
    mixed = torch.zeros_like(outputs[-1])
    for weight, output in zip(weights[len(outputs) - 1], outputs, strict=True):
        mixed = mixed + weight * output
    return mixed
