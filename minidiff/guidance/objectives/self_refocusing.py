"""Attention refocusing: the self-attention loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ...networks.attention import HEAD_MEAN, Maps
from ...networks.sites import level, self_
from ..layout import Layout
from ._maps import TINY, grids
from ._objective import objective
from .refocusing import refocusing_loss


@objective(sites=self_ & level(1), keep=HEAD_MEAN, settings=refocusing_loss.settings)
def self_refocusing_loss(maps: Maps, layout: Layout) -> Tensor:
    """The attention of a mask's pixels to the pixels outside of it; mean over the mask.

    Phung, Ge and Huang 2024 ("Grounded text-to-image synthesis with attention refocusing"), self-attention refocusing
    (SAR), eq. 4. `refocusing_loss + self_refocusing_loss` is the paper's loss.
    """
    losses = []
    for grid, kept in grids(maps).items():  # [B,h,w,h*w]
        mask = layout.masks[grid].flatten(2)
        outside = ((mask @ kept.flatten(1, 2)) * (1 - mask)).sum(dim=2)
        losses.append(outside / mask.sum(dim=2).clamp_min(TINY))
    return torch.stack(losses).mean(dim=0)
