"""TraDiffusion: attention along a curve."""

from __future__ import annotations

import torch
from torch import Tensor

from ...networks.attention import COLUMNS, Maps
from ...networks.sites import MID_AND_UP_1
from ..layout import Layout
from ._maps import TINY, taken
from ._objective import objective


@objective(sites=MID_AND_UP_1, keep=COLUMNS)
def tradiffusion_loss(maps: Maps, layout: Layout) -> Tensor:
    """(1 - the mean of 1 / D)^2 + 10 (1 - 1 / the mean of D)^2 over an object's attention, D the distance to its place.

    Wu et al. 2024 ("TraDiffusion"), eq. 4 to 7: control and movement loss with its code's factor of 10; mean over sites
    and heads. Deviations: D is 1 + the distance in cells of the grid to the nearest cell that the place half covers (of
    its most covered one), where their code takes pixels at 512x512; an object's tokens are averaged before the loss.
    """
    losses = []
    for kept in maps.values():  # [B,H,h,w,O]
        grid = kept.shape[2], kept.shape[3]
        away = 1 + _distances(layout.masks[grid])[:, None]
        found = kept.movedim(4, 2) * (1 - taken(layout, grid))[:, None]  # [B,H,O,h,w]
        share = found / found.sum(dim=(3, 4), keepdim=True).clamp_min(TINY)
        near, far = (share / away).sum(dim=(3, 4)), (share * away).sum(dim=(3, 4))
        losses.append(((1 - near).square() + 10 * (1 - 1 / far.clamp_min(1)).square()).mean(dim=1))
    return torch.stack(losses).mean(dim=0)


def _distances(masks: Tensor) -> Tensor:
    """Masks [B,O,h,w] -> the distance of each cell to the nearest cell of the mask, in cells."""
    h, w = masks.shape[2:]
    at = torch.cartesian_prod(torch.arange(h, device=masks.device), torch.arange(w, device=masks.device)).to(masks)
    apart = torch.cdist(at, at)  # [N,N]
    there = masks >= 0.5 * masks.amax(dim=(2, 3), keepdim=True)
    return torch.where(there.flatten(2)[:, :, None], apart, torch.inf).amin(dim=3).unflatten(2, (h, w))
