"""Euler's method with fresh noise, Ho et al. 2020 (arXiv 2006.11239), as in k-diffusion."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from minidiff.sampling.samplers._sampler import Ask, ConfigValues, Draw, SigmaSampler, derivative
from minidiff.sampling.spacing import Schedule


@dataclass(frozen=True, kw_only=True)
class EulerAncestral(SigmaSampler):
    """Euler steps with DDPM's fresh noise in every step that does not end at sigma 0.

    diffusers has no Karras levels here and ignores use_karras_sigmas.
    """

    name: ClassVar[str] = "euler_ancestral"
    draws: ClassVar[bool] = True
    settings: ClassVar[ConfigValues] = {
        **{f"use_{levels}_sigmas": (False, True) for levels in ("karras", "exponential", "beta")},
    }
    zero_snr: ClassVar[float | None] = 2**-24

    def run(self, ask: Ask, x: Tensor, schedule: Schedule, fresh: Draw) -> Iterator[Tensor]:
        for call, (start, end) in enumerate(schedule.spans):
            x, output = ask(x, call)
            down = end**2 / start  # sqrt(end^2 - up^2) with up^2 = end^2 * (1 - end^2 / start^2)
            x = x + (down - start) * derivative(x, output, start, schedule.prediction_type)
            if end > 0:
                x = x + math.sqrt(end**2 - down**2) * fresh()
            yield x
