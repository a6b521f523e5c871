"""3x3 convolutions with 4 multiplications per output cell instead of 9: Winograd's minimal filtering, F(2x2, 3x3).

Each tile of 2x2 output cells is computed from 4x4 input cells: sums and differences transform both to and from 16
numbers per channel, with 16 matrix products in between. The loss of precision is small, since each product sums a
ninth of the terms: in float32 4e-7 of the largest value, against 2e-6 for packed convolutions (bench/LOG.md).

Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2015), section 4.1.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""E.g. F.linear: [T,C], weights [C',C], bias [C'] -> [T,C']."""
_NUMBERS = 3 * 2**17
"""Elements per matrix at a time: all 16 fit in the cache, and each is large enough for a fast product."""
_CHANNELS = 256
"""Minimum channels: with fewer, the transforms take as long as the multiplications that they save."""
_CELLS = 32**2
"""Minimum cells: on smaller grids, reading the larger transformed weights costs more than is saved."""
_WEIGHTS = 2**24
"""Maximum elements of a layer's transformed weights (64 MB), since they are kept in addition to its own."""
_ANEW = 64**2
"""From this many cells on, transforming the weights at each call costs only 1 to 6 % of what is saved."""


def pays(shape: torch.Size, weight: torch.Size) -> bool:
    """Whether Winograd is worth its memory for an input [B,C,h,w] and weights [C',C,3,3]."""
    out, channels, *kernel = weight
    if kernel != [3, 3] or 16 * out * channels > _WEIGHTS:
        return False
    return min(out, channels) >= _CHANNELS and shape[2] * shape[3] >= _CELLS


def keeps(shape: torch.Size) -> bool:
    """Whether to keep the transformed weights for inputs [B,C,h,w], instead of computing them at each call."""
    return shape[2] * shape[3] < _ANEW


def transform(weight: Tensor) -> Tensor:
    """Transform weights [C',C,3,3] to the format of `convolve`, [16,C,C']."""
    rows = [(1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0)]
    spread = torch.tensor(rows, dtype=weight.dtype, device=weight.device)
    return torch.einsum("ai,bj,ocij->abco", spread, spread, weight).flatten(0, 1).contiguous()


def convolve(x: Tensor, weights: Tensor, bias: Tensor | None, linear: Product) -> Tensor:
    """A convolution with stride 1 and padding 1: [B,C,h,w] -> [B,C',h,w] in channels_last.

    Processes several rows of tiles at a time in reused buffers, so it is not differentiable.
    """
    x = x.permute(0, 2, 3, 1)
    batch, height, width, channels = x.shape
    out = weights.shape[2]
    tall, wide = (height + 1) // 2, (width + 1) // 2  # tiles
    rows = min(tall, max(1, _NUMBERS // (max(channels, out) * batch * wide)))
    y = x.new_empty(batch, tall, 2, wide, 2, out)
    padded = x.new_zeros(batch, 2 * rows + 2, 2 * wide + 2, channels)
    halfway = x.new_empty(4, batch, rows, 2 * wide + 2, channels)
    tiles = x.new_empty(16 * batch * rows * wide * channels)
    matrices = [matrix.T for matrix in weights]
    for first in range(0, tall, rows):
        count = min(rows, tall - first)
        top, end = 2 * first - 1, 2 * (first + count) + 1  # rows of x, plus one above and below
        inside = min(end, height)
        padded[:, max(top, 0) - top : inside - top, 1 : width + 1] = x[:, max(top, 0) : inside]
        padded[:, inside - top :] = 0
        tile = tiles[: 16 * batch * count * wide * channels].view(4, 4, batch, count, wide, channels)
        _differences([padded[:, k : k + 2 * count - 1 : 2] for k in range(4)], halfway[:, :, :count])
        _differences([halfway[:, :, :count, k : k + 2 * wide - 1 : 2] for k in range(4)], tile.transpose(0, 1))
        products = [
            linear(one, matrix, bias if i == 5 else None)  # element [1,1] of the 4x4 enters each output cell once
            for i, (one, matrix) in enumerate(zip(tile.view(16, -1, channels), matrices, strict=True))
        ]
        columns = [_sums(products[j::4]) for j in range(4)]
        for i in range(2):
            upper, lower = _sums([column[i].view(batch, count, wide, out) for column in columns])
            y[:, first : first + count, i, :, 0] = upper
            y[:, first : first + count, i, :, 1] = lower
    y = y.view(batch, 2 * tall, 2 * wide, out)[:, :height, :width].permute(0, 3, 1, 2)
    return y.contiguous(memory_format=torch.channels_last)


def _differences(cells: list[Tensor], into: Tensor) -> None:
    """The paper's B^T d, along one axis."""
    torch.sub(cells[0], cells[2], out=into[0])
    torch.add(cells[1], cells[2], out=into[1])
    torch.sub(cells[2], cells[1], out=into[2])
    torch.sub(cells[1], cells[3], out=into[3])


def _sums(m: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The paper's A^T m; overwrites its input."""
    total = torch.add(m[1], m[2])
    return total.add_(m[0]), m[1].sub_(m[2]).sub_(m[3])
