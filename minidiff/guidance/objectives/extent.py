"""Extent: the centre and the size of an object's map. Not from a paper."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...networks.attention import HEAD_MEAN, Maps
from ...networks.sites import block, cross
from ..layout import Layout
from ._maps import TINY, grids
from ._objective import OWN, objective

SPREAD = 0.62  # a map's spread relative to its object's box: maps peak in the middle (measured on the bundled model)


@objective(sites=cross & block("up", 1), keep=HEAD_MEAN, settings=OWN)
def extent_loss(maps: Maps, layout: Layout) -> Tensor:
    """Difference in centre and size between an object's map and its mask, along both axes.

    Centre and size follow Epstein et al. 2023 ("Diffusion self-guidance"), eq. 5 and 6, but the size is the standard
    deviation, which needs no threshold. Offsets are in units of the mask's width and height; sizes enter as the squared
    log of their ratio, which is 0 for a map SPREAD times as wide as the mask.
    """
    losses = []
    for grid, kept in grids(maps).items():
        found = _centre_and_spread(torch.einsum("byxl,bol->boyx", kept, layout.token_weights))
        wanted = _centre_and_spread(layout.masks[grid])
        offset = (found[0] - wanted[0]) / (math.sqrt(12) * wanted[1])  # a uniform bar of length 1 has std 1 / sqrt(12)
        size = (found[1] / (SPREAD * wanted[1])).log()
        losses.append(3 * offset.square().sum(dim=2) + size.square().sum(dim=2))
    return torch.stack(losses).mean(dim=0)


def _centre_and_spread(maps: Tensor) -> tuple[Tensor, Tensor]:
    """[B,O,h,w] >= 0 -> centre and standard deviation along x and y, each [B,O,2], as fractions of the picture."""
    share = maps / maps.sum(dim=(2, 3), keepdim=True).clamp_min(TINY)
    centres, spreads = [], []
    for axis in (2, 3):  # summing over y leaves x
        line = share.sum(dim=axis)
        cells = line.shape[2]
        at = (torch.arange(cells, dtype=maps.dtype, device=maps.device) + 0.5) / cells
        centre = (line * at).sum(dim=2)
        # mass is spread uniformly within a cell, so that no map or mask has zero size
        within = 1 / (12 * cells**2)
        centres.append(centre)
        spreads.append(((line * (at - centre[..., None]).square()).sum(dim=2) + within).sqrt())
    return torch.stack(centres, dim=2), torch.stack(spreads, dim=2)
