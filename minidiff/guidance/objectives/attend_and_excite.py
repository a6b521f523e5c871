"""Attend-and-Excite: every object gets strong attention somewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from ...networks.attention import HEAD_MEAN, Maps
from ...networks.sites import SECOND_COARSEST
from ..layout import Layout
from ._maps import object_maps
from ._objective import Settings, objective

EXCITE = Settings(
    scale=tuple(20 * (1 - 0.5 * i / 49) ** 0.5 for i in range(25)),
    threshold=tuple({0: 0.95, 10: 0.5, 20: 0.2}.get(i, 0.0) for i in range(25)),
    iterations=tuple(20 if i in (0, 10, 20) else 1 for i in range(25)),
    steps=25,
    step_rule="plain",
)


@objective(sites=SECOND_COARSEST, keep=HEAD_MEAN, reduce="max", settings=EXCITE, needs_boxes=False)
def attend_and_excite_loss(maps: Maps, layout: Layout) -> Tensor:
    """1 - the maximum of an object's map, for the most neglected object. It reads no boxes.

    Chefer et al. 2023 ("Attend-and-Excite"), eq. 1. Deviation: in its refinement steps (0, 10 and 20) their code makes
    one more update whatever the loss; here the threshold applies.
    """
    losses = [1 - excited.amax(dim=(2, 3)) for excited in object_maps(maps, layout).values()]
    return torch.stack(losses).mean(dim=0)
