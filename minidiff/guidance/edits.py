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
from ..networks.attention import Edit, Inputs, mask_name, read_input
from ..networks.sites import Grid, Site, Where, cross
from ..vocabulary import own_keywords

Sites = Where | frozenset[Site]


@own_keywords
def forward_guidance(strength: float = 0.8, sites: Sites = cross, steps: int | tuple[int, int] | None = None) -> Edit:
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
        kernel = probs.new_tensor([0.25, 0.5, 0.25])
        flat = F.pad(masks.flatten(0, 1)[:, None], (1, 1, 1, 1), mode="replicate")
        smooth = F.conv2d(flat, (kernel[:, None] * kernel)[None, None])[:, 0].unflatten(0, masks.shape[:2])
        shape = smooth / smooth.sum(dim=(2, 3), keepdim=True).clamp_min(1e-8)
        # A token shared by several objects gets the mean of their boxes.
        wanted = torch.einsum("boyx,bol->byxl", shape, owned / owned.sum(dim=1, keepdim=True).clamp_min(1))[:, None]
        mixed = (1 - self.strength) * probs + self.strength * wanted * probs.sum(dim=(2, 3), keepdim=True)
        return torch.where(owned.any(dim=1)[:, None, None, None], mixed, probs)


@own_keywords
def regional_prompting(strength: float = 8.0, sites: Sites = cross, steps: int | tuple[int, int] | None = None) -> Edit:
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
def reweight(sites: Sites = cross, steps: int | tuple[int, int] | None = None) -> Edit:
    """Multiply the attention to each token by `inputs["word_weights"]`, [B,L] or [1,L]; by 1 beyond its L.

    Prompt-to-prompt's attention re-weighting: Hertz et al. 2022, section 3.2. As there, a pixel's probabilities then no
    longer sum to 1. `model.text.word_weights(prompt, {"ball": 2.0})` returns the weights.
    """
    return Edit(sites, probs=_reweighted, steps=steps)


def _reweighted(site: Site, probs: Tensor, inputs: Inputs) -> Tensor:
    weights = read_input(inputs, "word_weights", 'inputs={"word_weights": ...}').to(probs)
    rest = probs.shape[-1] - weights.shape[-1]  # tokens of regions
    return probs * F.pad(weights, (0, max(rest, 0)), value=1.0)[:, None, None, None]


def _masks(grid: Grid, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Object masks [B,O,h,w] and token ownership [B,O,L], 1 or 0. An object without a box or mask owns no token."""
    masks = read_input(inputs, mask_name(grid))
    placed = (masks > 0).flatten(2).any(dim=2, keepdim=True)
    return masks, ((read_input(inputs, "token_weights") > 0) & placed).to(masks.dtype)
