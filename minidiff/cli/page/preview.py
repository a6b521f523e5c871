"""Previews at a hundredth of decoding's price: a linear map of latents to pixels, fitted to the autoencoder."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from ...model import Model

_EDGE = 24  # latents of the chart's edge: 576 equations for 37 numbers of each pixel
_RIDGE = 1e-3


@dataclass(frozen=True, eq=False)
class Preview:
    """Pixels of a latent from it and its eight neighbours. weights: [channels * 9 + 1, 3 * factor**2]."""

    weights: Tensor
    factor: int

    def __call__(self, latents: Tensor) -> Tensor:
        """Latents [B,4,h,w] at the UNet's scale -> images [B,3,H,W] in about [-1,1], blurred."""
        pixels = _around(latents) @ self.weights  # [B, h*w, 3 * factor**2]
        grid = pixels.transpose(1, 2).unflatten(2, latents.shape[2:])
        return F.pixel_shuffle(grid, self.factor)


def fit_preview(model: Model) -> Preview | None:
    """The map that is best for a chart of coloured areas, as the autoencoder encodes it; None where it overflows."""
    factor = model.vae.config.factor
    pixels = _chart(_EDGE * factor)
    known = _around(model.encode(pixels).cpu())[0]
    if not known.isfinite().all():
        return None
    wanted = F.pixel_unshuffle(pixels, factor).flatten(2)[0].T
    gram = known.T @ known
    weights = torch.linalg.solve(gram + _RIDGE * gram.diagonal().mean() * torch.eye(len(gram)), known.T @ wanted)
    return Preview(weights, factor)


def _around(latents: Tensor) -> Tensor:
    """[B,C,h,w] -> [B, h*w, C*9 + 1]: each latent with its neighbours, and 1."""
    patches = F.unfold(F.pad(latents.float(), (1, 1, 1, 1), mode="replicate"), 3).transpose(1, 2)
    return torch.cat([patches, torch.ones_like(patches[..., :1])], dim=2)


def _chart(edge: int) -> Tensor:
    """[1,3,edge,edge] in [-1,1]: cells and ellipses of any colour."""
    chance = np.random.default_rng(0)
    cells = chance.integers(0, 256, (12, 12, 3), dtype=np.uint8)
    image = Image.fromarray(cells).resize((edge, edge), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(image)
    for x, y, width, height in chance.uniform(0, 1, (24, 4)) * edge * (1, 1, 0.25, 0.25):
        pen.ellipse((x - width, y - height, x + width, y + height), fill=tuple(chance.integers(0, 256, 3).tolist()))
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 127.5 - 1
