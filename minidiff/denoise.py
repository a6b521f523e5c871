"""The network as the sampling loop calls it: classifier-free guidance, and texts that AND joins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from .apart import Apart
from .guidance.begins import Begins
from .guidance.guide import some_rows
from .guidance.updates import Updates
from .model import Model
from .networks.attention import Edit, Inputs, Maps, Record
from .networks.unet import DEEP


class Denoise:
    """The network as the sampling loop sees it, including classifier-free guidance.

    contexts, inputs: one for all steps, or one each. A context holds the conditional texts [B,L,D], or [uncond, cond]
    [2B,L,D] when the scale needs both, as `weights` [B,T] do: of T texts per image, joined by AND, which stand one
    behind the other in L; NaN where an image has fewer.
    interval: the noise levels (low, high], in sigma, in which the scale acts; outside, only the conditional half runs.
    every: the deep layers run in every n-th call, and their last result is reused in the others.
    apart: what takes regions apart in the first steps; maps are then those of a pass beside it.
    halves: return the unconditional output before the guided one, [2B,C,h,w], where the scale acts.
    watch: what is recorded for guidance, of which no maps are returned; not together with record, weights or every;
        nothing where edits have `update`. told: who else reads the inputs that those replace.
    begins: passes of the conditional half that looks may have begun; together with none of these but contexts, scales
        and interval.
    """

    def __init__(
        self,
        model: Model,
        contexts: Sequence[Tensor],
        scale: float,
        rescale: float,
        record: Record | None,
        edits: Sequence[Edit],
        inputs: Sequence[Inputs],
        weights: Tensor | None = None,
        interval: Sequence[float] | None = None,
        every: int = 1,
        watch: Watch | None = None,
        halves: bool = False,
        apart: Apart | None = None,
        told: Callable[[Inputs], None] | None = None,
        begins: Begins | None = None,
    ) -> None:
        self.both = halves or scale != 1 or weights is not None
        self.updates = Updates(edits, told)
        self.watch = None if self.updates.edits else watch
        edits = tuple(edit for edit in edits if edit.update is None)
        if self.updates.edits and (weights is not None or (self.both and record is not None and record.rows != "cond")):
            raise ValueError(
                "an edit with `update`, as of bounded_attention(refine=...), reads the conditional rows of one text an "
                'image; expected no texts joined by AND, and attention.rows "cond"'
            )
        if self.both and interval is not None and record is not None and record.rows != "cond":
            raise ValueError(
                f'attention.rows is "{record.rows}", but outside guidance_interval no unconditional rows run; expected '
                '"cond", or no guidance_interval'
            )
        if not self.both:  # there are no unconditional rows to leave out
            record = None if record is None else replace(record, rows=_only_rows("attention", record.rows))
            left = [edit for edit in edits if not any(_is_half(edit, other) for other in edits)]
            edits = tuple(replace(edit, rows=_only_rows("edit", edit.rows)) for edit in left)
        self.model, self.contexts, self.scale, self.rescale = model, contexts, scale, rescale
        self.record, self.edits, self.inputs, self.weights = record, edits, inputs, weights
        self.interval, self.every, self.halves, self.apart = interval, every, halves, apart
        self.begins = begins
        self._reused: dict[int, _Reused] = {}  # by text
        self._context = contexts[0]

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, sigma: float, index: int) -> tuple[Tensor, Maps]:
        """Predict from variance-preserving x in step `index`; returns float32 for any network dtype."""
        context = self.contexts[index if len(self.contexts) > 1 else 0]
        inputs = self.inputs[index if len(self.inputs) > 1 else 0]
        if context is not self._context:
            self._context = context
            self._reused.clear()
        inputs = {**inputs, **self.updates.found}
        edits = tuple(edit for edit in self.edits if edit.acts_in(index))
        watch = self.watch if self.watch is not None and index < self.watch.steps else None
        own = self.record if watch is None else watch.record
        record = self.updates.record(own, index)
        if record is not None or edits:
            inputs = {"t": t, "sigma": torch.full_like(t, sigma), "step": torch.full_like(t, index), **inputs}
        inside = self.interval is None or self.interval[0] < sigma <= self.interval[1]
        if self.weights is not None:
            uncond, cond, maps = self._composed(x, t, context, edits, inputs)
            return (self._guided(uncond, cond) if inside else cond), maps
        halves = self.both and inside
        if self.both and not inside:  # the conditional half alone
            context, edits = context[len(x) :], tuple(_alone(edits))
            inputs = {name: some_rows(value, range(len(x)), len(x)) for name, value in inputs.items()}
        if not halves and record is not None:
            record = replace(record, rows="all")
        apart = self.apart if self.apart is not None and index < self.apart.steps else None
        begun = None if self.begins is None else self.begins.take(len(x))
        if begun is not None and self.model.unet.is_plain():
            output, maps = self.model.unet.finish(begun, t, context).float(), {}
        elif apart is None or record is not None:
            output, maps = self._run(torch.cat([x, x]) if halves else x, t, context, record, edits, inputs)
        if apart is not None:
            maps = {} if record is None else maps
            output = apart(partial(self._window, t), x, context, inputs)
        if record is not None and self.updates.edits:
            maps = self.updates.take(maps, record, own, inputs, index)
        if watch is not None:
            watch.take(maps, inputs)
            maps = {}
        if not halves:
            return output, maps
        uncond, cond = output.chunk(2)
        return self._guided(uncond, cond), maps

    def _window(self, t: Tensor, x: Tensor, context: Tensor, edits: Sequence[Edit], inputs: Inputs) -> Tensor:
        output, _ = self.model.unet(x.to(self.model.dtype), t, context, None, edits, inputs)
        assert output is not None  # no stop
        return output.float()

    def _guided(self, uncond: Tensor, cond: Tensor) -> Tensor:
        found = guided(uncond, cond, self.scale, self.rescale)
        return torch.cat([uncond, found]) if self.halves else found

    def _run(
        self,
        x: Tensor,
        t: Tensor,
        context: Tensor,
        record: Record | None,
        edits: Sequence[Edit],
        inputs: Inputs,
        text: int = 0,
    ) -> tuple[Tensor, Maps]:
        """A pass of the network. text: which of several joined by AND."""
        unet, x = self.model.unet, x.to(context.dtype)
        if self.every == 1:
            output, maps = unet(x, t, context, record, edits, inputs)
        else:
            last = self._reused.get(text)
            needed = record is not None and any(unet.is_deep(site) for site in record.kinds)
            if last is None or needed or last.age == self.every or not last.serves(x, edits):
                output, maps = unet(x, t, context, record, edits, inputs, True)
                self._reused[text] = _Reused(maps.pop(DEEP), tuple(edits))
            else:
                output, maps = unet(x, t, context, record, edits, inputs, last.deep)
                self._reused[text] = replace(last, age=last.age + 1)
        assert output is not None  # no stop
        return output.float(), maps

    def _composed(
        self, x: Tensor, t: Tensor, context: Tensor, edits: Sequence[Edit], inputs: Inputs
    ) -> tuple[Tensor, Tensor, Maps]:
        """(uncond, uncond + sum of w * (cond - uncond) over an image's texts, maps): Liu et al. 2022, eq. 12.

        A pass for each text, the first one with the uncond rows. Maps of all tokens are joined along L.
        """
        assert self.weights is not None
        batch, weights = len(x), self.weights.to(x.device)
        length = context.shape[1] // weights.shape[1]
        alone = tuple(_alone(edits))
        record = self.record
        for n, own in enumerate(weights.mT):
            part = slice(n * length, (n + 1) * length)
            some = {name: value[..., part] if name in _OF_TOKENS else value for name, value in inputs.items()}
            if n == 0:
                output, maps = self._run(torch.cat([x, x]), t, context[:, part].contiguous(), record, edits, some)
                uncond, cond = output.chunk(2)
                mixed = uncond + own[:, None, None, None] * (cond - uncond)
                record = replace(record, rows="all") if record is not None and record.rows == "cond" else None
                continue
            rows = (~own.isnan()).nonzero().flatten()
            some = {name: some_rows(value, rows, batch) for name, value in some.items()}
            cond, more = self._run(x[rows], t, context[batch:][rows, part].contiguous(), record, alone, some, n)
            mixed = mixed.index_add(0, rows, own[rows, None, None, None] * (cond - uncond[rows]))
            for site, found in more.items():
                if record is not None and record.kinds[site].heads is not None:
                    maps[site] = torch.cat([maps[site], _in_rows(found, rows, batch)], dim=-1)
        return uncond, mixed, maps


@dataclass(frozen=True, eq=False)
class Watch:
    """What to record in the first `steps` steps, and who takes these maps and the inputs that they were made with."""

    record: Record
    steps: int
    take: Callable[[Maps, Inputs], None]


@dataclass(frozen=True, eq=False)
class _Reused:
    """What the deep layers returned [B,C,h,w] under which edits. age: calls since before them."""

    deep: Tensor
    edits: tuple[Edit, ...]
    age: int = 1

    def serves(self, x: Tensor, edits: Sequence[Edit]) -> bool:
        """Whether a call for these latents with these edits may reuse it."""
        return len(self.deep) == len(x) and self.edits == tuple(edits)


_OF_TOKENS = ("token_weights", "words", "unread")
"""The inputs whose last dimension is L."""


def _alone(edits: Sequence[Edit]) -> Iterator[Edit]:
    """The edits of a batch without unconditional rows."""
    return (replace(edit, rows="all") for edit in edits if edit.rows != "uncond")


def _is_half(edit: Edit, other: Edit) -> bool:
    """Whether it does to unconditional rows what another does to the conditional ones."""
    if edit.rows != "uncond" or other.rows == "uncond":
        return False
    assert isinstance(edit.sites, frozenset) and isinstance(other.sites, frozenset)  # chosen
    same = (edit.bias, edit.probs, edit.logits, edit.kv) == (other.bias, other.probs, other.logits, other.kv)
    return same and edit.sites <= other.sites


def _in_rows(found: Tensor, rows: Tensor, batch: int) -> Tensor:
    """[n,...] in some rows of [B,...], zeros in the others."""
    return found.new_zeros(batch, *found.shape[1:]).index_copy(0, rows, found)


def guided(uncond: Tensor, cond: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022, eq. 6), with the rescaling of Lin et al. 2023, eq. 15-16.

    All [B,C,h,w]; the standard deviation is per image.
    """
    mixed = uncond + scale * (cond - uncond)
    if rescale == 0:
        return mixed
    spread = cond.std(dim=(1, 2, 3), keepdim=True) / mixed.std(dim=(1, 2, 3), keepdim=True)
    return rescale * (mixed * spread) + (1 - rescale) * mixed


def _only_rows(name: str, rows: str) -> Literal["all"]:
    if rows == "uncond":
        raise ValueError(
            f'{name}.rows is "uncond", but guidance_scale 1 runs no unconditional rows; '
            'expected "cond" or "all", or a larger scale'
        )
    return "all"
