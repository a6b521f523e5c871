"""BoxDiff: strong attention inside the box, weak outside, extending to its edges."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...networks.attention import HEAD_MEAN, Maps
from ...networks.sites import SECOND_COARSEST
from ..layout import Layout
from ._maps import mean_of_top, near_edges, object_maps
from ._objective import objective
from .attend_and_excite import EXCITE


@objective(sites=SECOND_COARSEST, keep=HEAD_MEAN, reduce="sum", settings=replace(EXCITE, threshold=0.0, iterations=1))
def boxdiff_loss(maps: Maps, layout: Layout) -> Tensor:
    """Inner-box, outer-box and corner constraints. Xie et al. 2023 ("BoxDiff"), eq. 3 to 8.

    P = 0.2 of the cells and L = 1 cell around an edge, as in their code. Deviations: masks cover cells exactly, so P
    may be a fractional number of cells, and is at least one (theirs is NaN under five); their refinement at steps 0, 10
    and 20, which uses only the first term, is omitted.
    """
    losses = []
    for grid, found in object_maps(maps, layout).items():
        mask = layout.masks[grid]
        inside = 1 - mean_of_top(mask * found, 0.2 * mask.sum(dim=(2, 3)))
        outside = mean_of_top((1 - mask) * found, 0.2 * (1 - mask).sum(dim=(2, 3)))
        corners = [
            ((found.amax(dim=axis) - mask.amax(dim=axis)).abs() * near_edges(mask.amax(dim=axis))).mean(dim=2)
            for axis in (2, 3)
        ]
        losses.append(inside + outside + corners[0] + corners[1])
    return torch.stack(losses).mean(dim=0)
