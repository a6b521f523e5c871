"""R&B: region and boundary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...networks.attention import HEAD_MEAN, Maps
from ...networks.sites import cross, level
from ..layout import Layout
from ._maps import TINY, bounding, grids, mean_under, own_maps, ratio, steepness
from ._objective import Settings, objective


@objective(
    sites=cross & (level(0) | level(1)),
    keep=HEAD_MEAN,
    settings=Settings(scale=70.0, threshold=0.0, iterations=5, steps=10, step_rule="plain"),
)
def rnb_loss(maps: Maps, layout: Layout) -> Tensor:
    """Aligns the bounding box of bright attention with the object's box. Xiao et al. 2024 ("R&B"), eq. 4 to 9.

    A straight-through estimator carries the gradient past the thresholded box, so it is not the derivative of the
    value. Deviations: one loss per grid, where their code resizes all to 64x64; the bright box includes its last row
    and column. An object's loss is 0 once the two boxes agree (IoU of 0.85); its boundary term needs other objects in
    the image, and the brightest cell to be outside.
    """
    several = ((layout.weights > 0).sum(dim=1, keepdim=True) > 1).to(layout.weights.dtype)
    losses = []
    for grid, kept in grids(maps).items():
        mask, raw = layout.masks[grid], own_maps(kept, layout)
        sharp = own_maps(F.pad((120 * kept[..., 1:]).softmax(dim=-1), (1, 0)), layout)
        low, high = raw.amin(dim=(2, 3), keepdim=True), raw.amax(dim=(2, 3), keepdim=True)
        found = (raw - low) / (high - low + TINY)
        threshold = 0.4 * mean_under(found, mask) + 0.6 * mean_under(found, 1 - mask)
        bright = bounding(found.detach() > threshold.detach())
        iou = (bright * mask).sum(dim=(2, 3)) / torch.maximum(bright, mask).sum(dim=(2, 3)).clamp_min(TINY)
        straight = bright + found - found.detach()
        both = bright * mask + found - found.detach()
        soft = (20 * (found - threshold)).sigmoid()
        region = 2 - (1 - iou) * ratio(mask * both, straight) - 0.5 * (1 - iou) * ratio(mask * soft, soft)
        outside = (mask * raw).amax(dim=(2, 3)) < ((1 - mask) * raw).amax(dim=(2, 3))
        edges = steepness(sharp)
        boundary = 1 - (1 - iou) * ratio(mask * edges, edges)
        losses.append((iou < 0.85) * (region + several * outside * boundary))
    return torch.stack(losses).mean(dim=0)
