"""Gradient-free attention edits. They read the layout that `boxes` adds to the inputs of a forward pass.

    minidiff.generate(prompt, boxes=boxes, guidance="none", edits=minidiff.forward_guidance(0.8))

Strengths are part of the edit, which is static: a compiled model recompiles for each new value.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import number
from ..networks.attention import GUIDED, Edit, Inputs, mask_name, read_input
from ..networks.sites import Grid, Site, Where, block, cross, self_
from ..vocabulary import own_keywords
from .objectives._maps import constants
from .segments import Refined

Sites = Where | frozenset[Site]
Steps = int | float | tuple[int, int] | None


@own_keywords
def forward_guidance(strength: float = 0.8, sites: Sites = cross, steps: Steps = None) -> Edit:
    """Blend the attention to each object's tokens with a smoothed box of the same mass.

    P' = (1 - strength) P + strength * g * sum_u P, where g is the smoothed mask, normalised to sum to 1: Chen, Laina
    and Vedaldi 2024, eq. 2 and 3 (no code released). As there, a pixel's probabilities then no longer sum to 1.
    strength in [0,1]; steps as in `Edit`.
    """
    return Edit(sites, probs=_Forward(number("strength", strength, 0, 1.0)), steps=steps)


@dataclass(frozen=True)
class _Forward:
    strength: float

    def __call__(self, site: Site, probs: Tensor, inputs: Inputs) -> Tensor:
        """probs [B,H,h,w,L]."""
        masks, owned = (found.to(probs) for found in _masks((probs.shape[2], probs.shape[3]), inputs))
        kernel = constants(probs, 0.25, 0.5, 0.25)
        flat = F.pad(masks.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="replicate")
        smooth = F.conv2d(flat, (kernel[:, None] * kernel)[None, None])[:, 0].unflatten(0, masks.shape[:2])
        shape = smooth / smooth.sum(dim=(2, 3), keepdim=True).clamp_min(1e-8)
        # A token shared by several objects gets the mean of their boxes.
        wanted = torch.einsum("boyx,bol->byxl", shape, owned / owned.sum(dim=1, keepdim=True).clamp_min(1))[:, None]
        mixed = (1 - self.strength) * probs + self.strength * wanted * probs.sum(dim=(2, 3), keepdim=True)
        return torch.where(owned.any(dim=1)[:, None, None, None], mixed, probs)


@own_keywords
def regional_prompting(strength: float = 8.0, sites: Sites = cross, steps: Steps = None) -> Edit:
    """Confine the attention to each object's tokens to its boxes: add `-strength` to their logits outside, less on
    partly covered cells. Keeps the fused kernel. 0 changes nothing, 20 suppresses all attention outside.
    """
    return Edit(sites, bias=_Regional(number("strength", strength, 0, 1e4)), steps=steps)


@dataclass(frozen=True)
class _Regional:
    strength: float

    def __call__(self, site: Site, grid: Grid, inputs: Inputs) -> Tensor:
        """[B,1,h,w,L]."""
        masks, owned = _masks(grid, inputs)
        inside = (masks[..., None] * owned[:, :, None, None]).amax(dim=1)  # max over the objects that own the token
        return (self.strength * (inside - 1) * owned.amax(dim=1)[:, None, None])[:, None]


@own_keywords
def dense_diffusion(
    cross_weight: float = 1.0,
    self_weight: float = 0.3,
    sites: Sites = cross | self_,
    steps: Steps = 0.3,
) -> Edit:
    """Pull the logits of a mask's pixels to its own tokens and pixels up to the row's maximum, all others down to its
    minimum, by weight * (1 - the mask's area) * (t / 1000)^5 of the way.

    Kim et al. 2023 ("Dense text-to-image generation with attention modulation"), eq. 3 to 6. Deviation: the paper's
    masks cover the picture; outside of all masks only the objects' tokens are pulled, and self-attention is not.
    """
    weights = number("cross_weight", cross_weight, 0, 10.0), number("self_weight", self_weight, 0, 10.0)
    return Edit(sites, logits=_Dense(*weights), steps=steps)


@dataclass(frozen=True)
class _Dense:
    cross: float
    self: float

    def __call__(self, site: Site, logits: Tensor, inputs: Inputs) -> Tensor:
        """logits [B,H,h,w,L]."""
        masks, owned = (one.to(logits) for one in _masks((logits.shape[2], logits.shape[3]), inputs))
        inside = _cells(masks)
        there = inside.amax(dim=1)[..., None]  # [B,h,w,1]
        area = torch.einsum("boyx,bo->byx", inside, inside.mean(dim=(2, 3))).clamp(max=1)[..., None]
        targets = owned if site.kind == "cross" else inside.flatten(2)
        own = torch.einsum("boyx,bol->byxl", inside, targets).clamp(max=1)
        acts = torch.maximum(there, owned.amax(dim=1)[:, None, None]) if site.kind == "cross" else there
        t = read_input(inputs, "t", "a step's")
        far = (getattr(self, site.kind) * (t / 1000) ** 5 * (1 - area) * acts)[:, None]
        most, least = logits.amax(dim=-1, keepdim=True), logits.amin(dim=-1, keepdim=True)
        return logits + far.to(logits) * (torch.where(own[:, None] > 0, most, least) - logits)


@own_keywords
def attention_injection(strength: float = 0.75, sites: Sites = cross, steps: Steps = 0.2) -> Edit:
    """Add strength * ln(1 + sigma) * (the image's maximum logit) to the logits of each object's tokens in its mask.

    Patel and Serkh 2024 (iLGD), after Balaji et al. 2022 ("eDiff-I"), section 4.3. Deviation: the maximum is an
    image's own, so that it does not depend on the others of its batch. `guidance="ilgd"` is the paper's other half.
    """
    return Edit(sites, logits=_Injected(number("strength", strength, 0, 100.0)), steps=steps)


@dataclass(frozen=True)
class _Injected:
    strength: float

    def __call__(self, site: Site, logits: Tensor, inputs: Inputs) -> Tensor:
        """logits [B,H,h,w,L]."""
        masks, owned = _masks((logits.shape[2], logits.shape[3]), inputs)
        inside = (masks[..., None] * owned[:, :, None, None]).amax(dim=1)[:, None]  # [B,1,h,w,L]
        sigma = read_input(inputs, "sigma", "a step's")
        return logits + (self.strength * sigma.log1p() * inside).to(logits) * logits.amax(
            dim=(1, 2, 3, 4), keepdim=True
        )


@own_keywords
def bounded_attention(refine: float | None = None) -> tuple[Edit, ...]:
    """Masks so that an object sees neither another's words nor another's pixels, for `edits=`, in all steps.

    Dahary et al. 2024 ("Be Yourself: Bounded attention"), section 4.2: an object's tokens are seen in its mask only,
    while guiding also in the background; the end marker is seen in masks only, while guiding everywhere; a mask's
    pixels see those of other masks nowhere, in the unconditional row too. Made for `guidance="bounded_attention"`.
    refine: t / 1000, in (0,1], below which the masks are made anew in each step, of clusters of the self-attention at
    `block("up", 1)`; 0.7 is about the paper's step 15 of 50, of SD's 1000 timesteps. None: they stay.
    Deviations: function words are not hidden, and refined masks are made in each step, not in every fifth.
    """
    edits = Edit(cross | self_, bias=_bounded), Edit(self_, bias=_bounded, rows="uncond")
    if refine is None:
        return edits
    return *edits, Edit(block("up", 1), update=Refined(number("refine", refine, 0, 1.0)))


def _bounded(site: Site, grid: Grid, inputs: Inputs) -> Tensor:
    """[B,1,h,w,L]."""
    masks, owned = _masks(grid, inputs)
    inside = _cells(masks)
    there = inside.amax(dim=1)[..., None]  # [B,h,w,1]
    if site.kind == "self":
        flat = inside.flatten(2)
        own = torch.einsum("boyx,bov->byxv", inside, flat)
        hidden = there * flat.amax(dim=1)[:, None, None] * (own == 0)
        return -_HIDDEN * hidden[:, None]
    own = torch.einsum("boyx,bol->byxl", inside, owned) > 0
    named = owned.amax(dim=1)[:, None, None]  # [B,1,1,L]
    words = read_input(inputs, "words")
    end = F.pad(words, (1, 0))[:, :-1] * (1 - words)  # right behind them
    if GUIDED in inputs:
        return -_HIDDEN * (named * ~own * there)[:, None]
    return -_HIDDEN * torch.maximum(named * ~own, end[:, None, None] * (1 - there))[:, None]


_HIDDEN = 1e4  # float16 holds it


@own_keywords
def reweight(sites: Sites = cross, steps: Steps = None) -> Edit:
    """Multiply the attention to each token by `inputs["word_weights"]`, [B,L] or [1,L]; by 1 beyond its L.

    Prompt-to-prompt's attention re-weighting: Hertz et al. 2022, section 3.2. As there, a pixel's probabilities then no
    longer sum to 1. `model.text.word_weights(prompt, {"ball": 2.0})` returns the weights.
    """
    return Edit(sites, probs=_reweighted, steps=steps)


def _reweighted(site: Site, probs: Tensor, inputs: Inputs) -> Tensor:
    weights = read_input(inputs, "word_weights", 'inputs={"word_weights": ...}').to(probs)
    rest = probs.shape[-1] - weights.shape[-1]  # tokens of regions
    return probs * F.pad(weights, (0, max(rest, 0)), value=1.0)[:, None, None, None]


def reads_boxes(edit: Edit) -> bool:
    """Whether it is one of these that follow boxes."""
    parts = edit.bias, edit.logits, edit.probs, edit.update
    return edit.bias is _bounded or any(isinstance(one, _Forward | _Regional | _Dense | _Injected) for one in parts)


def _cells(masks: Tensor) -> Tensor:
    """1 for the cells that a mask [B,O,h,w] half covers (of its most covered one), else 0."""
    most = masks.amax(dim=(2, 3), keepdim=True)
    return ((masks >= 0.5 * most) & (most > 0)).to(masks.dtype)


def _masks(grid: Grid, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Object masks [B,O,h,w] and token ownership [B,O,L], 1 or 0. An object without a box or mask owns no token."""
    masks = read_input(inputs, mask_name(grid))
    placed = (masks > 0).flatten(2).any(dim=2, keepdim=True)
    return masks, ((read_input(inputs, "token_weights") > 0) & placed).to(masks.dtype)
