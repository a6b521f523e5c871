"""What the attention shall look like: pure functions of recorded maps and a layout that return a loss.

Shapes: B images, O objects, H heads, h x w cells, L tokens.
Maps of different grids are never averaged: a loss is computed on each grid, and those are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from ..networks.attention import ALL, BOX_MASS, HEAD_MEAN, Keep, Site
from ..networks.sites import Position, Where, block, choose, cross, level, place

if TYPE_CHECKING:
    from ..networks.attention import Grid
    from .layout import Layout

Maps: TypeAlias = "dict[Site, Tensor]"
Loss: TypeAlias = "Callable[[Maps, Layout], Tensor]"
Reduce = Literal["mean", "sum", "max"]
StepRule = Literal["variance", "plain", "unit"]
PerStep: TypeAlias = "float | tuple[float, ...]"

TINY = 1e-8
LEAST = 1e-12  # of a share, before its logarithm
SPREAD = 0.62  # of a map beside its object's box: maps are bright in the middle (measured on the bundled model)
SECOND_COARSEST = cross & level(1)


@dataclass(frozen=True)
class Settings:
    """How strongly an objective moves the latents where the caller says nothing: its paper's values.

    As in `Guidance`, which explains them.
    """

    scale: PerStep = 30.0
    threshold: PerStep = 0.2
    iterations: int | tuple[int, ...] = 5
    steps: int | float = 10
    step_rule: StepRule = "variance"


OWN = Settings(scale=0.03, threshold=0.1, iterations=5, steps=0.6, step_rule="unit")
"""Of the objectives that are no paper's."""


@dataclass(frozen=True)
class Term:
    """One objective of a sum: its function, what that needs recorded, and its weight.

    The function returns a loss per object [B,O], which `reduce` makes one per image (weighted by the objects' weights;
    the mean is over the weights' sum), or per image [B].
    """

    name: str
    function: Loss
    sites: Where | frozenset[Site]
    keep: Keep
    reduce: Reduce
    weight: float = 1.0


@dataclass(frozen=True)
class Objective:
    """A loss of recorded maps and a layout: `loss = objective(maps, layout)`, [B].

    Objectives add (`a + 0.5 * b`) and a sum records what each of them needs. `settings` are those of its paper; a sum
    has those of its first term.
    """

    terms: tuple[Term, ...]
    settings: Settings = Settings()

    @property
    def keep(self) -> Keep:
        """What to record: the kind of keep that the terms share, if it is one that all else can be read from."""
        kinds = {term.keep for term in self.terms}
        return kinds.pop() if len(kinds) == 1 and kinds <= {BOX_MASS, HEAD_MEAN} else ALL

    def bound(self, there: Mapping[Site, Position], sites: Where | Iterable[Site] | None = None) -> Objective:
        """The same with its sites chosen among those of a UNet; `sites`, where given, instead of the terms' own."""
        terms = tuple(replace(term, sites=choose(term.sites if sites is None else sites, there)) for term in self.terms)
        return replace(self, terms=terms)

    @property
    def sites(self) -> frozenset[Site]:
        """Of all terms, once they are chosen."""
        return frozenset(site for term in self.terms if isinstance(term.sites, frozenset) for site in term.sites)

    def __call__(self, maps: Maps, layout: Layout) -> Tensor:
        """[B]. maps: as `keep` records them, of the terms' sites; of any, where those are not chosen yet."""
        return self.per_object(maps, layout)[0]

    def per_object(self, maps: Maps, layout: Layout) -> tuple[Tensor, Tensor]:
        """The loss [B], and each object's [B,O]. A term that returns [B] has no share in the latter."""
        weights = layout.weights
        total, objects = weights.new_zeros(len(weights)), torch.zeros_like(weights)
        for term in self.terms:
            own = maps if isinstance(term.sites, Where) else {site: maps[site] for site in maps if site in term.sites}
            if self.keep is not term.keep:
                own = {site: term.keep(site, probs, layout.inputs()) for site, probs in own.items()}
            loss = term.function(own, layout)
            if loss.ndim == 2:
                objects = objects + term.weight * loss
                loss = _reduced(loss, weights, term.reduce)
            total = total + term.weight * loss
        return total, objects

    def __add__(self, other: Objective) -> Objective:
        return Objective(self.terms + other.terms, self.settings)

    def __mul__(self, weight: float) -> Objective:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"an objective's weight is {weight!r}; expected a number")
        terms = tuple(replace(term, weight=term.weight * weight) for term in self.terms)
        return replace(self, terms=terms)

    __rmul__ = __mul__


