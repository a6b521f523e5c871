"""Extent: the centre, the size and the cover of an object's map. Not from a paper."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...networks.attention import HEAD_MEAN, Maps
from ...networks.sites import UP_1
from ..layout import Layout
from ._maps import TINY, centre_and_spread, grids, own_maps
from ._objective import OWN, objective

SPREAD = 0.62  # a map's spread relative to its object's box: maps peak in the middle (measured on the bundled model)
COVER = 0.4  # the least area of a map relative to its object's box, of pictures with one large object (measured there)


@objective(sites=UP_1, keep=HEAD_MEAN, settings=OWN)
def extent_loss(maps: Maps, layout: Layout) -> Tensor:
    """Difference in centre and size between an object's map and its mask, along both axes; and how little it covers.

    Centre and size follow Epstein et al. 2023 ("Diffusion self-guidance"), eq. 5 and 6, but the size is the standard
    deviation, which needs no threshold. Offsets are in units of the mask's width and height; sizes enter as the squared
    log of their ratio, which is 0 for a map SPREAD times as wide as the mask. Two small objects can be as widely spread
    as a large one: so the squared log of the map's area (the exponential of its entropy) over COVER of the mask's is
    added where that is below 1.

    Of an object that will be stretched to its box (`layout.stretched`) only the centre counts.
    """
    losses = []
    for grid, kept in grids(maps).items():
        own, mask = own_maps(kept, layout), layout.masks[grid]
        centre, spread = centre_and_spread(own)
        to, extent = centre_and_spread(mask)
        offset = (centre - to) / (math.sqrt(12) * extent)  # a uniform bar of length 1 has std 1 / sqrt(12)
        size = (spread / (SPREAD * extent)).log()
        least = (COVER * mask.sum(dim=(2, 3))).clamp_min(TINY).log()
        missing = (least - _entropy(own)).clamp_min(0)
        sized = size.square().sum(dim=2) + missing.square()
        losses.append(3 * offset.square().sum(dim=2) + sized.masked_fill(layout.stretched > 0, 0))
    return torch.stack(losses).mean(dim=0)


def _entropy(maps: Tensor) -> Tensor:
    """[B,O,h,w] >= 0 -> [B,O], the log of the number of cells if they were even."""
    share = maps / maps.sum(dim=(2, 3), keepdim=True).clamp_min(TINY)
    return -(share * share.clamp_min(TINY).log()).sum(dim=(2, 3))
