"""DPM-Solver++(2S), Lu et al. 2022 (arXiv 2211.01095), as diffusers' DPMSolverSinglestepScheduler."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from minidiff.sampling.samplers._multistep import MultistepSampler
from minidiff.sampling.samplers._sampler import Ask, ConfigValues, Draw, first_order, predict
from minidiff.sampling.samplers.dpmpp_2m import DPMpp2M
from minidiff.sampling.spacing import Schedule

if TYPE_CHECKING:
    from minidiff.sampling.schedule import NoiseSchedule


@dataclass(frozen=True, kw_only=True)
class DPMpp2S(MultistepSampler):
    """Alg. 1: two calls a step of the algorithm; but as in diffusers each call counts as a step of the run.

    Every second one is taken again from where the one before began. The last one to 0 is of first order. The spacing
    of the model's config is ignored: linspace unless asked otherwise.
    """

    name: ClassVar[str] = "dpmpp_2s"
    keeps_noise: ClassVar[bool] = True
    settings: ClassVar[ConfigValues] = {
        **MultistepSampler.settings,
        **{key: DPMpp2M.settings[key] for key in ("algorithm_type", "solver_order", "solver_type")},
        "lambda_min_clipped": (-math.inf,),
    }

    def _spacing(self, noise: NoiseSchedule) -> str:
        return self.spacing or self.usual_spacing

    def run(self, ask: Ask, x: Tensor, schedule: Schedule, fresh: Draw) -> Iterator[Tensor]:
        begun, origin, first = 0.0, x, x  # sigma, x and clean latents where the pair of calls began
        for call, (start, end) in enumerate(schedule.spans):
            there, output = ask(x, call)
            clean, _ = predict(there, output, start, schedule.prediction_type)
            if (call + len(schedule.before)) % 2 == 1 and begun > start > end > 0:
                ratio = math.log(begun / start) / math.log(begun / end)
                origin = origin + (there - x)  # what guidance moved there it moves here too
                x = first_order(origin, first + (clean - first) / (2 * ratio), begun, end)
            else:
                begun, origin, first = start, there, clean
                x = first_order(there, clean, start, end)
            yield x