def _reduced(loss: Tensor, weights: Tensor, reduce: Reduce) -> Tensor:
    """[B,O] -> [B]; an image without objects has 0."""
    if reduce == "max":
        there = torch.where(weights > 0, weights * loss, -torch.inf)
        none = (weights <= 0).all(dim=1)
        return torch.where(none, 0.0, there.amax(dim=1)) if loss.shape[1] else loss.sum(dim=1)
    whole = (weights * loss).sum(dim=1)
    return whole if reduce == "sum" else whole / weights.sum(dim=1).clamp_min(TINY)


@overload
def objective(function: Loss) -> Objective: ...


@overload
def objective(
    *,
    sites: Where | frozenset[Site] = ...,
    keep: Keep = ...,
    reduce: Reduce = ...,
    settings: Settings = ...,
) -> Callable[[Loss], Objective]: ...


def objective(
    function: Loss | None = None,
    *,
    sites: Where | frozenset[Site] = SECOND_COARSEST,
    keep: Keep = ALL,
    reduce: Reduce = "mean",
    settings: Settings = Settings(),
) -> Objective | Callable[[Loss], Objective]:
    """Make an objective of a module-level function (maps, layout) -> loss, [B,O] per object or [B] per image.

    `maps` holds {site: what `keep` keeps}, by default all probabilities [B,H,h,w,L] of the cross-attention sites on the
    second coarsest grid (16x16 in SD 1.5 at 512 pixels). See `Layout` for the other argument, `Term` for `reduce`.
    """

    def made(function: Loss) -> Objective:
        return Objective((Term(function.__name__, function, sites, keep, reduce),), settings)

    return made if function is None else made(function)


@objective(sites=cross & (place("mid") | block("up", 1)), keep=BOX_MASS)
def layout_loss(maps: Maps, layout: Layout) -> Tensor:
    """How much of its tokens' attention an object has outside of its mask, squared; the mean over sites, heads, tokens.

    Chen, Laina and Vedaldi 2024 ("Training-free layout control with cross-attention guidance"), eq. 4.
    """
    missed = torch.stack([(1 - mass).square().mean(dim=1) for mass in maps.values()]).mean(dim=0)  # [B,O,L]
    return (missed * layout.token_weights).sum(dim=2)


_EXCITE = Settings(
    scale=tuple(20 * (1 - 0.5 * i / 49) ** 0.5 for i in range(25)),
    threshold=tuple({0: 0.95, 10: 0.5, 20: 0.2}.get(i, 0.0) for i in range(25)),
    iterations=tuple(20 if i in (0, 10, 20) else 1 for i in range(25)),
    steps=25,
    step_rule="plain",
)


@objective(sites=SECOND_COARSEST, keep=HEAD_MEAN, reduce="max", settings=_EXCITE)
def attend_and_excite_loss(maps: Maps, layout: Layout) -> Tensor:
    """1 - the largest value of an object's map, for the object that is worst off. It reads no boxes.

    Chefer et al. 2023 ("Attend-and-Excite"), eq. 1. Where their code refines (steps 0, 10 and 20) it makes one update
    more, whatever the loss; here the loss decides.
    """
    return _over_grids([1 - excited.amax(dim=(2, 3)) for excited in _object_maps(maps, layout).values()])


