"""Inside: the log of the fraction of attention inside the mask. Not from a paper."""

from __future__ import annotations

import torch
from torch import Tensor

from ...networks.attention import BOX_MASS, Maps
from ...networks.sites import MID_AND_UP_1
from ..layout import Layout
from ._maps import own_shares
from ._objective import OWN, objective

LEAST = 1e-12  # lower bound of a fraction, before its logarithm


@objective(sites=MID_AND_UP_1, keep=BOX_MASS, settings=OWN)
def inside_loss(maps: Maps, layout: Layout) -> Tensor:
    """-log of the fraction of attention to an object's tokens inside its mask; mean over sites, heads and tokens.

    Not from a paper. Where almost no attention is inside (the model is sure of another place), the gradient of
    `layout_loss` is proportional to that fraction and vanishes; this one's does not.
    """
    shares = [share.clamp_min(LEAST) for share in own_shares(maps.values(), layout)]
    missed = torch.stack([-share.log().mean(dim=1) for share in shares]).mean(dim=0)  # [B,O,L]
    return (missed * layout.token_weights).sum(dim=2)
