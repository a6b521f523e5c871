"""How likely an object is to come out in its box, from what guidance saw in its first steps.

The first look of a step tells what the network made of the updates before: where it pulls an object out of its box
again, the picture will too, while the last look tells only that updates work. Logistic regressions, fitted to pictures
of one model by its default guidance and by many others: what a map says of the finished picture is another thing in
every network, so other models have no numbers. `python -m bench placed` fits and tests them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor

LOOKS = slice(3, 8)
"""The guided steps whose first looks are read: all that there are of them."""
FRAIL = ("cross", "ring", "star")
"""Shapes with more outline than the others, which guidance turns into simpler ones: last words of phrases."""


@dataclass(frozen=True)
class Calibration:
    """The weights of `features` and of 1."""

    weights: tuple[float, ...]
    bias: float

    def __call__(self, mass: Tensor, mask: Tensor, names: Sequence[str]) -> Tensor:
        """Probabilities [O] of an IoU of at least 0.5 with the box; the others as in `features`.

        NaN for objects without a mask, and for all where none of LOOKS was guided.
        """
        if len(mass) <= LOOKS.start:
            return mask.new_full(mask.shape[:1], math.nan)
        found = (features(mass, mask, names) @ mask.new_tensor(self.weights) + self.bias).sigmoid()
        return found.masked_fill(mask.flatten(1).amax(dim=1) == 0, math.nan)


def features(mass: Tensor, mask: Tensor, names: Sequence[str]) -> Tensor:
    """[O,8], from each object's fraction of attention inside its mask, at the first look of each guided step [S,O], its
    mask [O,h,w] in [0,1] and its phrase: the mean log odds of the first, and the mean of all objects; the log of the
    mask's area, and how far its edges are below, above and their ratio beyond those that the model has seen in
    training; whether the phrase stands for other objects, too; whether it is of a frail shape.
    """
    inside = mass[LOOKS].to(mask).clamp(1e-6, 1 - 1e-3)
    area = mask.mean(dim=(1, 2)).clamp_min(1e-6)
    edges = torch.stack([mask.amax(dim=axis).sum(dim=1) / mask.shape[axis] for axis in (1, 2)], dim=1)  # [O,2]
    short, long = edges.amin(dim=1).clamp_min(1e-3), edges.amax(dim=1).clamp_min(1e-3)
    shared = mask.new_tensor([names.count(name) > 1 for name in names])
    unlike = [(0.22 - short).clamp_min(0), (long - 0.62).clamp_min(0), (long / short - 2).clamp_min(0)]
    frail = mask.new_tensor([(name.lower().split() or [""])[-1] in FRAIL for name in names])
    means = inside.logit().mean(dim=0), inside.nanmean().expand_as(area)
    return torch.stack([*means, area.log(), *unlike, shared, frail], dim=1)


Key: TypeAlias = tuple[str, tuple[str, ...], int | None, tuple[float, ...]]
OWN: Key = ("minidiff/shapes", ("inside_loss", "extent_loss"), 25, (0.2, 0.66, 2.2))
OTHER: Key = ("minidiff/shapes", (), None, ())
CALIBRATIONS: Mapping[Key, Calibration] = MappingProxyType(
    {
        OWN: Calibration((0.1635, 3.547, -0.0414, -6.016, -6.794, 0.6841, -2.215, -1.722), 0.0387),
        OTHER: Calibration((0.833, 1.357, -1.629, -43.27, -11.28, 0.441, -1.328, -0.726), -6.152),
    }
)
"""A model's name, the objective's terms, passes and usual sizes, as its default guidance has them -> its calibration;
without these that of all other guidance. Tested: bench/RESULTS.md.
"""