@objective(sites=SECOND_COARSEST, keep=HEAD_MEAN, reduce="sum", settings=replace(_EXCITE, threshold=0.0, iterations=1))
def boxdiff_loss(maps: Maps, layout: Layout) -> Tensor:
    """Strong inside of the box, weak outside, and up to its edges. Xie et al. 2023 ("BoxDiff"), eq. 3 to 8.

    P = 0.2 of the cells and L = 1 cell around an edge, as in their code. Deviations: masks cover cells exactly, so P
    of them may be no whole number, and is at least one cell (theirs is NaN under five); their refinement at steps 0, 10
    and 20 looks at the first term alone and is left out.
    """
    losses = []
    for grid, found in _object_maps(maps, layout).items():
        mask = layout.masks[grid]
        inside = 1 - _mean_of_top(mask * found, 0.2 * mask.sum(dim=(2, 3)))
        outside = _mean_of_top((1 - mask) * found, 0.2 * (1 - mask).sum(dim=(2, 3)))
        corners = [
            ((found.amax(dim=axis) - mask.amax(dim=axis)).abs() * _near_edges(mask.amax(dim=axis))).mean(dim=2)
            for axis in (2, 3)
        ]
        losses.append(inside + outside + corners[0] + corners[1])
    return _over_grids(losses)


@objective(
    sites=SECOND_COARSEST,
    keep=HEAD_MEAN,
    settings=Settings(
        scale=(3.0,) * 10 + (2.0,) * 10 + (1.0,) * 10,
        threshold=(0.1 / 3,) * 10 + (0.05,) * 10 + (0.1,) * 10,  # theirs is on the scaled loss
        iterations=(5,) * 20 + (1,) * 10,
        steps=30,
        step_rule="plain",
    ),
)
def refocusing_loss(maps: Maps, layout: Layout) -> Tensor:
    """(1 - the largest value inside) + the largest in each other box + half of the largest in the background.

    Phung, Ge and Huang 2024 ("Grounded text-to-image synthesis with attention refocusing"), the cross-attention
    refocusing (CAR) of eq. 3. Deviation: no case distinctions by the size of a value, as their code has.
    """
    losses = []
    for grid, found in _object_maps(maps, layout).items():
        mask = layout.masks[grid]
        others = mask[:, None] * (1 - mask)[:, :, None]  # [B,O,P,h,w]: of object P, and not of O
        elsewhere = (others * found[:, :, None]).amax(dim=(3, 4)).sum(dim=2)
        background = ((1 - mask.amax(dim=1, keepdim=True)) * found).amax(dim=(2, 3))
        losses.append(1 - (mask * found).amax(dim=(2, 3)) + elsewhere + 0.5 * background)
    return _over_grids(losses)


@objective(
    sites=cross & (level(0) | level(1)),
    keep=HEAD_MEAN,
    settings=Settings(scale=70.0, threshold=0.0, iterations=5, steps=10, step_rule="plain"),
)
def rnb_loss(maps: Maps, layout: Layout) -> Tensor:
    """The box around what is bright, moved onto the object's box. Xiao et al. 2024 ("R&B"), eq. 4 to 9.

    Its gradient goes straight through the box that a threshold finds, so it is no slope of the value. Deviations: each
    grid for itself where their code scales all to 64x64, and the bright box has its last row and column. An object has
    loss 0 once the two boxes agree (IoU of 0.85), and a boundary term only beside others and while the brightest cell
    is outside.
    """
    several = ((layout.weights > 0).sum(dim=1, keepdim=True) > 1).to(layout.weights.dtype)
    losses = []
    for grid, kept in _grids(maps).items():
        mask, raw = layout.masks[grid], torch.einsum("byxl,bol->boyx", kept, layout.token_weights)
        sharp = torch.einsum("byxl,bol->boyx", (120 * kept[..., 1:]).softmax(dim=-1), layout.token_weights[..., 1:])
        low, high = raw.amin(dim=(2, 3), keepdim=True), raw.amax(dim=(2, 3), keepdim=True)
        found = (raw - low) / (high - low + TINY)
        threshold = 0.4 * _mean_under(found, mask) + 0.6 * _mean_under(found, 1 - mask)
        bright = _bounding(found.detach() > threshold.detach())
        iou = (bright * mask).sum(dim=(2, 3)) / torch.maximum(bright, mask).sum(dim=(2, 3)).clamp_min(TINY)
        straight = bright + found - found.detach()
        both = bright * mask + found - found.detach()
        soft = (20 * (found - threshold)).sigmoid()
        region = 2 - (1 - iou) * _share(mask * both, straight) - 0.5 * (1 - iou) * _share(mask * soft, soft)
        outside = (mask * raw).amax(dim=(2, 3)) < ((1 - mask) * raw).amax(dim=(2, 3))
        edges = _edges(sharp)
        boundary = 1 - (1 - iou) * _share(mask * edges, edges)
        losses.append((iou < 0.85) * (region + several * outside * boundary))
    return _over_grids(losses)


