"""Extent: the centre and the size of an object's map. Not from a paper."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...networks.attention import HEAD_MEAN, Maps
from ...networks.sites import UP_1
from ..layout import Layout
from ._maps import centre_and_spread, moments
from ._objective import OWN, objective

SPREAD = 0.62  # a map's spread relative to its object's box: maps peak in the middle (measured on the bundled model)


@objective(sites=UP_1, keep=HEAD_MEAN, settings=OWN)
def extent_loss(maps: Maps, layout: Layout) -> Tensor:
    """Difference in centre and size between an object's map and its mask, along both axes.

    Centre and size follow Epstein et al. 2023 ("Diffusion self-guidance"), eq. 5 and 6, but the size is the standard
    deviation, which needs no threshold. Offsets are in units of the mask's width and height; sizes enter as the squared
    log of their ratio, which is 0 for a map SPREAD times as wide as the mask.
    """
    losses = []
    for grid, (centre, spread) in moments(maps, layout).items():
        to, extent = centre_and_spread(layout.masks[grid])
        offset = (centre - to) / (math.sqrt(12) * extent)  # a uniform bar of length 1 has std 1 / sqrt(12)
        size = (spread / (SPREAD * extent)).log()
        losses.append(3 * offset.square().sum(dim=2) + size.square().sum(dim=2))
    return torch.stack(losses).mean(dim=0)
