"""iLGD: attention outside the mask less that inside."""

from __future__ import annotations

import torch
from torch import Tensor

from ...networks.attention import HEAD_MEAN, Maps
from ...networks.sites import cross, level
from ..layout import Layout
from ._maps import grids, own_maps
from ._objective import Settings, objective


@objective(
    sites=cross & level(1),
    keep=HEAD_MEAN,
    settings=Settings(scale=3.0, threshold=0.0, iterations=1, steps=25, step_rule="variance"),
)
def ilgd_loss(maps: Maps, layout: Layout) -> Tensor:
    """The sum of the attention to an object's words outside the mask, less that inside, plus the mask's area.

    Patel and Serkh 2024 ("Enhancing image layout control with loss-guided diffusion models", iLGD), whose other half
    is `minidiff.attention_injection()`. The area, a constant, keeps the loss from being negative. A "variance" step of
    s is, to first order, the paper's eps + s * sigma * grad, but it looks once more where the paper takes the sampling
    step's maps. s is measured on the bundled model, where the paper's 8 / 25 does little (bench/LOG.md).
    """
    losses = []
    for grid, kept in grids(maps).items():
        mask, found = layout.masks[grid], own_maps(kept, layout)
        losses.append(((1 - mask) * found + mask * (1 - found)).sum(dim=(2, 3)))
    return torch.stack(losses).mean(dim=0)