@objective(sites=cross & (place("mid") | block("up", 1)), keep=BOX_MASS, settings=OWN)
def inside_loss(maps: Maps, layout: Layout) -> Tensor:
    """-log of the share of its tokens' attention that an object has inside its mask; mean over sites, heads, tokens.

    No paper's. Where next to nothing is inside (a model that is sure of another place), the slope of `layout_loss` is
    in proportion to that little, and guidance does not act; this one's is not.
    """
    missed = torch.stack([-mass.clamp_min(LEAST).log().mean(dim=1) for mass in maps.values()]).mean(dim=0)  # [B,O,L]
    return (missed * layout.token_weights).sum(dim=2)


@objective(sites=cross & block("up", 1), keep=HEAD_MEAN, settings=OWN)
def extent_loss(maps: Maps, layout: Layout) -> Tensor:
    """How far an object's map is from its mask in centre and in size, each along both axes.

    The centre and the size of a map are those of Epstein et al. 2023 ("Diffusion self-guidance"), eq. 5 and 6; the size
    here is the standard deviation, which needs no threshold. Offsets count in the mask's width and height; sizes by the
    square of the log of their ratio, with the map SPREAD times as wide as the mask.
    """
    losses = []
    for grid, kept in _grids(maps).items():
        found = _centre_and_spread(torch.einsum("byxl,bol->boyx", kept, layout.token_weights))
        wanted = _centre_and_spread(layout.masks[grid])
        offset = (found[0] - wanted[0]) / (math.sqrt(12) * wanted[1])  # an even bar of length 1 spreads 1 / sqrt(12)
        size = (found[1] / (SPREAD * wanted[1])).log()
        losses.append(3 * offset.square().sum(dim=2) + size.square().sum(dim=2))
    return _over_grids(losses)


OBJECTIVES: Mapping[str, Objective] = {
    "inside": inside_loss,
    "extent": extent_loss,
    "layout": layout_loss,
    "attend_and_excite": attend_and_excite_loss,
    "boxdiff": boxdiff_loss,
    "refocusing": refocusing_loss,
    "rnb": rnb_loss,
}
"""By the names under which generate and the command line know them."""


# ---- what they are made of


def mass_inside(maps: Maps, layout: Layout, keep: Keep) -> Tensor:
    """The share of its tokens' attention that each object has inside its mask, [B,O] in [0,1]; mean over sites, heads.

    Of the cross-attention among the maps; NaN where there is none. keep: what kept
    the maps: `ALL`, `HEAD_MEAN` or `BOX_MASS`.
    """
    found = []
    for site, kept in maps.items():
        if site.kind == "self":
            continue
        if keep is not BOX_MASS:
            kept = BOX_MASS(site, kept[:, None] if keep is HEAD_MEAN else kept, layout.inputs())
        found.append((kept.mean(dim=1) * layout.token_weights).sum(dim=2))
    return torch.stack(found).mean(dim=0) if found else torch.full_like(layout.weights, math.nan)


def _grids(maps: Maps) -> dict[Grid, Tensor]:
    """Head means [B,h,w,L], averaged over the sites of each grid."""
    found: dict[Grid, list[Tensor]] = {}
    for kept in maps.values():
        found.setdefault((kept.shape[1], kept.shape[2]), []).append(kept)
    return {grid: torch.stack(some).mean(dim=0) for grid, some in found.items()}


def _object_maps(maps: Maps, layout: Layout) -> dict[Grid, Tensor]:
    """[B,O,h,w]: probabilities sharpened over all tokens but the start marker (100 times, softmax), and smoothed.

    As Attend-and-Excite has it, for SD 1.x (their code also leaves out the last place, which is padding).
    """
    found = {}
    for grid, kept in _grids(maps).items():
        sharp = (100 * kept[..., 1:]).softmax(dim=-1)
        found[grid] = _smooth(torch.einsum("byxl,bol->boyx", sharp, layout.token_weights[..., 1:]), 0.5)
    return found


