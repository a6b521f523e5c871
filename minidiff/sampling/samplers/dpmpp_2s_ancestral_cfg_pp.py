"""DPM-Solver++(2S) with fresh noise and CFG++, as ComfyUI's sample_dpmpp_2s_ancestral_cfg_pp with eta 1."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from minidiff.sampling.samplers._cfg_pp import renoised
from minidiff.sampling.samplers._sampler import Ask, Draw
from minidiff.sampling.samplers.dpmpp_2s_ancestral import DPMpp2SAncestral
from minidiff.sampling.spacing import Schedule


@dataclass(frozen=True, kw_only=True)
class DPMpp2SAncestralCFGpp(DPMpp2SAncestral):
    """Both calls of a step step from the guided clean latents and the first one's unconditional noise."""

    name: ClassVar[str] = "dpmpp_2s_ancestral_cfg_pp"
    cfg_pp: ClassVar[bool] = True

    def run(self, ask: Ask, x: Tensor, schedule: Schedule, fresh: Draw) -> Iterator[Tensor]:
        return super().run(renoised(ask, schedule), x, schedule, fresh)
