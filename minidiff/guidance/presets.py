"""guidance="fast", "balanced", "best": ways to follow boxes that no other beats in both time and objects placed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..networks.attention import Edit


@dataclass(frozen=True)
class Preset:
    """Fields of a request; guidance None is the model's default."""

    guidance: str | None = None
    edits: tuple[Edit, ...] = ()


_MEASURED: Mapping[str, Mapping[str, Preset]] = MappingProxyType(
    {"minidiff/shapes": {"balanced": Preset(), "best": Preset()}}
)
_PUBLISHED: Mapping[str, Preset] = MappingProxyType({"balanced": Preset("layout"), "best": Preset("rnb")})


def preset(name: str, model: str) -> Preset:
    """What a preset stands for.

    The bundled model's are measured (bench/RESULTS.md, "The league"): DenseDiffusion, an edit without passes, and the
    default, which more passes or tries were not shown to better, so that it is "best", too. Those of other models
    are published, on Stable Diffusion: by LoCo's table 1 (Zhao et al. 2023), DenseDiffusion places 17.6 % of all
    objects in 11.5 s, layout guidance 22.1 % in 22.8 s and R&B 29.6 % in 34.3 s, where nothing at all places 10.1 %
    in 8.2 s; each other method there that is built here does worse in more time than one of these.
    """
    if name != "fast":
        return _MEASURED.get(model, _PUBLISHED)[name]
    from .edits import dense_diffusion  # all the edits, for those who ask for one

    return Preset("none", (dense_diffusion(),))