def _over_grids(losses: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(losses)).mean(dim=0)


def _smooth(maps: Tensor, sigma: float) -> Tensor:
    """3x3 blur. The published code divides by (2 sigma)^2, so its sigma of 0.5 is a Gaussian's of 0.71."""
    side = torch.exp(torch.tensor(-1 / (2 * sigma) ** 2, dtype=maps.dtype, device=maps.device))
    line = torch.stack([side, torch.ones_like(side), side])
    line = line / line.sum()
    return _filtered(maps, line[:, None] * line)


def _filtered(maps: Tensor, kernel: Tensor) -> Tensor:
    """[B,O,h,w] under a 3x3 kernel, mirrored at the border (one cell wide, a grid has nothing to mirror)."""
    flat = maps.flatten(0, 1)[:, None]
    padded = F.pad(flat, (1, 1, 1, 1), mode="reflect" if min(maps.shape[2:]) > 1 else "replicate")
    return F.conv2d(padded, kernel[None, None].to(maps))[:, 0].unflatten(0, maps.shape[:2])


def _mean_of_top(maps: Tensor, count: Tensor) -> Tensor:
    """Mean of the `count` [B,O] largest cells, a number that need not be whole, of at least one."""
    ranked = maps.flatten(2).sort(dim=2, descending=True).values
    rank = torch.arange(ranked.shape[2], device=maps.device)
    share = (count.clamp_min(1)[..., None] - rank).clamp(0, 1)
    return (share * ranked).sum(dim=2) / share.sum(dim=2)


def _near_edges(line: Tensor) -> Tensor:
    """1 for the cells beside an edge of a projected mask [B,O,n], and for one more on its far side."""
    edges = F.pad(line, (1, 1)).diff(dim=2).ne(0).to(line.dtype)  # [B,O,n+1], between the cells and at both ends
    return F.max_pool1d(F.pad(edges, (1, 0)), 3, stride=1)


def _mean_under(maps: Tensor, mask: Tensor) -> Tensor:
    """[B,O,1,1]; 0 where the mask is empty."""
    whole = mask.sum(dim=(2, 3), keepdim=True)
    return (maps * mask).sum(dim=(2, 3), keepdim=True) / whole.clamp_min(TINY)


def _bounding(found: Tensor) -> Tensor:
    """The box around the True cells of each map [B,O,h,w], as zeros and ones."""

    def between(line: Tensor) -> Tensor:
        line = line.to(torch.uint8)
        return line.cummax(dim=2).values & line.flip(2).cummax(dim=2).values.flip(2)

    rows, columns = between(found.any(dim=3)), between(found.any(dim=2))
    return (rows[..., :, None] * columns[..., None, :]).float()


def _centre_and_spread(maps: Tensor) -> tuple[Tensor, Tensor]:
    """[B,O,h,w] >= 0 -> centre and standard deviation along x and y, each [B,O,2] in shares of the picture's edge."""
    share = maps / maps.sum(dim=(2, 3), keepdim=True).clamp_min(TINY)
    centres, spreads = [], []
    for axis in (2, 3):  # summed over y, what is left is along x
        line = share.sum(dim=axis)
        cells = line.shape[2]
        at = (torch.arange(cells, dtype=maps.dtype, device=maps.device) + 0.5) / cells
        centre = (line * at).sum(dim=2)
        # what is in a cell is spread evenly in it, so that no map and no mask is a point
        within = 1 / (12 * cells**2)
        centres.append(centre)
        spreads.append(((line * (at - centre[..., None]).square()).sum(dim=2) + within).sqrt())
    return torch.stack(centres, dim=2), torch.stack(spreads, dim=2)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return part.sum(dim=(2, 3)) / whole.sum(dim=(2, 3)).clamp_min(TINY)


def _edges(maps: Tensor) -> Tensor:
    """Steepness (Sobel) of smoothed maps, each brought to a largest value of one."""
    smooth = _smooth(maps / maps.detach().amax(dim=(2, 3), keepdim=True).clamp_min(TINY), 3.0)
    sobel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
    across, down = _filtered(smooth, sobel), _filtered(smooth, sobel.T)
    return (across.square() + down.square() + TINY).sqrt()
