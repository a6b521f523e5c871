"""What the attention shall look like: pure functions of recorded maps and a layout that return a loss."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce as fold
from operator import or_
from typing import TYPE_CHECKING, Literal, TypeAlias, overload

import torch
from torch import Tensor

from ...checks import choice, number, shown
from ...networks.attention import ALL, BOX_MASS, Inputs, Keep, Maps, Record
from ...networks.sites import Position, Site, Where, choose, cross, level, read_sites
from ._maps import TINY

if TYPE_CHECKING:
    from ..layout import Layout

Loss: TypeAlias = "Callable[[Maps, Layout], Tensor]"
Reduction = Literal["mean", "sum", "max"]
StepRule = Literal["variance", "plain", "unit"]
PerStep: TypeAlias = "float | tuple[float, ...]"

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
    the mean is over the weights' sum), or per image [B]. needs_boxes: False for one that reads no masks, so that
    phrases without a place will do.
    """

    name: str
    function: Loss
    sites: Where | frozenset[Site]
    keep: Keep
    reduce: Reduction
    weight: float = 1.0
    needs_boxes: bool = True

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ValueError(f"function is {shown(self.function)}; expected one (maps, layout) -> loss")
        object.__setattr__(self, "sites", read_sites("sites", self.sites))
        object.__setattr__(self, "keep", Keep.read(self.keep))
        choice("reduce", self.reduce, ("mean", "sum", "max"))
        number("weight", self.weight)

    @property
    def record(self) -> Record:
        """What it needs. The mass inside the masks can be read from it too, for the report."""
        keep = self.keep if self.keep.heads is not None or self.keep.sums is not None else ALL
        return Record(self.sites, keep, rows="all", stop=True)

    def loss(self, maps: Maps, layout: Layout) -> Tensor:
        """[B,O] or [B], which is checked."""
        found = self.function(maps, layout)
        count = len(layout.weights)
        if not isinstance(found, Tensor) or tuple(found.shape) not in ((count,), tuple(layout.weights.shape)):
            raise ValueError(
                f"the objective {self.name} returned {shown(found)}; expected a loss per object "
                f"{list(layout.weights.shape)} or per image [{count}]"
            )
        return found


