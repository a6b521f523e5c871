"""What a recorded site keeps, on a card: from queries and keys, without writing the probabilities to memory.

The site's output is torch's fused attention, the same bits as without a record, and what is kept costs two more
kernels: the softmax's denominators, then the sums that the keep wants of exp(q k^T / sqrt(D) - log denominator). The
explicit way writes and reads all probabilities some seven times, in a dozen kernels. Without gradients only: a look
needs the probabilities on its way back anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..networks.attention import (
    ALL,
    AT_ONCE,
    BOX_MASS,
    COLUMNS,
    HEAD_MEAN,
    Inputs,
    Keep,
    attention_probs,
    mask_name,
    read_input,
)
from ..networks.sites import Grid, Site
from .fused import error, usable, works

_OBJECTS = 64
"""The most objects at once."""
_STRIP = 512
"""Pixels that one program sums, or more where all programs' sums would be more than AT_ONCE."""
_SITE = Site("mid", 0, 0, "cross")


class _Read(NamedTuple):
    """What every kernel reads of queries and keys, and how."""

    q: Tensor
    k: Tensor
    sums: Tensor
    sizes: tuple[int | float, ...]
    tile: int
    depth: int


_Kept: TypeAlias = Callable[[_Read, Grid, Inputs], Tensor]


def kept(site: Site, q: Tensor, k: Tensor, grid: Grid, keep: Keep, inputs: Inputs) -> Tensor | None:
    """What `keep` keeps of the attention of q [B,H,N,D] to k [B,H,L,D], in float32; None if these kernels cannot."""
    if not usable(q) or not (q.element_size() == k.element_size() == 2):  # in float32 they take 5 s each to build
        return None
    function = _KEPT.get(keep)
    if function is None or q.shape[3] > 256 or not q.stride(3) == k.stride(3) == 1 or k.dtype != q.dtype:
        return None
    if not _fits(keep, k.shape[2], grid, inputs) or not works(_apart, q.device, q.dtype, (keep, q.shape[3])):
        return None
    return _kept(function, q, k, grid, inputs)


def _fits(keep: Keep, tokens: int, grid: Grid, inputs: Inputs) -> bool:
    """Whether there are few enough objects, and of the right size; the explicit way tells of another."""
    if keep == COLUMNS:
        weights = read_input(inputs, "token_weights")
        return weights.shape[1] <= _OBJECTS and weights.shape[2] == tokens
    if keep == BOX_MASS:
        masks = read_input(inputs, mask_name(grid))
        return masks.shape[1] < _OBJECTS and masks.shape[2:] == grid
    return True


def _kept(function: _Kept, q: Tensor, k: Tensor, grid: Grid, inputs: Inputs) -> Tensor:
    from . import triton_keeps as kernels

    (images, heads, pixels, channels), tokens = q.shape, k.shape[2]
    depth = max(16, 1 << (channels - 1).bit_length())
    tile = 64 if depth <= 64 else 32  # what registers hold
    sums = torch.empty(images, heads, pixels, dtype=torch.float32, device=q.device)
    sizes = (pixels, tokens, channels, heads, *q.stride()[:3], *k.stride()[:3], channels**-0.5)
    with torch.cuda.device_of(q):
        kernels.log_sums[-(-pixels // tile), images * heads](q, k, sums, *sizes, TILE=tile, DEPTH=depth, num_stages=1)
        return function(_Read(q, k, sums, sizes, tile, depth), grid, inputs)


def _all(read: _Read, grid: Grid, inputs: Inputs) -> Tensor:
    return _means(read, grid, 1)


def _head_mean(read: _Read, grid: Grid, inputs: Inputs) -> Tensor:
    return _means(read, grid, read.q.shape[1])[:, 0]


def _means(read: _Read, grid: Grid, each: int) -> Tensor:
    """The mean over groups of `each` heads, [B,groups,h,w,L]."""
    from . import triton_keeps as kernels

    (images, heads, pixels, _), tokens = read.q.shape, read.k.shape[2]
    out = read.sums.new_empty(images, heads // each, pixels, tokens)
    tiles = -(-pixels // read.tile), -(-tokens // read.tile), images * heads // each
    kernels.means[tiles](
        read.q, read.k, read.sums, out, *read.sizes, EACH=each, TILE=read.tile, DEPTH=read.depth, num_stages=1
    )
    return out.unflatten(2, grid)


def _columns(read: _Read, grid: Grid, inputs: Inputs) -> Tensor:
    from . import triton_keeps as kernels

    (images, heads, pixels, _), weights = read.q.shape, read_input(inputs, "token_weights")
    weights, objects = weights.to(read.sums).expand(images, -1, -1).contiguous(), weights.shape[1]
    out = read.sums.new_empty(images, heads, pixels, objects)
    kernels.columns[-(-pixels // read.tile), images * heads](
        read.q,
        read.k,
        read.sums,
        weights,
        out,
        objects,
        *read.sizes,
        OBJECTS=_padded(objects),
        TILE=read.tile,
        DEPTH=read.depth,
        num_stages=1,
    )
    return out.unflatten(2, grid)


def _box_mass(read: _Read, grid: Grid, inputs: Inputs) -> Tensor:
    from . import triton_keeps as kernels

    (images, heads, pixels, _), tokens, masks = read.q.shape, read.k.shape[2], read_input(inputs, mask_name(grid))
    masks, objects = masks.to(read.sums).expand(images, -1, -1, -1).contiguous(), masks.shape[1]
    steps, strips = _strips(-(-pixels // read.tile), read.tile, images * heads * (objects + 1) * tokens)
    out = read.sums.new_empty(strips, images, heads, objects + 1, tokens)
    kernels.mask_sums[-(-tokens // read.tile), images * heads, strips](
        read.q,
        read.k,
        read.sums,
        masks,
        out,
        objects,
        *read.sizes,
        steps,
        OBJECTS=_padded(objects + 1),
        TILE=read.tile,
        DEPTH=read.depth,
        num_stages=1,
    )
    assert BOX_MASS.finish is not None
    return BOX_MASS.finish(out.sum(dim=0) if strips > 1 else out[0])


def _strips(tiles: int, tile: int, each: int) -> tuple[int, int]:
    """How many tiles of pixels one program sums, and the number of such strips, with `each` sums."""
    steps = min(tiles, max(_STRIP // tile, -(-tiles // max(1, AT_ONCE // each))))
    return steps, -(-tiles // steps)


def _padded(objects: int) -> int:
    """A size that a kernel's product takes."""
    return max(16, 1 << (objects - 1).bit_length())


_KEPT: dict[Keep, _Kept] = {ALL: _all, HEAD_MEAN: _head_mean, COLUMNS: _columns, BOX_MASS: _box_mass}


@torch.no_grad()
def _apart(device: torch.device, dtype: torch.dtype, case: tuple[Keep, int]) -> float:
    """The maximum relative error of what a keep keeps with so many channels: two images, two heads, three objects."""
    (keep, channels), grid, tokens = case, (6, 8), 77
    sizes = (2, 48, 2, channels), (2, tokens, 2, channels), (2, 3, tokens), (2, 3, *grid)
    q, k, weights, masks = (torch.rand(size, dtype=torch.float32) for size in sizes)
    q, k = (3 * one.transpose(1, 2) for one in (q, k))
    inputs = {"token_weights": weights, mask_name(grid): masks}
    expected = keep(_SITE, attention_probs(q, k).unflatten(2, grid), inputs)
    there = {name: value.to(device) for name, value in inputs.items()}
    found = _kept(_KEPT[keep], q.to(device, dtype), k.to(device, dtype), grid, there)
    return error(found, expected)
