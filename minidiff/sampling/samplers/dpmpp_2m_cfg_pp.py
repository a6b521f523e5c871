"""DPM-Solver++(2M) with CFG++, as ComfyUI's sample_dpmpp_2m_cfg_pp."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from minidiff.sampling.samplers._cfg_pp import halves
from minidiff.sampling.samplers._sampler import Ask, Draw, predict, signal
from minidiff.sampling.samplers.dpmpp_2m import DPMpp2M
from minidiff.sampling.spacing import Schedule


@dataclass(frozen=True, kw_only=True)
class DPMpp2MCFGpp(DPMpp2M):
    """To the guided clean latents with the unconditional noise, as of order 1, and a second-order term from this call's
    guided clean latents less the previous call's unconditional ones; the code of Chung et al. takes unconditional ones
    of both. First order in the first step and in one to 0.
    """

    name: ClassVar[str] = "dpmpp_2m_cfg_pp"
    cfg_pp: ClassVar[bool] = True

    def run(self, ask: Ask, x: Tensor, schedule: Schedule, fresh: Draw) -> Iterator[Tensor]:
        before, last, kind = 0.0, None, schedule.prediction_type  # the previous call's sigma and unconditional latents
        for call, (start, end) in enumerate(schedule.spans):
            x, output = ask(x, call)
            uncond, guided = halves(x, output)
            (clean, _), (plain, eps) = predict(x, guided, start, kind), predict(x, uncond, start, kind)
            target = clean + end * eps
            if last is not None and before > start > end > 0:
                ratio = math.log(before / start) / math.log(start / end)  # h_0 / h, in lambda = -log sigma
                target = target + (1 - end / start) / (2 * ratio) * (clean - last)
            x = signal(end) * target
            before, last = start, plain
            yield x
