"""DDIM with CFG++, Chung et al. 2024 (arXiv 2406.08070), alg. 2."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from minidiff.sampling.samplers._cfg_pp import renoised
from minidiff.sampling.samplers._sampler import Ask, Draw
from minidiff.sampling.samplers.ddim import DDIM
from minidiff.sampling.spacing import Schedule


@dataclass(frozen=True, kw_only=True)
class DDIMCFGpp(DDIM):
    """A1111's "DDIM CFG++", whose CFG scale is divided by 12.5 first."""

    name: ClassVar[str] = "ddim_cfg_pp"
    cfg_pp: ClassVar[bool] = True

    def run(self, ask: Ask, x: Tensor, schedule: Schedule, fresh: Draw) -> Iterator[Tensor]:
        return super().run(renoised(ask, schedule), x, schedule, fresh)
