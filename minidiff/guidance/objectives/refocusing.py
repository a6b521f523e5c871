"""Attention refocusing: the cross-attention loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ...networks.attention import HEAD_MEAN, Maps
from ...networks.sites import SECOND_COARSEST
from ..layout import Layout
from ._maps import object_maps
from ._objective import Settings, objective


@objective(
    sites=SECOND_COARSEST,
    keep=HEAD_MEAN,
    settings=Settings(
        scale=(3.0,) * 10 + (2.0,) * 10 + (1.0,) * 10,
        threshold=(0.1 / 3,) * 10 + (0.05,) * 10 + (0.1,) * 10,  # theirs applies to the scaled loss
        iterations=(5,) * 20 + (1,) * 10,
        steps=30,
        step_rule="plain",
    ),
)
def refocusing_loss(maps: Maps, layout: Layout) -> Tensor:
    """(1 - the maximum inside) + the maximum in each other box + half the maximum in the background.

    Phung, Ge and Huang 2024 ("Grounded text-to-image synthesis with attention refocusing"), cross-attention
    refocusing (CAR), eq. 3. Deviation: their code's case distinctions by the size of a value are omitted.
    """
    losses = []
    for grid, found in object_maps(maps, layout).items():
        mask = layout.masks[grid]
        others = mask[:, None] * (1 - mask)[:, :, None]  # [B,O,P,h,w]: in object P, but not in O
        elsewhere = (others * found[:, :, None]).amax(dim=(3, 4)).sum(dim=2)
        background = ((1 - mask.amax(dim=1, keepdim=True)) * found).amax(dim=(2, 3))
        losses.append(1 - (mask * found).amax(dim=(2, 3)) + elsewhere + 0.5 * background)
    return torch.stack(losses).mean(dim=0)
