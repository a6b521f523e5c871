"""Relation: one object beside, above or below another, or larger than it. Not from a paper."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...networks.attention import HEAD_MEAN, Maps
from ...networks.sites import UP_1
from ..layout import Layout
from ._maps import constants, moments
from ._objective import OWN, objective

APART = 0.4, 0.4, math.log(1.5)
"""How far x, y (fractions of the picture) and the log of the size of two maps are to differ."""


@objective(sites=UP_1, keep=HEAD_MEAN, reduce="sum", settings=OWN, needs_boxes=False)
def relation_loss(maps: Maps, layout: Layout) -> Tensor:
    """Squared hinge on the difference of two objects' centres or sizes, in units of APART; 0 without relations.

    An object's loss is the sum over the relations of which it is the first. Centre and size are those of its map, as in
    Epstein et al. 2023 ("Diffusion self-guidance"), eq. 5 and 6, but the size is the standard deviation, which needs no
    threshold. It reads no boxes. Positions come true far more often than sizes, and boxes planned from relations, which
    guidance gets that reads any, more often than either (bench/LOG.md).
    """
    losses = []
    for centre, spread in moments(maps, layout).values():
        found = torch.cat([centre, spread.log().mean(dim=2, keepdim=True)], dim=2)  # [B,O,3]
        wanted = layout.relations
        more = wanted * (found[:, :, None] - found[:, None]) / constants(found, *APART)
        losses.append((wanted.abs() * (1 - more).clamp_min(0).square()).sum(dim=(2, 3)))
    return torch.stack(losses).mean(dim=0)
