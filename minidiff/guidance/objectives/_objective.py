"""Objectives: losses that are pure functions of recorded attention maps and a layout."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, TypeAlias, overload

import torch
from torch import Tensor

from ...checks import choice, number, shown
from ...networks.attention import ALL, BOX_MASS, Inputs, Keep, Maps, Record
from ...networks.sites import SECOND_COARSEST, Position, Site, Where, choose, read_sites
from ...vocabulary import own_keywords
from ._maps import TINY, own_shares

if TYPE_CHECKING:
    from ..layout import Layout

Loss: TypeAlias = "Callable[[Maps, Layout], Tensor]"
Reduction = Literal["mean", "sum", "max"]
StepRule = Literal["variance", "plain", "unit"]
_Views: TypeAlias = "dict[tuple[Site, Keep], Tensor]"
PerStep: TypeAlias = "float | tuple[float, ...]"


@own_keywords
@dataclass(frozen=True)
class Settings:
    """An objective's default guidance settings: its paper's values.

    `Guidance` explains the fields.
    """

    scale: PerStep = 30.0
    threshold: PerStep = 0.2
    iterations: int | tuple[int, ...] = 5
    steps: int | float = 10
    step_rule: StepRule = "variance"


PUBLISHED = Settings()
"""Those of Chen, Laina and Vedaldi 2024."""
OWN = Settings(scale=0.03, threshold=0.1, iterations=5, steps=0.6, step_rule="unit")
"""Settings of the objectives that come from no paper."""


@dataclass(frozen=True)
class Term:
    """One term of a sum: its function, what the function needs recorded, and its weight.

    The function returns a loss per image [B], or per object [B,O], which `reduce` turns into one per image (weighted
    by the objects' weights; the mean divides by the sum of weights). needs_boxes: False for a function that reads no
    masks, so that phrases need no box.
    """

    name: str
    function: Loss
    sites: Where | frozenset[Site]
    keep: Keep
    reduce: Reduction
    weight: float = 1.0
    needs_boxes: bool = True

    @property
    def kept(self) -> Keep:
        """What to record for it; this also suffices to compute the mass inside the masks, for the report."""
        return self.keep if self.keep.heads is not None or self.keep == BOX_MASS else ALL

    def reads(self, maps: Maps) -> list[Site]:
        """Its sites among those recorded; all while none are chosen."""
        return [site for site in maps if isinstance(self.sites, Where) or site in self.sites]

    def loss(self, maps: Maps, layout: Layout) -> Tensor:
        """The function's loss, checked to be [B,O] or [B]."""
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
    """A loss on recorded maps and a layout: `loss = objective(maps, layout)`, [B].

    Objectives can be added (`a + 0.5 * b`); a sum records what each term needs. `settings` are the paper's; a sum
    takes those of its first term.
    """

    terms: tuple[Term, ...]
    settings: Settings = PUBLISHED

    def __post_init__(self) -> None:
        if not isinstance(self.terms, tuple) or not self.terms or not all(isinstance(one, Term) for one in self.terms):
            raise ValueError(f"terms is {shown(self.terms)}; expected a tuple of minidiff's terms, as @objective makes")
        if not isinstance(self.settings, Settings):
            raise ValueError(f"settings is {shown(self.settings)}; expected a minidiff.Settings")

    @cached_property
    def record(self) -> Record:
        """What a forward pass of conditional rows keeps for it, each site once."""
        (sites, keep), *more = ((term.sites, term.kept) for term in self.terms)
        return Record(sites, keep, rows="all", stop=True, more=tuple(more))

    @property
    def keep(self) -> Keep:
        """What is kept per site while the terms' sites are not chosen yet."""
        kinds = {term.kept for term in self.terms}
        return kinds.pop() if len(kinds) == 1 else ALL

    @property
    def sites(self) -> frozenset[Site]:
        """The sites of all terms, once chosen."""
        return frozenset(self.record.kinds)

    @property
    def function(self) -> Loss:
        """The decorated function, of an objective with one term."""
        (term,) = self.terms
        return term.function

    @property
    def needs_boxes(self) -> bool:
        """True where any term reads masks."""
        return any(term.needs_boxes for term in self.terms)

    def bound(self, there: Mapping[Site, Position], sites: Where | Iterable[Site] | None = None) -> Objective:
        """The same objective with its sites chosen from a UNet's; `sites`, if given, replaces the terms' own."""
        terms = tuple(replace(term, sites=choose(term.sites if sites is None else sites, there)) for term in self.terms)
        for term, own in zip(terms, self.terms, strict=True) if there and sites is not None else ():
            kinds, expected = ({site.kind for site in choose(one.sites, there)} for one in (term, own))
            if kinds != expected:
                raise ValueError(
                    f"sites hold {' and '.join(sorted(kinds))}-attention, but {own.name} reads "
                    f"{' and '.join(sorted(expected))}-attention; expected such sites. An objective "
                    "of your own reads what it was made for: @minidiff.objective(sites=...)"
                )
        return replace(self, terms=terms)

    def __call__(self, maps: Maps, layout: Layout) -> Tensor:
        """The loss [B]. maps: as `record` keeps them, from the terms' sites, or from any while none are chosen."""
        return self._losses(maps, self._views(maps, layout.inputs()), layout)[0]

    def look(self, maps: Maps, layout: Layout, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """The loss [B], the loss per object [B,O], and each object's fraction of attention inside its mask [B,O],
        not counting what is inside those of its siblings.

        Terms that return [B] do not count in the second. The third is the mean over cross-attention sites and heads,
        NaN if no cross-attention was recorded.
        """
        crossing = [(site, BOX_MASS) for site in maps if site.kind == "cross"]
        views = self._views(maps, inputs, crossing)
        mass = [one.mean(dim=1) for one in own_shares([views[key] for key in crossing], layout)]  # [B,O,L]
        inside = [(one * layout.token_weights).sum(dim=2) for one in mass]
        nothing = torch.full_like(layout.weights, math.nan)
        return *self._losses(maps, views, layout), torch.stack(inside).mean(dim=0) if inside else nothing

    def _views(self, maps: Maps, inputs: Inputs, more: Sequence[tuple[Site, Keep]] = ()) -> _Views:
        """What the terms read, and more, each computed once."""
        wanted = [(site, term.keep) for term in self.terms for site in term.reads(maps)]
        return converted(maps, self.record.kinds or dict.fromkeys(maps, self.keep), [*wanted, *more], inputs)

    def _losses(self, maps: Maps, views: _Views, layout: Layout) -> tuple[Tensor, Tensor]:
        weights = layout.weights
        total, objects = weights.new_zeros(len(weights)), torch.zeros_like(weights)
        for term in self.terms:
            loss = term.loss({site: views[site, term.keep] for site in term.reads(maps)}, layout)
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


def _reduced(loss: Tensor, weights: Tensor, reduce: Reduction) -> Tensor:
    """[B,O] -> [B]; 0 for an image without objects."""
    if reduce == "max":
        there = torch.where(weights > 0, weights * loss, -torch.inf)
        none = (weights <= 0).all(dim=1)
        return torch.where(none, 0.0, there.amax(dim=1)) if loss.shape[1] else loss.sum(dim=1)
    whole = (weights * loss).sum(dim=1)
    return whole if reduce == "sum" else whole / weights.sum(dim=1).clamp_min(TINY)


def converted(maps: Maps, kinds: Mapping[Site, Keep], wanted: Iterable[tuple[Site, Keep]], inputs: Inputs) -> _Views:
    """What each keep keeps of its site, from what `kinds` kept there: the same, all, or the mean over heads."""
    found = {}
    for site, keep in dict.fromkeys(wanted):
        kept, kind = maps[site], kinds[site]
        found[site, keep] = kept if kind == keep else keep(site, kept if kind.heads else kept[:, None], inputs)
    return found


@overload
def objective(function: Loss) -> Objective:
    """`@objective` alone: all options as they are by default."""


@overload
def objective(
    *,
    sites: Where | frozenset[Site] = ...,
    keep: Keep = ...,
    reduce: Reduction = ...,
    settings: Settings = ...,
    needs_boxes: bool = ...,
) -> Callable[[Loss], Objective]:
    """`@objective(...)`, with options."""


def objective(
    function: Loss | None = None,
    *,
    sites: Where | frozenset[Site] = SECOND_COARSEST,
    keep: Keep = ALL,
    reduce: Reduction = "mean",
    settings: Settings = PUBLISHED,
    needs_boxes: bool = True,
) -> Objective | Callable[[Loss], Objective]:
    """Turn a module-level function (maps, layout) -> loss, [B,O] per object or [B] per image, into an objective.

    `maps` is {site: what `keep` keeps}, by default all probabilities [B,H,h,w,L] of the cross-attention sites on the
    second-coarsest grid (16x16 in SD 1.5 at 512 pixels). See `Layout` for `layout`, and `Term` for the options.
    """
    where, kind = read_sites("sites", sites), Keep.read(keep)
    choice("reduce", reduce, ("mean", "sum", "max"))

    def made(function: Loss) -> Objective:
        if not callable(function):
            raise ValueError(f"function is {shown(function)}; expected one (maps, layout) -> loss")
        name = getattr(function, "__name__", type(function).__name__)
        found = Objective((Term(name, function, where, kind, reduce, needs_boxes=needs_boxes),), settings)
        if inspect.isfunction(function):
            # The decorated name now refers to the objective; with this name pickle finds the function inside it.
            function.__qualname__ += ".function"
        return found

    return made if function is None else made(function)
