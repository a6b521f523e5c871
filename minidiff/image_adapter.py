"""From pictures to the tokens of an IP-Adapter: CLIP's vision model, then the adapter's own projection."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import linear

from .networks.image_prompt import AnyProjection
from .pictures import clip_pixels

if TYPE_CHECKING:
    from transformers import CLIPVisionModel


@dataclass(frozen=True, eq=False)
class ImageEncoder:
    """A frozen CLIP vision model; what it reads (see clip_pixels), and where it was read from.

    projection: [E,width], to the space that CLIP shares with texts.
    """

    vision: CLIPVisionModel
    projection: Tensor
    edge: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    origin: str

    def pixels(self, pictures: Sequence[Image.Image]) -> Tensor:
        """RGB pictures -> [n,3,edge,edge]: the middle square of each."""
        return clip_pixels(pictures, self.edge, self.mean, self.std).to(self.projection)

    def embedding(self, pixels: Tensor) -> Tensor:
        """[n,3,edge,edge] -> [n,E]: one vector per picture."""
        return linear(self.vision(pixels).pooler_output, self.projection)

    def patches(self, pixels: Tensor) -> Tensor:
        """[n,3,edge,edge] -> [n,P,width]: the class token and the patches, as they enter the last layer."""
        found: Tensor = self.vision(pixels, output_hidden_states=True).hidden_states[-2]
        return found


@dataclass(frozen=True, eq=False)
class ImageAdapter:
    """The part of an IP-Adapter that makes tokens of pictures. Its keys and values are layers of the UNet."""

    projection: AnyProjection
    encoder: ImageEncoder

    def tokens(self, pictures: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """n pictures -> their tokens [n,T,D], and those of no picture [1,T,D], for the unconditional half.

        No picture means, as in training, an embedding of zeros, or the patches of a picture of zeros.
        """
        pixels = self.encoder.pixels(pictures)
        if self.projection.reads == "embedding":
            seen = self.encoder.embedding(pixels)
            return self.projection(seen), self.projection(torch.zeros_like(seen[:1]))
        seen = self.encoder.patches(torch.cat([pixels, torch.zeros_like(pixels[:1])]))
        tokens = self.projection(seen)
        return tokens[:-1], tokens[-1:]
