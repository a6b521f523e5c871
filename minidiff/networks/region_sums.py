"""REGION_SUMS: of a recorded site only what its regions add up to."""

from __future__ import annotations

from torch import Tensor, cat, einsum, ones_like

from .attention import Inputs, Keep, mask_name, read_input
from .sites import Site


def _region_sums(site: Site, probs: Tensor, inputs: Inputs) -> Tensor:
    return _sums(probs, read_input(inputs, mask_name((probs.shape[2], probs.shape[3]))))


def _sums(probs: Tensor, masks: Tensor) -> Tensor:
    """[B,H,h,w,L], masks [B,O,h,w] -> [B,H,O+2,L]."""
    regions = cat([masks, 1 - masks.amax(dim=1, keepdim=True), ones_like(masks[:, :1])], dim=1)
    return einsum("bhyxl,boyx->bhol", probs, regions.to(probs))


def _whole(sums: Tensor) -> Tensor:
    return sums


REGION_SUMS = Keep("REGION_SUMS", _region_sums, sums=_sums, finish=_whole)
"""Keep, for each token (of self-attention: pixel), the attention to it, summed over the pixels of each object's mask,
over the background (outside of all masks) and over the picture: [B,H,O+2,L]. Fields of any weights may stand in for the
masks [B,O,h,w], `inputs[mask_name((h, w))]`.
"""
