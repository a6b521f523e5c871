"""What guidance saw and did: every evaluation of the objective, and a summary for each image."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass

from torch import Tensor
from torch.utils._pytree import tree_map_only


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One evaluation of the objective for a batch. NaN for images that had stopped.

    loss [B]; object_loss [B,O]; mass [B,O], each object's fraction of attention inside its mask; moved [B]: whether
    the image was then updated.
    """

    loss: Tensor
    object_loss: Tensor
    mass: Tensor
    moved: Tensor


@dataclass(frozen=True, eq=False)
class Report:
    """What guidance did to one image.

    steps: the guided steps; iterations: the updates in each. loss [S], object_loss [S,O] and mass [S,O] are those of
    each step's last evaluation, which precedes its last update if all iterations were used. first_mass [O] is each
    object's fraction of attention inside its mask before any update, NaN for one without a box or mask. placed [O]: how
    likely each object is in its box (the box around it, with an IoU of at least 0.5), by a look at the finished
    picture, or at the estimate of a run that was stopped, as measured with other pictures of 128x128 pixels; NaN for
    one without a box or mask, and where the picture is not a number. None where nothing was measured: for models other
    than the bundled one or with adapters or changed weights, with texts that change or edits that change masks, in
    previews, and where guidance could not act or the run ends in noise.
    """

    names: tuple[str, ...]
    steps: tuple[int, ...]
    iterations: tuple[int, ...]
    loss: Tensor
    object_loss: Tensor
    mass: Tensor
    first_mass: Tensor
    why_not: str | None = None
    placed: Tensor | None = None

    def __str__(self) -> str:
        return "; ".join(self._said())

    def _repr_html_(self) -> str:
        """For a notebook: the same as a list."""
        head, *objects = map(html.escape, self._said())
        return f"{head}<ul>{''.join(f'<li>{one}</li>' for one in objects)}</ul>" if objects else head

    def _said(self) -> list[str]:
        if self.why_not is not None:
            return [f"guidance did not act: {self.why_not}"]
        moves, steps = sum(self.iterations), sum(count > 0 for count in self.iterations)
        said = [f"guidance moved {_times(moves, 'time')} in {_times(steps, 'step')}"]
        chances = [math.nan] * len(self.names) if self.placed is None else self.placed.tolist()
        masses = zip(self.first_mass.tolist(), self.mass[-1].tolist(), strict=True)
        for name, (before, after), chance in zip(self.names, masses, chances, strict=True):
            if not math.isnan(before):  # NaN if only self-attention was read
                said.append(f"{name}: {before:.0%} -> {after:.0%} of its attention inside{_likely(chance)}")
        return said

    def plain(self) -> dict[str, object]:
        """The fields as JSON values: tensors as lists, null for NaN."""
        values = {name: value.tolist() if isinstance(value, Tensor) else value for name, value in vars(self).items()}
        return tree_map_only(float, lambda number: None if math.isnan(number) else number, values)


def _likely(chance: float) -> str:
    if math.isnan(chance):
        return ""
    return f", {chance:.0%} likely in its box" + ("; try more seeds or a larger box" if chance < 0.5 else "")


def _times(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
