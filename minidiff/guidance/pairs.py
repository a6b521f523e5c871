"""Edits of several pictures of one call, whose attention takes from the first one's.

    pair = ["a red circle and a blue square", "a green circle and a blue square"]
    alignment = model.text.alignment(pair)
    edits, inputs = minidiff.prompt_to_prompt(), {"alignment": alignment}
    first, changed = minidiff.generate(pair, model=model, seed=[1, 1], edits=edits, inputs=inputs).images

The pictures begin with the same noise, so their seeds are equal. Not for a call with guidance by objectives, which
leaves images out once they need no more of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..checks import shown
from ..networks.attention import GUIDED, Edit, Inputs, read_input
from ..networks.sites import Site, Where, cross, level, place, self_
from ..vocabulary import own_keywords

if TYPE_CHECKING:
    Steps = int | float | tuple[int, int] | None

DECODER = self_ & place("up")
FINE = level(0) | level(1) | level(2)  # 32x32 and coarser in SD 1.5 at 512 pixels


@own_keywords
def prompt_to_prompt(cross_steps: Steps = 0.8, self_steps: Steps = 0.4) -> tuple[Edit, Edit]:
    """Every picture has the layout of the first: its attention to the words they share, and its self-attention.

    Hertz et al. 2022 ("Prompt-to-prompt image editing with cross attention control"), eq. 6 to 8. Which token of a
    prompt takes which of the first one's attention stands in `inputs["alignment"]` [B,L,L], which
    `model.text.alignment(prompts)` gives. steps as in `Edit`: 0.8 and 0.4 of the run, as in the paper's code.
    """
    return (
        Edit(cross, probs=_words_of_first, steps=cross_steps),
        Edit(self_ & FINE, probs=_pixels_of_first, steps=self_steps),
    )


@own_keywords
def masactrl(sites: Where | frozenset[Site] = DECODER, steps: Steps = (4, 1000)) -> tuple[Edit, Edit]:
    """Every picture looks at the first one's pixels for what things look like, but has a layout of its own.

    Cao et al. 2023 ("MasaCtrl"), eq. 5: keys and values of self-attention are the first picture's, in both rows, from
    step 4 on. Deviation: in the whole decoder, where the paper takes its layers from 32x32 on (in SD 1.5
    `sites=self_ & (block("up", 2) | block("up", 3))`), which small networks do not have.
    """
    return Edit(sites, kv=_of_first, steps=steps), Edit(sites, kv=_of_first, rows="uncond", steps=steps)


def _words_of_first(site: Site, probs: Tensor, inputs: Inputs) -> Tensor:
    """probs [B,H,h,w,L]; alignment [B,L,L], from a token of the first prompt to one of each."""
    _check(inputs)
    alignment = read_input(inputs, "alignment", 'inputs={"alignment": model.text.alignment(prompts)}').to(probs)
    if alignment.shape != (len(probs), probs.shape[-1], probs.shape[-1]):
        raise ValueError(
            f"alignment is {shown(alignment)}; expected {[len(probs), probs.shape[-1], probs.shape[-1]]}, as "
            "model.text.alignment(prompts) gives for the prompts of the call, without regions and images_per_prompt"
        )
    own = alignment.sum(dim=1) == 0  # tokens that take nothing
    return probs[:1] @ alignment[:, None, None] + own[:, None, None, None] * probs


def _pixels_of_first(site: Site, probs: Tensor, inputs: Inputs) -> Tensor:
    _check(inputs)
    return probs[:1].expand_as(probs)


def _of_first(site: Site, k: Tensor, v: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    _check(inputs)
    return k[:1].expand_as(k), v[:1].expand_as(v)


def _check(inputs: Inputs) -> None:
    if GUIDED in inputs:
        raise ValueError(
            "prompt_to_prompt and masactrl take from the first picture of the batch, which guidance may leave out; "
            'expected guidance="none"'
        )


def takes_from_first(edit: Edit) -> bool:
    """Whether it is one of these edits."""
    return edit.kv is _of_first or edit.probs in (_words_of_first, _pixels_of_first)
