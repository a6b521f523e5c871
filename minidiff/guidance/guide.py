"""Guidance: gradient descent of the latents on an attention objective, before each sampling step.

Chen, Laina and Vedaldi 2024, eq. 5, in variance-preserving latents: x <- x - scale * (1 - abar) * grad L. In their
latents, scaled by 1 / sqrt(abar), it is x - scale * sigma^2 * grad L; this form is the same for every sampler.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial, reduce as fold
from itertools import pairwise
from operator import add
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..checks import Check, checked, choice, is_number, number, one_or_each, shown, switch, whole
from ..networks.attention import GUIDED, Edit, Inputs, Maps, mask_name
from ..networks.sites import Position, Site, Where, read_sites
from ..vocabulary import OBJECTIVES as NAMES, own_keywords
from .begins import Begins
from .evaluate import Evaluated, Forward, Looked, evaluate, look_loss, plainly
from .objectives import OBJECTIVES, Objective, Settings
from .objectives._objective import PerStep, StepRule
from .objectives.layout import layout_loss
from .report import Evaluation, Report
from .stretch import UsualSizes

if TYPE_CHECKING:
    from .layout import Layout

MOST_STEPS = MOST_ITERATIONS = 1000  # no model has more timesteps; an iteration is one forward and backward pass
STEP_RULES = ("variance", "plain", "unit")
_CHECKS: Mapping[str, Check] = MappingProxyType(
    {
        "scale": partial(one_or_each, check=partial(number, least=0)),
        "threshold": partial(one_or_each, check=partial(number, least=0)),
        "iterations": partial(one_or_each, check=partial(whole, least=0, most=MOST_ITERATIONS)),
        "steps": partial(
            whole,
            least=0,
            most=MOST_STEPS,
            expected="how many of the first steps are guided, 0 to 1000, or a fraction between 0 and 1",
        ),
        "step_rule": partial(choice, choices=STEP_RULES),
        "watch": switch,
        "passes": partial(whole, least=1, most=MOST_STEPS * MOST_ITERATIONS),
        "early": switch,
        "usual_sizes": UsualSizes.read,
    }
)
_SETTINGS = tuple(field.name for field in fields(Settings))
_FIELDS = tuple(_CHECKS)


@own_keywords
@dataclass(frozen=True)
class Guidance:
    """How to guide. Fields left as None take the objective's published settings.

    objective: one of minidiff's, a sum of them, or your own.
    scale: step size. threshold: loss above which an image is updated, tested afresh at every step.
    iterations: maximum updates per sampler call, i.e. per step, except PNDM's first, which has two calls. These three
        are each a number, or a tuple with one value per guided step.
    steps: how many of the run's first steps are guided, or, in (0,1), which fraction of them.
    sites: where attention is read, instead of the objective's own: a choice (`cross & level(1)`) or a set.
    step_rule: "variance" moves by scale * (1 - abar) * grad, "plain" by scale * grad; "unit" is "variance" with each
        image's gradient normalised to a root mean square of 1, so that step sizes do not depend on its magnitude.
    watch: also evaluate the objective on the maps of the sampling step itself, and look before the next step only at
        images whose loss there is above the threshold: no pass of the network to find that nothing is to be done. Not
        with recorded attention, reused layers (cache_interval), texts that change, AND, or edits with `update`, where
        all looks are made.
    passes: at most so many updates of an image in the run, in place of `iterations`: spread over the guided steps, of
        which the first take the remainder; with `early` in linear decline, since places are settled before sizes.
    usual_sizes: objects with boxes of others are placed without regard to their size, which `extent_loss` leaves alone,
        and stretched to it in the finished picture (maps and previews show their own size); not in pictures that start
        from an image or latents. None: no object is.
    """

    objective: Objective = layout_loss
    scale: PerStep | None = None
    threshold: PerStep | None = None
    iterations: int | tuple[int, ...] | None = None
    steps: int | float | None = None
    sites: Where | frozenset[Site] | None = None
    step_rule: StepRule | None = None
    watch: bool = False
    passes: int | None = None
    early: bool = False
    usual_sizes: UsualSizes | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.objective, Objective):
            raise ValueError(
                f"objective is {shown(self.objective)}; expected one such as minidiff.layout_loss, a sum of several, "
                "or your own function under @minidiff.objective"
            )
        for name in _SETTINGS:
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(self.objective.settings, name))
        if self.early and self.passes is None:
            raise ValueError("early is True without passes; expected passes=25, say, which it spreads")
        fraction = isinstance(self.steps, float) and 0 < self.steps < 1
        there = [name for name in _FIELDS if getattr(self, name) is not None]
        given = {name: getattr(self, name) for name in there if not (fraction and name == "steps")}
        for name, value in checked(given, _CHECKS).items():
            object.__setattr__(self, name, value)
        if self.sites is not None:
            object.__setattr__(self, "sites", read_sites("sites", self.sites))
        for name in ("scale", "threshold", "iterations"):
            _check_length(name, getattr(self, name), None if fraction else self.steps)

    def of_run(self, steps: int, there: Mapping[Site, Position]) -> Guidance:
        """The same for a run of `steps` steps of a UNet with these sites: a fraction becomes a number."""
        number = self.guided(steps)
        iterations = self.iterations
        if self.passes is not None and number > 0:
            number = min(number, steps)
            iterations = self.spread(self.passes, number)
        objective = self.objective.bound(there, self.sites)
        return replace(self, steps=number, iterations=iterations, objective=objective)

    def guided(self, steps: int) -> int:
        """How many steps of a run are guided; it may have fewer."""
        assert self.steps is not None
        return self.steps if isinstance(self.steps, int) else round(self.steps * steps)

    def spread(self, passes: int, steps: int) -> tuple[int, ...]:
        """The passes of each of the guided steps."""
        if not self.early:
            return tuple(passes // steps + (i < passes % steps) for i in range(steps))
        left = [round(passes * (1 - i / steps) ** 2) for i in range(steps + 1)]
        return tuple(before - after for before, after in pairwise(left))

    def without(self, name: str) -> Guidance:
        """The same without the terms of a name, unless there are no others."""
        terms = tuple(term for term in self.objective.terms if term.name != name)
        return replace(self, objective=replace(self.objective, terms=terms)) if terms else self

    def at(self, index: int) -> tuple[float, float, int]:
        """Scale, threshold and iterations of a step; 0 iterations after the last guided one."""
        assert isinstance(self.steps, int)  # of_run
        if index >= self.steps:
            return 0.0, 0.0, 0
        scale, threshold, iterations = (
            value[index] if isinstance(value, tuple) else value
            for value in (self.scale, self.threshold, self.iterations)
        )
        assert scale is not None and threshold is not None and iterations is not None
        return scale, threshold, int(iterations)

    @property
    def acts(self) -> bool:
        """True if any step may update the latents."""
        assert isinstance(self.steps, int)  # of_run
        return any(self.at(index)[2] > 0 and self.at(index)[0] > 0 for index in range(self.steps))

    @classmethod
    def read(cls, value: Guidance | Objective | str | Mapping[str, object]) -> Guidance:
        """Read the value of a caller or a config: a Guidance, an objective, its name, or a mapping of the fields, where
        the objective is a name or {name: weight, ...}.
        """
        if isinstance(value, Guidance):
            return value
        if isinstance(value, Objective):
            return cls(value)
        if isinstance(value, str):
            return cls(_named(value))
        if not isinstance(value, Mapping) or not value.keys() <= {"objective", *_FIELDS}:
            hint = ". For classifier-free guidance use guidance_scale" if is_number(value) else ""
            raise ValueError(
                f"guidance is {shown(value)}; expected a minidiff.Guidance, an objective, one of {', '.join(NAMES)}, "
                f"or a mapping with some of objective, {', '.join(_FIELDS)}{hint}"
            )
        given = {name: tuple(one) if isinstance(one, list) else one for name, one in value.items()}
        names = given.pop("objective", "layout")
        weighted = names.items() if isinstance(names, Mapping) else [(names, 1.0)]
        if not weighted:
            raise ValueError("guidance has an empty objective; expected a name, or names with weights")
        return cls(fold(add, [_named(name) * weight for name, weight in weighted]), **given)  # type: ignore[arg-type]

    def plain(self) -> dict[str, object] | Guidance:
        """A mapping that `read` accepts, if it can express this value; otherwise the value itself."""
        weights = {term.name.removesuffix("_loss"): term.weight for term in self.objective.terms}
        named = [OBJECTIVES[name].terms[0] for name in weights if name in NAMES]
        if self.sites is not None or [replace(term, weight=1.0) for term in self.objective.terms] != named:
            return self
        own = [name for name in _FIELDS if name in _SETTINGS or getattr(self, name)]
        sizes = {} if self.usual_sizes is None else {"usual_sizes": asdict(self.usual_sizes)}
        return {"objective": weights, **{name: getattr(self, name) for name in own}, **sizes}


def _named(name: object) -> Objective:
    return OBJECTIVES[choice("guidance", name, NAMES)]


def _check_length(name: str, value: object, steps: float | None) -> None:
    """One number for all guided steps, or one per step."""
    if isinstance(value, tuple) and (steps is None or len(value) < steps):
        raise ValueError(
            f"{name} holds {len(value)} values for {'a fraction of the' if steps is None else steps} guided steps; "
            "expected one per step, with steps as a whole number, or one for all"
        )


class Guide:
    """Updates a run's latents before each step, and records its evaluations. The sampling loop calls `refine`.

    guidance, edits: with their sites chosen. context [B,L,D]: the conditional one; guided passes run no other.
    inputs: what keeps and edits read, the layout's included; default: the layout's alone.
    each_step: context, layout and inputs of every step, where they change.
    whole_batch: keep stopped images in the batch without updating them, since a compiled graph needs a fixed size.
    loss: `look_loss`, or the same compiled.
    run: what runs a look's stages as captured graphs; None: they run as they are.
    begins: whose `forward` this is, if steps go on with looks that move nothing.
    """

    def __init__(
        self,
        guidance: Guidance,
        forward: Forward,
        context: Tensor,
        layout: Layout,
        names: Sequence[Sequence[str]],
        edits: Sequence[Edit] = (),
        inputs: Inputs | None = None,
        whole_batch: bool = False,
        loss: Callable[..., Looked] = look_loss,
        each_step: Sequence[tuple[Tensor, Layout, Inputs]] = (),
        run: Callable[..., Generator[Any]] | None = None,
        begins: Begins | None = None,
    ) -> None:
        self.begins, self.each_step, self.run = begins, each_step, run or plainly
        self.guidance, self.forward, self.context, self.layout, self.names = guidance, forward, context, layout, names
        self.record = guidance.objective.record
        acting = [edit for edit in edits if edit.rows != "uncond" and edit.update is None]
        self.edits = tuple(replace(edit, rows="all") for edit in acting)
        self.updated: Inputs = {}
        self.inputs = layout.inputs() if inputs is None else inputs
        self.whole_batch, self.loss = whole_batch, loss
        self.seen: dict[int, list[Evaluation]] = {}
        self._ahead: list[float] | None = None  # each image's loss in the step before
        self._guided = _with_objects(layout)
        placed = [(mask > 0).flatten(2).any(dim=2) for mask in layout.masks.values()][:1]
        self._placeless = [(~some & (layout.weights > 0)).cpu() for some in placed]

    def refine(self, x: Tensor, t: Tensor, abar: float, index: int) -> Tensor:
        """x [B,4,h,w], variance-preserving -> updated x; x itself if there is nothing to update."""
        scale, threshold, iterations = self.guidance.at(index)
        size = scale if self.guidance.step_rule == "plain" else scale * (1 - abar)
        if scale == 0:
            return x
        self.turn_to(index)
        left = [row for row in self._guided if self._ahead is None or self._ahead[row] > threshold]
        moved = x
        looks = [] if self.guidance.passes is None else self.seen.get(index, [])  # PNDM's first step has two calls
        done = [sum(not look.loss[row].isnan() for look in looks) for row in range(len(x))]
        for n in range(iterations):
            left = [row for row in left if n + done[row] < iterations]
            if not left:
                break
            rows = range(len(x)) if self.whole_batch else left
            limits = torch.tensor([threshold if row in left else math.inf for row in rows], device="cpu")
            gradient, found = self.look(some_rows(moved, rows, len(x)), t, abar, rows, index, limits)
            self._remember(index, len(x), rows, found, limits)
            going = [i for i, moves in enumerate((found[0] > limits).tolist()) if moves]
            if self.begins is not None:
                self.begins.keep(rows, going)
            if gradient is None:
                break
            left = [rows[i] for i in going]
            if self.guidance.step_rule == "unit":
                gradient = gradient / gradient.square().mean(dim=(1, 2, 3), keepdim=True).sqrt().clamp_min(1e-12)
            step = size * gradient.to(x.dtype)
            if len(left) == len(x):
                moved = moved - step
            else:  # 0 * NaN is NaN: stopped images are copied from x, not updated by a zero step
                there = row_index(left, x.device)
                moved = moved.index_copy(0, there, moved[there] - step[row_index(going, x.device)])
        return moved

    def turn_to(self, index: int) -> None:
        """Take what a step reads, where that changes."""
        if self.each_step:
            self.context, self.layout, self.inputs = self.each_step[index]
            self._guided = _with_objects(self.layout)
        if self.updated:
            self.inputs = {**self.inputs, **self.updated}
            masks = {grid: self.inputs[mask_name(grid)] for grid in self.layout.masks}
            self.layout = self.layout._replace(masks=masks)

    def take(self, maps: Maps, inputs: Inputs) -> None:
        """Take the maps that `record` keeps in a sampling step, which decide where the next `refine` looks."""
        total, _, _ = self.guidance.objective.look(maps, self.layout, inputs)
        self._ahead = total.tolist()

    def update(self, inputs: Inputs) -> None:
        """Take inputs that replace its own, masks included, from now on; others would make new graphs."""
        self.updated = {name: value for name, value in inputs.items() if name in self.inputs}

    def look(
        self, x: Tensor, t: Tensor, abar: float, rows: Sequence[int], index: int, limits: Tensor | None
    ) -> Evaluated:
        """The gradient, where a loss is above its limit, and the evaluation for some of the images."""
        read = (self.forward, self.guidance.objective, self.record, *self.read(t, abar, rows, index))
        # detached: the update does not differentiate through x's history, compiled or not
        arguments: tuple[Any, ...] = (x.detach(), *read)
        with torch.inference_mode(False):  # inference mode gives zero gradients in torch 2.11
            return evaluate(*tree_map_only(Tensor, _usable, arguments), threshold=limits, loss=self.loss, run=self.run)

    def read(
        self, t: Tensor, abar: float, rows: Sequence[int], index: int
    ) -> tuple[tuple[Edit, ...], Tensor, Tensor, Layout, Inputs]:
        """What a pass for some of the images reads besides x: edits, t, context, layout and inputs."""
        batch = len(self.context)
        own = {name: some_rows(value, rows, batch) for name, value in self.inputs.items()}
        inputs = {"t": t, "sigma": torch.full_like(t, math.sqrt((1 - abar) / abar)), "step": torch.full_like(t, index)}
        inputs = {**inputs, GUIDED: torch.ones_like(t), **own}
        edits = tuple(edit for edit in self.edits if edit.acts_in(index))
        layout = self.layout if len(rows) == batch else self.layout.images(row_index(rows, t.device))
        return edits, t, some_rows(self.context, rows, batch), layout, inputs

    def _remember(self, index: int, batch: int, rows: Sequence[int], found: Sequence[Tensor], limits: Tensor) -> None:
        live = limits < math.inf
        at = torch.tensor(rows, device="cpu")[live]
        loss, object_loss, mass = (
            value.new_full((batch, *value.shape[1:]), math.nan).index_copy(0, at, value[live]).float()
            for value in found
        )
        for objects in self._placeless:  # without a mask there is no mass inside
            mass = mass.masked_fill(objects, math.nan)
        moved = torch.zeros(batch, dtype=torch.bool, device="cpu").index_copy(0, at, (found[0] > limits)[live])
        self.seen.setdefault(index, []).append(Evaluation(loss, object_loss, mass, moved))

    def report(self, image: int) -> Report:
        """The report of one image, up to the current step."""
        names = tuple(self.names[image])
        some = ((n, [look for look in looks if not look.loss[image].isnan()]) for n, looks in self.seen.items())
        own = {index: looks for index, looks in some if looks}
        if not own:
            none = torch.zeros(0, len(names), dtype=torch.float32, device="cpu")
            return Report(names, (), (), none.sum(dim=1), none, none, none.sum(dim=0), self._why_not(names))
        iterations = tuple(sum(bool(look.moved[image]) for look in looks) for looks in own.values())
        ends = [looks[-1] for looks in own.values()]
        loss, why_not = torch.stack([look.loss[image] for look in ends]), None
        if sum(iterations) == 0:
            limits = [self.guidance.at(index)[1] for index in own]
            why_not = f"its loss was at most {float(loss.max()):.3g}, its threshold at least {min(limits):g}"
        return Report(
            names,
            tuple(own),
            iterations,
            loss,
            torch.stack([look.object_loss[image, : len(names)] for look in ends]),
            torch.stack([look.mass[image, : len(names)] for look in ends]),
            next(iter(own.values()))[0].mass[image, : len(names)],
            why_not,
        )

    def _why_not(self, names: Sequence[str]) -> str:
        if not names:
            return "there are no boxes"
        if self.seen:
            return "its loss was not a number (NaN)"
        return "iterations, steps or scale is 0" if not self.guidance.acts else "no step has been guided yet"


def _usable(value: Tensor) -> Tensor:
    """Copy tensors created in inference mode, which autograd cannot save for backward."""
    return value.clone() if value.is_inference() else value


def some_rows(value: Tensor, rows: Tensor | Sequence[int], batch: int) -> Tensor:
    """An input of a forward pass for some of the images; unchanged if it has one row for all."""
    if value.ndim == 0 or len(value) not in (batch, 2 * batch) or len(value) == 1:
        return value
    cond = value[-batch:]  # the conditional half of [uncond, cond]
    return cond if len(rows) == batch else cond[row_index(rows, value.device)]


def _with_objects(layout: Layout) -> list[int]:
    """The images that have any."""
    found: list[int] = (layout.weights > 0).any(dim=1).cpu().nonzero().flatten().tolist()
    return found


def row_index(rows: Tensor | Sequence[int], device: torch.device) -> Tensor:
    """On the device without a wait for it."""
    return rows if isinstance(rows, Tensor) else torch.tensor(rows, device="cpu").to(device, non_blocking=True)
