"""Masks of objects made of a step's own attention: segments of the self-attention, each given to one object.

Dahary et al. 2024 ("Be Yourself: Bounded attention for multi-subject text-to-image generation"), section 4.2, and its
code's numbers. Shapes: B images, O objects, N = h * w cells, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..networks.attention import Inputs, Maps, read_input
from ..networks.sites import Grid
from .objectives._maps import TINY

PER_OBJECT, ROUNDS = 3, 10
_SUMS = "segments.self", "segments.cross"
"""The inputs that hold the sums of all steps' maps."""


@dataclass(frozen=True)
class Refined:
    """An Edit's `update`: the objects' masks on all grids, from where t is below 1000 * start, whatever a model's
    number of timesteps (SD's have 1000).

    Each cell's self-attention, the mean of all steps so far, is clustered; each cluster goes to the object whose
    attention overlaps it most, if by at least a fifth of the smaller of the two.
    """

    start: float

    def __call__(self, maps: Maps, inputs: Inputs) -> Inputs:
        """maps {site: [B,h,w,L]}, of one grid; `token_weights` and the masks [B,O,h,w] are among the inputs."""
        sums = {}
        for name, kind in zip(_SUMS, ("self", "cross"), strict=True):
            sums[name] = sum(
                (one for site, one in maps.items() if site.kind == kind), inputs.get(name, torch.zeros(()))
            )
        names = [name for name in inputs if name.startswith("masks.")]
        height, width = sums[_SUMS[0]].shape[1:3]
        old = read_input(inputs, f"masks.{height}x{width}")
        seen = torch.einsum("byxl,bol->boyx", sums[_SUMS[1]], read_input(inputs, "token_weights"))
        new = object_segments(sums[_SUMS[0]].flatten(1, 2), seen, old)
        late = read_input(inputs, "t", "a step's") < self.start * 1000
        found = {name: torch.where(late, _resized(new, inputs[name]), inputs[name]) for name in names}
        return {**sums, **found}


def object_segments(rows: Tensor, seen: Tensor, masks: Tensor) -> Tensor:
    """Segments of the cells with self-attention `rows` [B,N,N], as new masks [B,O,h,w] of zeros and ones.

    seen [B,O,h,w]: the attention to each object. An object that no segment overlaps keeps its mask, in which no other
    has a cell (in the paper's code its box). Clusters: three for each object with a mask.
    """
    objects, height, width = masks.shape[1:]
    old = masks.flatten(2)
    there = old.sum(dim=2) > 0
    scaled = rows / rows.amax(dim=1, keepdim=True).clamp_min(TINY)
    labels = kmeans(scaled, there.sum(dim=1) * PER_OBJECT, objects * PER_OBJECT)
    clusters = F.one_hot(labels, objects * PER_OBJECT).to(rows.dtype)  # [B,N,K]
    heat = seen.flatten(2)
    heat = (10 * (heat / heat.amax(dim=2, keepdim=True).clamp_min(TINY) - 0.2)).sigmoid()
    least, most = heat.amin(dim=2, keepdim=True), heat.amax(dim=2, keepdim=True)
    heat = (heat - least) / (most - least).clamp_min(TINY) * old
    smaller = torch.minimum(heat.sum(dim=2)[:, :, None], clusters.sum(dim=1)[:, None])
    overlap = (heat @ clusters) / smaller.clamp_min(TINY)  # [B,O,K]
    best = overlap.max(dim=1)
    owner = best.indices.gather(1, labels)  # [B,N]
    kept = best.values.gather(1, labels) >= 0.2
    new = (F.one_hot(owner, objects).mT.to(old.dtype)) * kept[:, None]
    for i in range(objects):  # in order, as the paper's code does
        lost = there[:, i] & (new[:, i].sum(dim=1) == 0)
        others = new * (1 - (old[:, i] > 0).to(old)[:, None])
        new = torch.where(lost[:, None, None], others, new)
        new[:, i] = torch.where(lost[:, None], old[:, i], new[:, i])
    return new.unflatten(2, (height, width))


def kmeans(points: Tensor, counts: Tensor, most: int) -> Tensor:
    """The cluster [B,N] of each point [B,N,D], in images of `counts` [B] clusters, at most `most`.

    Lloyd's algorithm, ten rounds, from the point farthest from the mean, then each time that farthest from all before
    (the paper's code draws 100 starts). A cluster without points keeps its centre.
    """
    distance = (points - points.mean(dim=1, keepdim=True)).square().sum(dim=2)
    found: list[Tensor] = []
    for _ in range(most):
        found.append(points[torch.arange(len(points)), distance.argmax(dim=1)])
        away = (points - found[-1][:, None]).square().sum(dim=2)
        distance = away if len(found) == 1 else torch.minimum(distance, away)
    centres = torch.stack(found, dim=1)  # [B,K,D]
    unused = (torch.arange(most, device=points.device) >= counts[:, None])[:, None]  # [B,1,K]
    for _ in range(ROUNDS):
        labels = _nearest(points, centres, unused)
        members = F.one_hot(labels, most).to(points.dtype)
        sizes = members.sum(dim=1)[..., None]
        centres = torch.where(sizes > 0, members.mT @ points / sizes.clamp_min(1), centres)
    return _nearest(points, centres, unused)


def _nearest(points: Tensor, centres: Tensor, unused: Tensor) -> Tensor:
    away = torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist")
    return away.masked_fill(unused, torch.inf).argmin(dim=2)


def _resized(masks: Tensor, like: Tensor) -> Tensor:
    grid: Grid = (like.shape[2], like.shape[3])
    return masks if masks.shape[2:] == grid else F.interpolate(masks, grid, mode="nearest-exact")
