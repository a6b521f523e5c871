"""DPM-Solver++(2M), Lu et al. 2022 (arXiv 2211.01095)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from minidiff.sampling.samplers._multistep import MultistepSampler
from minidiff.sampling.samplers._sampler import Ask, ConfigValues, Draw, first_order, predict
from minidiff.sampling.spacing import Schedule


@dataclass(frozen=True, kw_only=True)
class DPMpp2M(MultistepSampler):
    """Alg. 2, midpoint; first order in the first and last step."""

    name: ClassVar[str] = "dpmpp_2m"
    truncates_cosine: ClassVar[bool] = True
    settings: ClassVar[ConfigValues] = {
        **MultistepSampler.settings,
        "algorithm_type": ("dpmsolver++", "deis"),  # diffusers reads deis as dpmsolver++ and these types as midpoint
        "solver_order": (2,),
        "solver_type": ("midpoint", "bh1", "bh2", "logrho"),
        "lambda_min_clipped": (-math.inf,),
        "use_lu_lambdas": (False,),
    }
    zero_snr: ClassVar[float | None] = 2**-24

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
            x = first_order(x, target, start, end)
            before, last = start, clean
            yield x
