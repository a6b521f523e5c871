"""3x3 convolutions with 2.25 multiplications per output cell instead of 9: Winograd's minimal filtering.

Each tile of output cells is computed from a window of input cells: sums and differences transform both to and from
n x n numbers per channel, with n x n matrix products in between. Source: Lavin and Gray, "Fast Algorithms for
Convolutional Neural Networks" (2015).

`SAME` is F(4x4, 3x3) (section 4.3), n = 6: 2.25 multiplications per cell. Interpolation points are 0, 3/2, -3/2, 2/3,
-2/3 and infinity. The usual 0, 1, -1, 2, -2 and infinity round 2.3 times as much: with independent errors of relative
size e in the products, the result's are 4.8 e, from the usual points 10.8 e (of a plain sum: e), less what shorter sums
save. Why points matter: Barabasz et al. (2020), "Error Analysis and Improving the Accuracy of Winograd Convolution for
Deep Neural Networks".

`GROWN` convolves a grid that nearest neighbours enlarge by 2, without making it: F(2x2, 3x3) with a tile for each cell.
The middle two of a tile's four cells are then equal, which leaves n = 3, in one axis out[2i] = (w0+w1+w2) x[i] +
w0 (x[i-1] - x[i]) and out[2i+1] = (w0+w1+w2) x[i] + w2 (x[i+1] - x[i]).
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor], Tensor]
"""E.g. F.linear: [T,C], weights [C',C] -> [T,C']."""
_NUMBERS = 7 * 2**19
"""Elements of the transformed input at a time, for two images or more twice as many (28 MB): they fit in the cache, and
each matrix is large enough to be fast, with two threads too. With fewer channels half of it suffices, and the largest
grids, which have few, leave the least memory.
"""
_PART = 3 * 2**20
"""Elements of transformed weights at a time, where they are used once; for two images or more as well twice as many,
which is less than the 32 MB from which on the C library takes fresh pages.
"""
_BLOCK = 64
"""Output channels are computed together by multiples of it: products of odd sizes take longer."""
_KEPT = 2**24
"""Maximum elements of a layer's transformed weights that are kept, for a call or for good (64 MB)."""
_CHANNELS, _FEWER = 256, 128
"""Minimum channels, of large grids fewer: with fewer, the rest takes as long as the multiplications that it saves."""
_CELLS, _GROWN_CELLS = 32**2, 16**2
"""Minimum cells of the result: on smaller grids, what surrounds the products costs more than they save."""
_WIDE = 128**2
"""Cells of a large grid."""
_ANEW = 64**2
"""From this many cells on, transforming the weights at each call costs only 1 to 10 % of what is saved."""


class Form(NamedTuple):
    """A minimal filtering in one axis."""

    window: int
    """Input cells of a tile, and numbers that they become."""
    step: int
    """Input cells from one tile to the next."""
    scales: tuple[float, ...]
    """By what to multiply each of a tile's sums for an output cell."""
    spread: tuple[tuple[float, float, float], ...]
    """The paper's G: from 3 weights to the numbers."""
    differences: Callable[[list[Tensor], Tensor], None]
    """The paper's B^T d: from input cells to the numbers, into the second argument."""
    sums: Callable[[list[Tensor]], list[Tensor]]
    """The paper's A^T m: from numbers, which it overwrites, to output cells but for their scales."""


_A, _P = 3 / 2, 2 / 3


def _large_differences(x: list[Tensor], into: Tensor) -> None:
    far, near = torch.sub(x[4], x[2], alpha=_P**2), torch.sub(x[3], x[1], alpha=_P**2)
    torch.add(far, near, alpha=_A, out=into[1])
    torch.sub(far, near, alpha=_A, out=into[2])
    torch.sub(far, torch.sub(x[2], x[0], alpha=_P**2, out=near), alpha=_A**2, out=into[0])
    torch.sub(x[4], x[2], alpha=_A**2, out=far)
    torch.sub(x[3], x[1], alpha=_A**2, out=near)
    torch.add(far, near, alpha=_P, out=into[3])
    torch.sub(far, near, alpha=_P, out=into[4])
    torch.sub(torch.sub(x[5], x[3], alpha=_A**2, out=far), near, alpha=_P**2, out=into[5])


def _large_sums(m: list[Tensor]) -> list[Tensor]:
    even, even_p = m[1] + m[2], m[3] + m[4]
    odd, odd_p, part = m[1].sub_(m[2]), m[3].sub_(m[4]), _P / _A
    first, second = m[0].add_(even).add_(even_p), torch.add(odd, odd_p, alpha=part, out=m[4])
    return [first, second, even.add_(even_p, alpha=part**2), odd.add_(odd_p, alpha=part**3).add_(m[5])]


def _grown_differences(x: list[Tensor], into: Tensor) -> None:
    torch.sub(x[0], x[1], out=into[0])
    into[1].copy_(x[1])
    torch.sub(x[2], x[1], out=into[2])


def _grown_sums(m: list[Tensor]) -> list[Tensor]:
    return [m[0].add_(m[1]), m[2].add_(m[1])]


def _row(point: float, other: float) -> tuple[float, float, float]:
    """A row of G for a point, of 0, both and their negatives."""
    first = 0.5 / (point**2 * (point**2 - other**2))
    return first, first * point, first * point**2


SAME = Form(
    6,
    4,
    (1.0, _A, _A**2, _A**3),
    (((_A * _P) ** -2, 0.0, 0.0), _row(_A, _P), _row(-_A, _P), _row(_P, _A), _row(-_P, _A), (0.0, 0.0, _A**-3)),
    _large_differences,
    _large_sums,
)
GROWN = Form(3, 1, (1.0, 1.0), ((1.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.0, 0.0, 1.0)), _grown_differences, _grown_sums)


