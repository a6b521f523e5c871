"""WinWinLay: attention inside the mask, spread over it as a Gaussian is."""

from __future__ import annotations

import torch
from torch import Tensor

from ...networks.attention import COLUMNS, Maps
from ...networks.sites import cross, level
from ..layout import Layout
from ._maps import TINY, centre_and_spread, taken
from ._objective import Settings, objective

SPREAD = 0.35  # of the Gaussian, relative to the mask's width and height
NEAR = 0.5  # weight of the Gaussian; the paper's falls from 1 to 0 over the guided steps


@objective(
    sites=cross & (level(0) | level(1)),
    keep=COLUMNS,
    settings=Settings(scale=0.05, threshold=0.1, iterations=4, steps=10, step_rule="unit"),
)
def winwinlay_loss(maps: Maps, layout: Layout) -> Tensor:
    """(1 - the fraction inside the mask)^2 + 0.5 KL(map || Gaussian of the mask's centre and 0.35 of its edges); mean
    over sites and heads.

    Li et al. 2025 ("WinWinLay", arXiv 2506.15563), the non-local attention energy, against objects that gather at one
    side of their boxes. Deviations: the weight of the second term does not fall with the steps; "unit" steps stand for
    the paper's, whose size follows the norm of the prediction; an object's tokens are averaged before the loss.
    """
    losses = []
    for kept in maps.values():  # [B,H,h,w,O]
        grid = kept.shape[2], kept.shape[3]
        mask = layout.masks[grid]
        found = kept.movedim(4, 2) * (1 - taken(layout, grid))[:, None]  # [B,H,O,h,w]
        share = found / found.sum(dim=(3, 4), keepdim=True).clamp_min(TINY)
        inside = (share * mask[:, None]).sum(dim=(3, 4))
        wanted = gaussian(mask)[:, None]
        far = (share * (share.clamp_min(TINY).log() - wanted.log())).sum(dim=(3, 4))
        losses.append(((1 - inside).square() + NEAR * far).mean(dim=1))
    return torch.stack(losses).mean(dim=0)


def gaussian(masks: Tensor) -> Tensor:
    """A mask's Gaussian [B,O,h,w], which sums to 1 and is nowhere below TINY."""
    centre, spread = centre_and_spread(masks)  # a uniform bar of length 1 has a spread of 1 / sqrt(12)
    lines = []
    for axis, cells in ((0, masks.shape[3]), (1, masks.shape[2])):
        at = (torch.arange(cells, dtype=masks.dtype, device=masks.device) + 0.5) / cells
        away = (at - centre[..., axis, None]) / (SPREAD * 12**0.5 * spread[..., axis, None])
        lines.append((-0.5 * away.square()).exp())
    found = lines[1][..., :, None] * lines[0][..., None, :]
    return (found / found.sum(dim=(2, 3), keepdim=True).clamp_min(TINY)).clamp_min(TINY)
