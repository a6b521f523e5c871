"""SDE-DPM-Solver++(2M), Lu et al. 2022 (arXiv 2211.01095, app. A), with the exact weight of the slope."""

import math
from dataclasses import dataclass
from typing import ClassVar

from minidiff.sampling.samplers._sampler import ConfigValues
from minidiff.sampling.samplers.dpmpp_2m_sde import DPMpp2MSDE


@dataclass(frozen=True, kw_only=True)
class DPMpp2MSDEHeun(DPMpp2MSDE):
    """DPM++ 2M SDE, with the solver that k-diffusion and diffusers call "heun"."""

    name: ClassVar[str] = "dpmpp_2m_sde_heun"
    settings: ClassVar[ConfigValues] = {**DPMpp2MSDE.settings, "solver_type": ("heun",)}

    @staticmethod
    def _slope_weight(h: float) -> float:
        return 1 - (1 - math.exp(-2 * h)) / (2 * h)
