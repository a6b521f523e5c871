"""The network as the sampling loop calls it: classifier-free guidance, and texts that AND joins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from .guidance.guide import some_rows
from .model import Model
from .networks.attention import Edit, Inputs, Maps, Record


class Denoise:
    """The network as the sampling loop sees it, including classifier-free guidance.

    contexts, inputs: one for all steps, or one each. A context holds the conditional texts [B,L,D], or [uncond, cond]
    [2B,L,D] when the scale needs both, as `weights` [B,T] do: of T texts per image, joined by AND, which stand one
    behind the other in L; NaN where an image has fewer.
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
    ) -> None:
        self.both = scale != 1 or weights is not None
        if not self.both:  # there are no unconditional rows to leave out
            record = None if record is None else replace(record, rows=_only_rows("attention", record.rows))
            edits = tuple(replace(edit, rows=_only_rows("edit", edit.rows)) for edit in edits)
        self.model, self.contexts, self.scale, self.rescale = model, contexts, scale, rescale
        self.record, self.edits, self.inputs, self.weights = record, edits, inputs, weights

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, sigma: float, index: int) -> tuple[Tensor, Maps]:
        """Predict from variance-preserving x in step `index`; returns float32 for any network dtype."""
        context = self.contexts[index if len(self.contexts) > 1 else 0]
        inputs = self.inputs[index if len(self.inputs) > 1 else 0]
        edits = tuple(edit for edit in self.edits if edit.acts_in(index))
        if self.record is not None or edits:
            inputs = {"t": t, "sigma": torch.full_like(t, sigma), **inputs}
        if self.weights is not None:
            uncond, cond, maps = self._composed(x, t, context, edits, inputs)
        else:
            output, maps = self._run(torch.cat([x, x]) if self.both else x, t, context, self.record, edits, inputs)
            if not self.both:
                return output, maps
            uncond, cond = output.chunk(2)
        return guided(uncond, cond, self.scale, self.rescale), maps

    def _run(
        self, x: Tensor, t: Tensor, context: Tensor, record: Record | None, edits: Sequence[Edit], inputs: Inputs
    ) -> tuple[Tensor, Maps]:
        output, maps = self.model.unet(x.to(self.model.dtype), t, context, record, edits, inputs)
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
        alone = tuple(replace(edit, rows="all") for edit in edits if edit.rows != "uncond")
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
            cond, more = self._run(x[rows], t, context[batch:][rows, part].contiguous(), record, alone, some)
            mixed = mixed.index_add(0, rows, own[rows, None, None, None] * (cond - uncond[rows]))
            for site, found in more.items():
                if record is not None and record.kinds[site].heads is not None:
                    maps[site] = torch.cat([maps[site], _in_rows(found, rows, batch)], dim=-1)
        return uncond, mixed, maps


_OF_TOKENS = ("token_weights", "words", "unread")
"""The inputs whose last dimension is L."""


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
