"""How likely an object is in its box, by what the network sees in the finished picture.

A look is a pass of the network over the finished latents with the prompt, up to the site that `minidiff.look` reads by
default. Logistic regressions of what its map says are fitted to pictures of one model, by its default guidance and by
many others: what a map says of a picture is another thing in every network, so other models have no numbers, and take
no look. `python -m bench placed` fits and tests them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..networks.attention import HEAD_MEAN, Maps, Record
from ..networks.sites import Site
from ..vocabulary import BUNDLED
from .objectives._maps import TINY, bounding, own_maps

if TYPE_CHECKING:
    from ..model import Model
    from ..networks.unet import UNet
    from .guide import Guide
    from .layout import Layout
    from .report import Report

SEEN = Record(frozenset([Site("up", 1, 1, "cross")]), HEAD_MEAN, rows="all", stop=True)
"""What a look records. It takes 0.6 of a step."""
TIME = 250.0
"""The training timestep of the look. The latents get no noise, so that it is the same each time."""
SHARE = 0.3
"""An object is where its map has at least this share of its highest value: measured on the bundled model."""
FINER = 8
"""Boxes are compared on a grid so many times finer than that of the maps."""
FRAIL = ("cross", "ring", "star")
"""Shapes with more outline than the others, which guidance turns into simpler ones: last words of phrases."""


@dataclass(frozen=True)
class Calibration:
    """The weights of `features` and of 1."""

    weights: tuple[float, ...]
    bias: float

    def __call__(self, features: Tensor) -> Tensor:
        """Probabilities [O] of an IoU of at least 0.5 with the box; NaN where features are."""
        return (features @ features.new_tensor(self.weights) + self.bias).sigmoid()


@torch.no_grad()
def look(unet: UNet, latents: Tensor, guide: Guide, index: int) -> list[Tensor] | None:
    """The `features` [O,F] of each image, from its finished latents [B,4,h,w], with the edits that act in the last
    step, `index`. None where texts or masks changed.
    """
    if guide.each_step or guide.updated:
        return None
    t = torch.full((), TIME, dtype=torch.float32, device=guide.context.device)
    edits, t, context, layout, inputs = guide.read(t, 1.0, range(len(latents)), index)
    _, maps = unet(latents.to(context), t, context, SEEN, edits, inputs)
    return features(maps, layout, guide.names)


def features(maps: Maps, layout: Layout, names: Sequence[Sequence[str]]) -> list[Tensor]:
    """Of each image's objects, on the CPU, from head means [B,h,w,L]: the IoU of the box around what its map shows with
    that of its mask; the log of the map's highest value; whether the phrase stands for other objects, too; whether it
    is of a frail shape. NaN for objects without a mask.
    """
    (kept,) = maps.values()
    own, mask = own_maps(kept.float(), layout), layout.masks[kept.shape[1], kept.shape[2]].float()
    most = own.amax(dim=(2, 3))
    there = torch.cat([_finer(own) > SHARE * most[..., None, None], _finer(mask) > 0.5])
    seen, box = bounding(there).chunk(2)
    fits = (seen * box).sum(dim=(2, 3)) / torch.maximum(seen, box).sum(dim=(2, 3))
    fits = fits.masked_fill(mask.amax(dim=(2, 3)) == 0, torch.nan)
    found = []
    for (fit, high), some in zip(torch.stack([fits, most.clamp_min(TINY).log()], dim=1).cpu(), names, strict=True):
        shared = fit.new_tensor([some.count(name) > 1 for name in some])
        frail = fit.new_tensor([(name.lower().split() or [""])[-1] in FRAIL for name in some])
        found.append(torch.stack([fit[: len(some)], high[: len(some)], shared, frail], dim=1))
    return found


def _finer(maps: Tensor) -> Tensor:
    return F.interpolate(maps, scale_factor=FINER, mode="bilinear")


Key: TypeAlias = tuple[str, tuple[str, ...], int | None, tuple[float, ...]]
OWN: Key = (BUNDLED, ("inside_loss", "extent_loss"), 25, (0.2, 0.66, 2.2))
OTHER: Key = (BUNDLED, (), None, ())
CALIBRATIONS: Mapping[Key, Calibration] = MappingProxyType(
    {
        OWN: Calibration((6.3359, 1.7723, -1.4643, -1.4957), 1.2577),
        OTHER: Calibration((11.527, 1.1668, -0.4118, -0.213), -5.1209),
    }
)
"""A model's name, the objective's terms, passes and usual sizes, as its default guidance has them -> its calibration;
without these that of all other guidance. Tested: bench/RESULTS.md.
"""


def with_placed(
    reports: tuple[Report, ...], model: Model, latents: Tensor, guide: Guide, index: int
) -> tuple[Report, ...]:
    """The reports of a run's images with how likely their objects are placed, where that can be said: by a look at
    their finished latents [B,4,h,w]. index: of the run's last step.
    """
    how = guide.guidance
    sizes = () if how.usual_sizes is None else astuple(how.usual_sizes)
    key = model.name, tuple(term.name for term in how.objective.terms), how.passes, sizes
    found = CALIBRATIONS.get(key, CALIBRATIONS.get((model.name, (), None, ())))
    measured = found is not None and not model.adapters and any(report.steps for report in reports)
    seen = look(model.unet, latents, guide, index) if measured else None
    if found is None or seen is None:
        return reports
    return tuple(replace(report, placed=found(one)) for report, one in zip(reports, seen, strict=True))
