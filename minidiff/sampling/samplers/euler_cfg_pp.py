"""Euler's method with CFG++, Chung et al. 2024 (arXiv 2406.08070), as ComfyUI's sample_euler_cfg_pp."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from minidiff.sampling.samplers._cfg_pp import renoised
from minidiff.sampling.samplers._sampler import Ask, Draw
from minidiff.sampling.samplers.euler import Euler
from minidiff.sampling.spacing import Schedule


@dataclass(frozen=True, kw_only=True)
class EulerCFGpp(Euler):
    """To the guided clean latents, and from there along the unconditional slope."""

    name: ClassVar[str] = "euler_cfg_pp"
    cfg_pp: ClassVar[bool] = True

    def run(self, ask: Ask, x: Tensor, schedule: Schedule, fresh: Draw) -> Iterator[Tensor]:
        return super().run(renoised(ask, schedule), x, schedule, fresh)
