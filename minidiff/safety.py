"""The safety checker of Stable Diffusion 1.x: which pictures resemble what it was told to flag."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import linear, normalize

from .pictures import clip_pixels

if TYPE_CHECKING:
    from transformers import CLIPVisionModel


@dataclass(frozen=True, eq=False)
class SafetyChecker:
    """Compares a picture's CLIP embedding with those of concepts; what it flags is what its authors chose.

    concepts [17,D], special [3,D]: embeddings in float32, with a threshold each for the cosine. projection: [D,width].
    edge, mean, std: what its image encoder reads, see clip_pixels.
    Source: CompVis' stable-diffusion-safety-checker, as diffusers runs it.
    """

    vision: CLIPVisionModel
    projection: Tensor
    concepts: Tensor
    thresholds: Tensor
    special: Tensor
    special_thresholds: Tensor
    edge: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Sequence[Image.Image]) -> tuple[bool, ...]:
        """For each RGB image, whether it is flagged. One image at a time: the batch changes nothing."""
        return tuple(self._flags(clip_pixels([image], self.edge, self.mean, self.std)) for image in images)

    @torch.no_grad()
    def _flags(self, pixels: Tensor) -> bool:
        """pixels: [1,3,edge,edge]."""
        pooled = self.vision(pixels.to(self.projection)).pooler_output
        embedding = normalize(linear(pooled, self.projection).float())
        # A score counts from 0.001 on, since diffusers rounds it: 0.0004 above the threshold is not flagged.
        special = embedding @ normalize(self.special).T - self.special_thresholds
        stricter = 0.01 if (special.round(decimals=3) > 0).any() else 0.0
        scores = embedding @ normalize(self.concepts).T - self.thresholds + stricter
        return bool((scores.round(decimals=3) > 0).any())
