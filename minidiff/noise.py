"""The noise of a run: unit tensors from one CPU generator per image, and variations of the one it starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from .request import Request

_BESIDE = 0x5F17_F17D  # in the lower half, which is all of a seed that torch's generator reads


@dataclass(frozen=True)
class Noise:
    """Unit noise [B,C,h,w]: the same on every device and in every batch.

    others: generators of the variations, one per image, and how far (`strength`) the start goes to them.
    """

    generators: Sequence[Generator]
    shape: tuple[int, int, int]
    others: Sequence[Generator] = ()
    strength: float = 0.0

    @classmethod
    def of(cls, request: Request, shape: tuple[int, int, int]) -> Noise:
        """The noise of a resolved request."""
        seeds, (others, strength) = request.seed, request.vary or ((), 0.0)
        assert isinstance(seeds, tuple) and isinstance(others, tuple)  # resolved
        return cls(_generators(seeds), shape, _generators(others), strength)

    @classmethod
    def beside(cls, request: Request, shape: tuple[int, int, int]) -> Noise:
        """Other noise of the same seeds, which takes none from what a sampler draws."""
        assert isinstance(request.seed, tuple)  # resolved
        return cls(_generators([seed ^ _BESIDE for seed in request.seed]), shape)

    @classmethod
    def seeded(cls, seed: int, shape: tuple[int, int, int]) -> Noise:
        """The noise of one image."""
        return cls(_generators([seed]), shape)

    def __call__(self) -> Tensor:
        """The next noise."""
        return self._draw(self.generators)

    def start(self) -> Tensor:
        """The next noise, varied."""
        found = self()
        return slerp(found, self._draw(self.others), self.strength) if self.others else found

    def _draw(self, generators: Sequence[Generator]) -> Tensor:
        draw = [torch.randn(self.shape, generator=one, dtype=torch.float32, device="cpu") for one in generators]
        return torch.stack(draw)


def _generators(seeds: Sequence[int]) -> tuple[Generator, ...]:
    return tuple(torch.Generator().manual_seed(seed) for seed in seeds)


def slerp(low: Tensor, high: Tensor, share: float) -> Tensor:
    """From `low` [B,C,h,w] at share 0 along arcs to `high` at 1; lines where both point the same or opposite ways.

    The vectors are columns of the grid, as in AUTOMATIC1111's variation seeds (`slerp` in modules/rng.py takes dim 1 of
    [C,h,w]), so that its pictures can be made again; whole noises would be as good.
    """
    cosine = torch.nn.functional.cosine_similarity(low, high, dim=2)[:, :, None]
    angle = cosine.clamp(-1, 1).acos()
    arc = ((1 - share) * angle).sin() / angle.sin() * low + (share * angle).sin() / angle.sin() * high
    return torch.where(cosine.abs() > 0.9995, low + share * (high - low), arc)
