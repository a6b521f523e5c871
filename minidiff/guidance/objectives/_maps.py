"""Building blocks of objectives: pure functions of recorded maps.

Shapes: B images, O objects, h x w cells, L tokens. Maps on different grids are never averaged; the losses computed on
each grid are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from ...networks.attention import Maps
    from ...networks.sites import Grid
    from ..layout import Layout

TINY = 1e-8


def grids(maps: Maps) -> dict[Grid, Tensor]:
    """Head means [B,h,w,L], averaged over the sites of each grid."""
    found: dict[Grid, list[Tensor]] = {}
    for kept in maps.values():
        found.setdefault((kept.shape[1], kept.shape[2]), []).append(kept)
    return {grid: torch.stack(some).mean(dim=0) for grid, some in found.items()}


def own_shares(masses: Iterable[Tensor], layout: Layout) -> list[Tensor]:
    """Fractions inside masks [B,H,O,L], of the attention that is not inside the masks of the object's siblings."""
    siblings = layout.siblings
    return [mass / (1 - torch.einsum("boi,bhil->bhol", siblings.to(mass), mass)).clamp_min(TINY) for mass in masses]


def own_maps(kept: Tensor, layout: Layout) -> Tensor:
    """Attention to each object's tokens [B,O,h,w], from [B,h,w,L]; none where its siblings are to be."""
    found = torch.einsum("byxl,bol->boyx", kept, layout.token_weights)
    return found * (1 - taken(layout, (found.shape[2], found.shape[3])))


def taken(layout: Layout, grid: Grid) -> Tensor:
    """The fraction of each cell inside the masks of an object's siblings, [B,O,h,w]."""
    return (layout.siblings[..., None, None] * layout.masks[grid][:, None]).sum(dim=2).clamp(max=1)


def object_maps(maps: Maps, layout: Layout) -> dict[Grid, Tensor]:
    """[B,O,h,w]: smoothed softmax(100 * probabilities) over all tokens but the start marker.

    As in Attend-and-Excite for SD 1.x (whose code also drops the last position, which is padding).
    """
    found = {}
    for grid, kept in grids(maps).items():
        sharp = (100 * kept[..., 1:]).softmax(dim=-1)
        found[grid] = smoothed(own_maps(F.pad(sharp, (1, 0)), layout), 0.5)
    return found


def constants(like: Tensor, *values: float) -> Tensor:
    """Numbers as a tensor [n] beside another, without the wait for the device that a copy from the host is."""
    return torch.stack([like.new_full((), value) for value in values])


def smoothed(maps: Tensor, sigma: float) -> Tensor:
    """3x3 blur. Like the published code it divides by (2 sigma)^2, so sigma 0.5 is a Gaussian's sigma of 0.71."""
    side = maps.new_full((), -1 / (2 * sigma) ** 2).exp()
    line = torch.stack([side, torch.ones_like(side), side])
    line = line / line.sum()
    return filtered(maps, line[:, None] * line)


def filtered(maps: Tensor, kernel: Tensor) -> Tensor:
    """[B,O,h,w] filtered by a 3x3 kernel, with reflect padding (replicate for grids one cell wide)."""
    flat = maps.flatten(0, 1)[:, None]
    padded = F.pad(flat, (1, 1, 1, 1), mode="reflect" if min(maps.shape[2:]) > 1 else "replicate")
    return F.conv2d(padded, kernel[None, None].to(maps))[:, 0].unflatten(0, maps.shape[:2])


def mean_of_top(maps: Tensor, count: Tensor) -> Tensor:
    """Mean of the `count` [B,O] largest cells. `count` may be fractional and is at least 1."""
    ranked = maps.flatten(2).sort(dim=2, descending=True).values
    rank = torch.arange(ranked.shape[2], device=maps.device)
    share = (count.clamp_min(1)[..., None] - rank).clamp(0, 1)
    return (share * ranked).sum(dim=2) / share.sum(dim=2)


def near_edges(line: Tensor) -> Tensor:
    """1 for the cells on both sides of an edge of a projected mask [B,O,n], and for one more on its far side."""
    edges = F.pad(line, (1, 1)).diff(dim=2).ne(0).to(line.dtype)  # [B,O,n+1], between cells and at both ends
    return F.max_pool1d(F.pad(edges, (1, 0)), 3, stride=1)


def mean_under(maps: Tensor, mask: Tensor) -> Tensor:
    """Mean of the maps under the mask, [B,O,1,1]; 0 where the mask is empty."""
    whole = mask.sum(dim=(2, 3), keepdim=True)
    return (maps * mask).sum(dim=(2, 3), keepdim=True) / whole.clamp_min(TINY)


def bounding(found: Tensor) -> Tensor:
    """The bounding box of the True cells of each map [B,O,h,w], as a mask of zeros and ones."""

    def between(line: Tensor) -> Tensor:
        line = line.to(torch.uint8)
        return line.cummax(dim=2).values & line.flip(2).cummax(dim=2).values.flip(2)

    rows, columns = between(found.any(dim=3)), between(found.any(dim=2))
    return (rows[..., :, None] * columns[..., None, :]).float()


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    return part.sum(dim=(2, 3)) / whole.sum(dim=(2, 3)).clamp_min(TINY)


def steepness(maps: Tensor) -> Tensor:
    """Gradient magnitude (Sobel) of the smoothed maps, each first scaled to a maximum of 1."""
    smooth = smoothed(maps / maps.detach().amax(dim=(2, 3), keepdim=True).clamp_min(TINY), 3.0)
    sobel = constants(smooth, 1.0, 2.0, 1.0)[:, None] * constants(smooth, 1.0, 0.0, -1.0)
    across, down = filtered(smooth, sobel), filtered(smooth, sobel.T)
    return (across.square() + down.square() + TINY).sqrt()


def moments(maps: Maps, layout: Layout) -> dict[Grid, tuple[Tensor, Tensor]]:
    """Centre and spread of the attention to each object's tokens, on each grid; see centre_and_spread."""
    return {grid: centre_and_spread(own_maps(kept, layout)) for grid, kept in grids(maps).items()}


def centre_and_spread(maps: Tensor) -> tuple[Tensor, Tensor]:
    """[B,O,h,w] >= 0 -> centre and standard deviation along x and y, each [B,O,2], as fractions of the picture."""
    share = maps / maps.sum(dim=(2, 3), keepdim=True).clamp_min(TINY)
    centres, spreads = [], []
    for axis in (2, 3):  # summing over y leaves x
        line = share.sum(dim=axis)
        cells = line.shape[2]
        at = (torch.arange(cells, dtype=maps.dtype, device=maps.device) + 0.5) / cells
        centre = (line * at).sum(dim=2)
        # mass is spread uniformly within a cell, so that no map or mask has zero size
        within = 1 / (12 * cells**2)
        centres.append(centre)
        spreads.append(((line * (at - centre[..., None]).square()).sum(dim=2) + within).sqrt())
    return torch.stack(centres, dim=2), torch.stack(spreads, dim=2)
