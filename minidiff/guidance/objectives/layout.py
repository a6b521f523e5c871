"""Layout guidance: attention to an object should lie inside its mask."""

from __future__ import annotations

import torch
from torch import Tensor

from ...networks.attention import BOX_MASS, Maps
from ...networks.sites import MID_AND_UP_1
from ..layout import Layout
from ._maps import own_shares
from ._objective import objective


@objective(sites=MID_AND_UP_1, keep=BOX_MASS)
def layout_loss(maps: Maps, layout: Layout) -> Tensor:
    """Squared fraction of attention to an object's tokens outside its mask; mean over sites, heads and tokens.

    Chen, Laina and Vedaldi 2024 ("Training-free layout control with cross-attention guidance"), eq. 4.
    """
    shares = own_shares(maps.values(), layout)
    missed = torch.stack([(1 - share).square().mean(dim=1) for share in shares]).mean(dim=0)  # [B,O,L]
    return (missed * layout.token_weights).sum(dim=2)
