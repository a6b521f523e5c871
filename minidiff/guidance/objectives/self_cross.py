"""Self-Cross guidance: no object's pixels look where another object is."""

from __future__ import annotations

import torch
from torch import Tensor

from ...networks.attention import HEAD_MEAN, Maps
from ...networks.sites import level
from ..layout import Layout
from ._maps import TINY, grids, object_maps, smoothed
from ._objective import objective
from .attend_and_excite import EXCITE


@objective(sites=level(1), keep=HEAD_MEAN, settings=EXCITE, needs_boxes=False)
def self_cross_loss(maps: Maps, layout: Layout) -> Tensor:
    """Overlap of an object's map with where the pixels of each other object look; mean over the others.

    Qiu et al. 2024 ("Self-Cross diffusion guidance for text-to-image synthesis of similar subjects"): the sum
    of min(S_j, A_i), where S_j is the mean of the self-attention of the pixels above Otsu's threshold of A_j,
    weighted by A_j. It reads no boxes, and is 0 for one object; against neglect add `attend_and_excite_loss`, as the
    paper does. Deviation: its code leaves the term out while any object's maximum is under 0.5.
    """
    several = layout.weights > 0
    pairs = (several[:, :, None] & several[:, None]).to(layout.weights.dtype)
    pairs = pairs - torch.diag_embed(pairs.diagonal(dim1=1, dim2=2))
    looking = grids({site: kept for site, kept in maps.items() if site.kind == "self"})
    losses = []
    for grid, found in object_maps({s: kept for s, kept in maps.items() if s.kind == "cross"}, layout).items():
        chosen = (found * above_otsu(found)).flatten(2)
        seen = smoothed((chosen @ looking[grid].flatten(1, 2)).unflatten(2, grid), 0.5)
        seen = seen / seen.sum(dim=(2, 3), keepdim=True).clamp_min(TINY)
        overlap = torch.minimum(found[:, :, None], seen[:, None]).sum(dim=(3, 4))  # [B,i,j]
        losses.append((pairs * overlap).sum(dim=2) / pairs.sum(dim=2).clamp_min(1))
    return torch.stack(losses).mean(dim=0)


def above_otsu(maps: Tensor) -> Tensor:
    """1 for the cells of the brighter class [B,O,h,w], where the two classes' means are furthest apart (Otsu 1979)."""
    flat = maps.detach().flatten(2)
    ranked = flat.sort(dim=2, descending=True).values
    count = torch.arange(1, ranked.shape[2] + 1, device=maps.device)
    above = ranked.cumsum(dim=2)
    below = above[..., -1:] - above
    apart = above / count - below / (ranked.shape[2] - count).clamp_min(1)
    variance = count * (ranked.shape[2] - count) * apart.square()  # between the classes, for each number above
    least = ranked.gather(2, variance.argmax(dim=2, keepdim=True))
    return (flat >= least).to(maps.dtype).unflatten(2, maps.shape[2:])
