"""Inside: the logarithm of the share inside the mask. No paper's."""

from __future__ import annotations

import torch
from torch import Tensor

from ...networks.attention import BOX_MASS, Maps
from ...networks.sites import block, cross, place
from ..layout import Layout
from ._objective import OWN, objective

LEAST = 1e-12  # of a share, before its logarithm


@objective(sites=cross & (place("mid") | block("up", 1)), keep=BOX_MASS, settings=OWN)
def inside_loss(maps: Maps, layout: Layout) -> Tensor:
    """-log of the share of its tokens' attention that an object has inside its mask; mean over sites, heads, tokens.

    No paper's. Where next to nothing is inside (a model that is sure of another place), the slope of `layout_loss` is
    in proportion to that little, and guidance does not act; this one's is not.
    """
    missed = torch.stack([-mass.clamp_min(LEAST).log().mean(dim=1) for mass in maps.values()]).mean(dim=0)  # [B,O,L]
    return (missed * layout.token_weights).sum(dim=2)
