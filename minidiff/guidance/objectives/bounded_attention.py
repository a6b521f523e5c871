"""Bounded Attention: an object's words and its pixels keep to its mask rather than to the background."""

from __future__ import annotations

import torch
from torch import Tensor

from ...networks.attention import HEAD_MEAN, Maps
from ...networks.sites import block, place
from ..layout import Layout
from ._maps import TINY
from ._objective import Settings, objective

CROSS, SELF = 1.5, 0.5


@objective(
    sites=place("mid") | block("up", 1),
    keep=HEAD_MEAN,
    settings=Settings(
        scale=tuple(15 - 10 * i / 15 for i in range(15)), threshold=0.2, iterations=5, steps=15, step_rule="plain"
    ),
)
def bounded_attention_loss(maps: Maps, layout: Layout) -> Tensor:
    """1.5 (1 - r)^2 of the cross-attention to an object's words and the end marker + 0.5 (1 - r)^2 of the
    self-attention to its mask, r = inside / (inside + n * background).

    Dahary et al. 2024 ("Be Yourself: Bounded attention for multi-subject text-to-image generation"). Sums over
    sites and pixels; the background is outside of all masks, n the number of objects. Attention inside other masks
    is left to the paper's mask, `minidiff.bounded_attention()`. Deviation: the mean over objects, not the sum.
    """
    words = layout.words
    ends = torch.cat([torch.zeros_like(words[:, :1]), words[:, :-1]], dim=1) * (1 - words)  # [B,L]: right behind them
    own = torch.maximum((layout.token_weights > 0).to(words), ends[:, None])
    count = (layout.weights > 0).sum(dim=1)[:, None]
    sums: dict[str, list[tuple[Tensor, Tensor]]] = {"cross": [], "self": []}
    for site, kept in maps.items():  # [B,h,w,L]
        mask = layout.masks[kept.shape[1], kept.shape[2]].flatten(2)
        to = kept.flatten(1, 2) @ (own if site.kind == "cross" else mask).mT  # [B,N,O]
        background = 1 - mask.amax(dim=1)
        sums[site.kind].append((torch.einsum("buo,bou->bo", to, mask), torch.einsum("buo,bu->bo", to, background)))
    losses = []
    for weight, some in ((CROSS, sums["cross"]), (SELF, sums["self"])):
        inside, outside = (torch.stack(each).sum(dim=0) for each in zip(*some, strict=True))
        losses.append(weight * (1 - inside / (inside + count * outside).clamp_min(TINY)).square())
    return losses[0] + losses[1]