def form(shape: torch.Size, weight: torch.Size, grown: bool = False) -> Form | None:
    """The fastest for an input [B,C,h,w] and weights [C',C,3,3]; None if that is a plain convolution."""
    out, channels, *kernel = weight
    cells = shape[2] * shape[3] * (4 if grown else 1)
    least, few = _GROWN_CELLS if grown else _CELLS, _FEWER if cells >= _WIDE else _CHANNELS
    if kernel != [3, 3] or cells < least or min(out, channels) < few:
        return None
    return GROWN if grown else SAME


def keeps(shape: torch.Size, weight: torch.Size) -> bool:
    """Whether to keep what `transform` makes for `SAME` and inputs [B,C,h,w], instead of computing it at each call."""
    return shape[2] * shape[3] < _ANEW and SAME.window**2 * weight[0] * weight[1] <= _KEPT


def transform(weight: Tensor, linear: Product, form: Form, back: bool = False) -> Tensor:
    """Transform weights [C',C,3,3] to [n*n,C',C], or for gradients to [n*n,C,C']."""
    return next(_parts(weight, linear, form, back, _BLOCK * weight.numel() * form.window**2))


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, linear: Product, form: Form, back: bool = False) -> Tensor:
    """A convolution with stride 1 and padding 1: [B,C,h,w] -> [B,C',h,w] (`GROWN`: [B,C',2h,2w]) in channels_last.

    weight [C',C,3,3], or what `transform` made of it. back: the gradient with respect to the input of the convolution
    with weights [C,C',3,3], given that x of its result. Processes several rows of tiles at a time in reused buffers, so
    it is not differentiable.
    """
    x = x.permute(0, 2, 3, 1)
    batch, height, width, channels = x.shape
    n, cells, out = form.window, len(form.scales), weight.shape[1 if back or weight.ndim == 3 else 0]
    tall, wide = -(-height // form.step), -(-width // form.step)  # tiles
    small = n * n * out * channels <= _KEPT
    images = min(batch, 2)
    numbers = images * (_NUMBERS if min(out, channels) >= _CHANNELS else _NUMBERS // 2)
    rows = min(tall, max(1, (numbers if small else 2 * numbers) // (n * n * channels * batch * wide)))
    rows = -(-tall // -(-tall // rows))  # as even as can be
    whole = weight if weight.ndim == 3 else transform(weight, linear, form, back) if small and rows < tall else None
    offset = x.new_zeros(out) if bias is None else bias
    y = x.new_empty(batch, tall, cells, wide, cells, out)
    for first, tiles in _tiles(x, form, rows):
        count, done = len(tiles[0]) // (batch * wide), 0
        for part in _parts(weight, linear, form, back, images * _PART) if whole is None else [whole]:
            end = done + part.shape[1]
            products = [linear(one, matrix) for one, matrix in zip(tiles, part, strict=True)]
            columns = [form.sums(products[j::n]) for j in range(n)]
            for i, upper in enumerate(form.scales):
                for j, cell in enumerate(form.sums([column[i] for column in columns])):
                    into, scale = y[:, first : first + count, i, :, j, done:end], upper * form.scales[j]
                    torch.add(offset[done:end], cell.view(into.shape), alpha=scale, out=into)
            done = end
    grown = cells // form.step
    y = y.view(batch, cells * tall, cells * wide, out)[:, : grown * height, : grown * width].permute(0, 3, 1, 2)
    return y.contiguous(memory_format=torch.channels_last)


def _tiles(x: Tensor, form: Form, rows: int) -> Iterator[tuple[int, Tensor]]:
    """x [B,h,w,C], transformed: the first of `rows` rows of tiles, and their numbers [n*n,T,C], to be used at once."""
    batch, height, width, channels = x.shape
    n, step = form.window, form.step
    tall, wide = -(-height // step), -(-width // step)
    more = n - step  # cells that a window shares with the next
    padded = x.new_zeros(batch, step * rows + more, step * wide + more, channels)
    halfway = x.new_empty(n, batch, rows, step * wide + more, channels)
    buffer = x.new_empty(n * n * batch * rows * wide * channels)
    for first in range(0, tall, rows):
        count = min(rows, tall - first)
        top, end = step * first - 1, step * (first + count) + more - 1  # rows of x, plus one above and below
        inside = min(end, height)
        padded[:, max(top, 0) - top : inside - top, 1 : width + 1] = x[:, max(top, 0) : inside]
        padded[:, inside - top :] = 0
        part = halfway[:, :, :count]
        tile = buffer[: n * n * batch * count * wide * channels].view(n, n, batch, count, wide, channels)
        form.differences([padded[:, k : k + step * (count - 1) + 1 : step] for k in range(n)], part)
        form.differences([part[:, :, :, k : k + step * (wide - 1) + 1 : step] for k in range(n)], tile.transpose(0, 1))
        yield first, tile.view(n * n, -1, channels)


def _parts(weight: Tensor, linear: Product, form: Form, back: bool, most: int) -> Iterator[Tensor]:
    """Transformed weights [n*n,part of C',C] of at most about `most` elements."""
    g = torch.tensor(form.spread, dtype=torch.float64)
    g = g.flip(1) if back else g
    both = torch.einsum("ai,bj->abij", g, g).reshape(form.window**2, 9).to(weight)
    axis, channels = (1, weight.shape[0]) if back else (0, weight.shape[1])
    at_once = max(1, most // (_BLOCK * len(both) * channels)) * _BLOCK
    for part in weight.split(at_once, dim=axis):
        spread = linear(both, part.reshape(-1, 9)).unflatten(1, part.shape[:2])
        yield spread.mT if back else spread
