"""CONFORM: an object's words attend to the same place, other objects' words elsewhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...networks.attention import HEAD_MEAN, Maps
from ...networks.sites import SECOND_COARSEST
from ..layout import Layout
from ._maps import grids, smoothed
from ._objective import objective
from .attend_and_excite import EXCITE

TEMPERATURE = 0.5


@objective(sites=SECOND_COARSEST, keep=HEAD_MEAN, settings=EXCITE, needs_boxes=False)
def conform_loss(maps: Maps, layout: Layout) -> Tensor:
    """Contrast of the maps of an object's words, a noun and its modifiers, with those of other objects' words.

    Meral et al. 2024 ("CONFORM"): -log(e(a,p) / (e(a,p) + sum of e(a,n))) with e = exp(cosine / 0.5), mean over
    the words a and p of an object, n the words of others. It reads no boxes. Deviation: the paper also has the words'
    maps of the iteration before as p; here a word's own map stands for that one, so that one word is an object too.
    """
    owned = (layout.token_weights > 0).to(layout.weights.dtype)  # [B,O,L]
    placed = owned.amax(dim=1)
    alike = (owned.mT @ owned).clamp(max=1)  # [B,L,L]
    other = placed[:, :, None] * placed[:, None] * (1 - alike)
    losses = []
    for kept in grids(maps).values():
        sharp = F.pad((100 * kept[..., 1:]).softmax(dim=-1), (1, 0)).movedim(3, 1)  # [B,L,h,w]
        words = F.normalize(smoothed(sharp, 0.5).flatten(2), dim=2)
        near = ((words @ words.mT) / TEMPERATURE).exp()
        loss = (1 + (other * near).sum(dim=2, keepdim=True) / near).log()  # [B,a,p]
        losses.append(torch.einsum("boa,bap,bop->bo", owned, loss, owned) / owned.sum(dim=2).square().clamp_min(1))
    return torch.stack(losses).mean(dim=0)
