"""InitNO: every object gets strong attention, and no two of them in one place."""

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
def initno_loss(maps: Maps, layout: Layout) -> Tensor:
    """Cross-attention response + self-attention conflict, per image [B]. It reads no boxes.

    Guo et al. 2024 ("InitNO"), eq. 4 and 5. Response: 1 - the maximum of an object's map, of the most neglected
    object. Conflict: sum min(S_i, S_j) / sum (S_i + S_j), the mean over pairs of objects, where S_i is the
    self-attention of the pixel with that maximum; as in its code, none while the response is above 0.5. Deviation:
    without its code's third term (the largest attention outside the largest piece), of which the paper says nothing.
    `minidiff.initno()` improves a start noise by it.
    """
    there = layout.weights > 0  # [B,O]
    pairs = (there[:, :, None] & there[:, None]).to(layout.weights.dtype).triu(diagonal=1)
    looking = grids({site: kept for site, kept in maps.items() if site.kind == "self"})
    losses = []
    for grid, found in object_maps({s: kept for s, kept in maps.items() if s.kind == "cross"}, layout).items():
        peaks = found.flatten(2).max(dim=2)
        response = torch.where(there, 1 - peaks.values, 0).amax(dim=1) if there.shape[1] else found.sum(dim=(1, 2, 3))
        rows = looking[grid].flatten(1, 2)  # [B,N,N]
        seen = rows.gather(1, peaks.indices[..., None].expand(-1, -1, rows.shape[2]))  # [B,O,N]
        seen = smoothed(seen.unflatten(2, grid), 0.5).flatten(2)
        both = torch.minimum(seen[:, :, None], seen[:, None]).sum(dim=3)
        either = (seen[:, :, None] + seen[:, None]).sum(dim=3).clamp_min(TINY)
        conflict = (pairs * both / either).sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp_min(1)
        losses.append(response + torch.where(response > 0.5, 0, conflict))
    return torch.stack(losses).mean(dim=0)
