"""Euler's method on the probability flow ODE, Karras et al. 2022 (arXiv 2206.00364)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from minidiff.sampling.samplers._sampler import Ask, ConfigValues, Draw, SigmaSampler, derivative
from minidiff.sampling.spacing import Schedule


@dataclass(frozen=True, kw_only=True)
class Euler(SigmaSampler):
    """Alg. 2 without churn and without Heun's correction. Timesteps may be fractions."""

    name: ClassVar[str] = "euler"
    settings: ClassVar[ConfigValues] = {
        "interpolation_type": ("linear",),
        "final_sigmas_type": ("zero",),
        "timestep_type": ("discrete",),
        "sigma_min": (),
        "sigma_max": (),
    }
    zero_snr: ClassVar[float | None] = 2**-24

    def run(self, ask: Ask, x: Tensor, schedule: Schedule, fresh: Draw) -> Iterator[Tensor]:
        for call, (start, end) in enumerate(schedule.spans):
            x, output = ask(x, call)
            x = x + (end - start) * derivative(x, output, start, schedule.prediction_type)
            yield x
