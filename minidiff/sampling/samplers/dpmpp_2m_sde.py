"""SDE-DPM-Solver++(2M), Lu et al. 2022 (arXiv 2211.01095, app. A), as k-diffusion's sample_dpmpp_2m_sde."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from minidiff.sampling.samplers._multistep import MultistepSampler
from minidiff.sampling.samplers._sampler import Ask, ConfigValues, Draw, predict, sde_step
from minidiff.sampling.samplers.dpmpp_2m import DPMpp2M
from minidiff.sampling.spacing import Schedule


@dataclass(frozen=True, kw_only=True)
class DPMpp2MSDE(MultistepSampler):
    """Second order, midpoint; first order in the first and last step. Fresh noise in every step that ends above 0.

    k-diffusion and A1111 draw the noise from torchsde's tree, which has a seed of its own: other numbers of the same
    law.
    """

    name: ClassVar[str] = "dpmpp_2m_sde"
    draws: ClassVar[bool] = True
    truncates_cosine: ClassVar[bool] = True
    settings: ClassVar[ConfigValues] = {**DPMpp2M.settings, "algorithm_type": ("sde-dpmsolver++",)}
    zero_snr: ClassVar[float | None] = 2**-24

    @staticmethod
    def _slope_weight(h: float) -> float:
        """Of the slope of the clean latents in lambda, times h: half the first-order weight."""
        return (1 - math.exp(-2 * h)) / 2

    def run(self, ask: Ask, x: Tensor, schedule: Schedule, fresh: Draw) -> Iterator[Tensor]:
        before, last = 0.0, None  # the previous call's sigma and clean latents
        for call, (start, end) in enumerate(schedule.spans):
            x, output = ask(x, call)
            clean, _ = predict(x, output, start, schedule.prediction_type)
            bend = None
            if last is not None and call < len(schedule.spans) - 1 and before > start > end:
                h = math.log(start / end)
                bend = self._slope_weight(h) * h / math.log(before / start) * (clean - last)
            x = sde_step(x, clean, bend, start, end, fresh)
            before, last = start, clean
            yield x