@dataclass(frozen=True)
class Objective:
    """A loss of recorded maps and a layout: `loss = objective(maps, layout)`, [B].

    Objectives add (`a + 0.5 * b`) and a sum records what each of them needs. `settings` are those of its paper; a sum
    has those of its first term.
    """

    terms: tuple[Term, ...]
    settings: Settings = Settings()
    record: Record = field(init=False, compare=False, repr=False)
    """What a forward pass of conditional rows keeps for it, each site once."""

    def __post_init__(self) -> None:
        if not isinstance(self.terms, tuple) or not self.terms or not all(isinstance(one, Term) for one in self.terms):
            raise ValueError(f"terms is {shown(self.terms)}; expected a tuple of minidiff's terms, as @objective makes")
        if not isinstance(self.settings, Settings):
            raise ValueError(f"settings is {shown(self.settings)}; expected a minidiff.Settings")
        object.__setattr__(self, "record", fold(or_, (term.record for term in self.terms)))

    @property
    def keep(self) -> Keep:
        """What is kept of each site where the terms' sites are not chosen yet."""
        kinds = {term.record.keep for term in self.terms}
        return kinds.pop() if len(kinds) == 1 else ALL

    @property
    def sites(self) -> frozenset[Site]:
        """Of all terms, once they are chosen."""
        return frozenset(self.record.kinds)

    @property
    def function(self) -> Loss:
        """Of an objective of one term: what was decorated."""
        (term,) = self.terms
        return term.function

    @property
    def needs_boxes(self) -> bool:
        """Whether any term reads masks."""
        return any(term.needs_boxes for term in self.terms)

    def bound(self, there: Mapping[Site, Position], sites: Where | Iterable[Site] | None = None) -> Objective:
        """The same with its sites chosen among those of a UNet; `sites`, where given, instead of the terms' own."""
        terms = tuple(replace(term, sites=choose(term.sites if sites is None else sites, there)) for term in self.terms)
        return replace(self, terms=terms)

    def __call__(self, maps: Maps, layout: Layout) -> Tensor:
        """[B]. maps: as `record` keeps them, of the terms' sites; of any, where those are not chosen yet."""
        return self._losses(self._views(maps, layout.inputs()), layout)[0]

    def look(self, maps: Maps, layout: Layout, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """The loss [B], each object's [B,O], and the share of its attention inside its mask [B,O].

        A term that returns [B] has no part in the second. The third is the mean over the cross-attention's sites and
        heads, NaN where there is none.
        """
        views = self._views(maps, inputs)
        mass = [views.of(site, BOX_MASS).mean(dim=1) for site in maps if site.kind == "cross"]  # [B,O,L]
        inside = [(one * layout.token_weights).sum(dim=2) for one in mass]
        nothing = torch.full_like(layout.weights, math.nan)
        return *self._losses(views, layout), torch.stack(inside).mean(dim=0) if inside else nothing

    def _views(self, maps: Maps, inputs: Inputs) -> _Views:
        return _Views(maps, self.record.kinds or dict.fromkeys(maps, self.keep), inputs)

    def _losses(self, views: _Views, layout: Layout) -> tuple[Tensor, Tensor]:
        weights = layout.weights
        total, objects = weights.new_zeros(len(weights)), torch.zeros_like(weights)
        for term in self.terms:
            sites = [site for site in views.maps if isinstance(term.sites, Where) or site in term.sites]
            loss = term.loss({site: views.of(site, term.keep) for site in sites}, layout)
            if loss.ndim == 2:
                objects = objects + term.weight * loss
                loss = _reduced(loss, weights, term.reduce)
            total = total + term.weight * loss
        return total, objects

    def __add__(self, other: Objective) -> Objective:
        if not isinstance(other, Objective):
            raise TypeError(f"got {shown(other)}; expected another objective")
        return Objective(self.terms + other.terms, self.settings)

    def __mul__(self, weight: float) -> Objective:
        factor = number("weight", weight)
        return replace(self, terms=tuple(replace(term, weight=term.weight * factor) for term in self.terms))

    __rmul__ = __mul__


class _Views:
    """One look's maps, each read once in every way that is asked for."""

    def __init__(self, maps: Maps, kinds: Mapping[Site, Keep], inputs: Inputs) -> None:
        self.maps, self.kinds, self.inputs = maps, kinds, inputs
        self.seen: dict[tuple[Site, Keep], Tensor] = {}

    def of(self, site: Site, keep: Keep) -> Tensor:
        """What `keep` keeps of a site, read from what was kept: itself, everything, or the mean over heads."""
        kept, kind = self.maps[site], self.kinds[site]
        if keep == kind:
            return kept
        if (site, keep) not in self.seen:
            self.seen[site, keep] = keep(site, kept if kind.heads else kept[:, None], self.inputs)
        return self.seen[site, keep]


def _reduced(loss: Tensor, weights: Tensor, reduce: Reduction) -> Tensor:
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
    reduce: Reduction = ...,
    settings: Settings = ...,
    needs_boxes: bool = ...,
) -> Callable[[Loss], Objective]: ...


def objective(
    function: Loss | None = None,
    *,
    sites: Where | frozenset[Site] = SECOND_COARSEST,
    keep: Keep = ALL,
    reduce: Reduction = "mean",
    settings: Settings = Settings(),
    needs_boxes: bool = True,
) -> Objective | Callable[[Loss], Objective]:
    """Make an objective of a module-level function (maps, layout) -> loss, [B,O] per object or [B] per image.

    `maps` holds {site: what `keep` keeps}, by default all probabilities [B,H,h,w,L] of the cross-attention sites on the
    second coarsest grid (16x16 in SD 1.5 at 512 pixels). See `Layout` for the other argument, `Term` for the others.
    """

    def made(function: Loss) -> Objective:
        name = getattr(function, "__name__", type(function).__name__)
        found = Objective((Term(name, function, sites, keep, reduce, needs_boxes=needs_boxes),), settings)
        if inspect.isfunction(function):
            # The decorated name is the objective's: so named, pickle finds the function inside of it.
            function.__qualname__ += ".function"
        return found

    return made if function is None else made(function)
