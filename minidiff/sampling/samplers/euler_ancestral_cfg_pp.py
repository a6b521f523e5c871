"""Euler's method with fresh noise and CFG++, as ComfyUI's sample_euler_ancestral_cfg_pp with eta 1."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from minidiff.sampling.samplers._cfg_pp import renoised
from minidiff.sampling.samplers._sampler import Ask, Draw
from minidiff.sampling.samplers.euler_ancestral import EulerAncestral
from minidiff.sampling.spacing import Schedule


@dataclass(frozen=True, kw_only=True)
class EulerAncestralCFGpp(EulerAncestral):
    """As euler_cfg_pp, down to DDPM's level, then noise back up."""

    name: ClassVar[str] = "euler_ancestral_cfg_pp"
    cfg_pp: ClassVar[bool] = True

    def run(self, ask: Ask, x: Tensor, schedule: Schedule, fresh: Draw) -> Iterator[Tensor]:
        return super().run(renoised(ask, schedule), x, schedule, fresh)
