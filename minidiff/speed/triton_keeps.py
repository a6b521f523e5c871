"""The Triton kernels of keeps.py. q and k are [images, heads, pixels or tokens, channels] with the channels in
sequence; what is written is contiguous and in float32, in which all but the products is computed.
"""

import triton
import triton.language as tl


@triton.jit
def _rows(x, first, count, step, channels, TILE: tl.constexpr, DEPTH: tl.constexpr):
    """The rows of one head from `first` on [TILE,DEPTH]; 0 beyond the last row and channel."""
    row, c = first + tl.arange(0, TILE), tl.arange(0, DEPTH)
    inside = (row < count)[:, None] & (c < channels)[None, :]
    return tl.load(x + row[:, None] * step + c[None, :], mask=inside, other=0.0)


@triton.jit
def _logits(left, right, first, tokens, scale, TILE: tl.constexpr):
    """left right^T * scale, -inf beyond the last token. Products of float32 are not rounded to TF32."""
    found = tl.dot(left, tl.trans(right), input_precision="ieee") * scale
    return tl.where((first + tl.arange(0, TILE) < tokens)[None, :], found, float("-inf"))


@triton.jit
def log_sums(
    q,
    k,
    sums,
    pixels,
    tokens,
    channels,
    heads,
    q_image,
    q_head,
    q_row,
    k_image,
    k_head,
    k_row,
    scale,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The logarithm of each softmax's denominator -> sums [images,heads,pixels], by one pass over the tokens (online
    softmax, Milakov and Gimelshein 2018).
    """
    first, pair = tl.program_id(0) * TILE, tl.program_id(1).to(tl.int64)
    left = _rows(q + pair // heads * q_image + pair % heads * q_head, first, pixels, q_row, channels, TILE, DEPTH)
    keys = k + pair // heads * k_image + pair % heads * k_head
    most = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    for start in range(0, tokens, TILE):
        right = _rows(keys, start, tokens, k_row, channels, TILE, DEPTH)
        logits = _logits(left, right, start, tokens, scale, TILE)
        higher = tl.maximum(most, tl.max(logits, axis=1))
        total = total * tl.exp(most - higher) + tl.sum(tl.exp(logits - higher[:, None]), axis=1)
        most = higher
    row = first + tl.arange(0, TILE)
    tl.store(sums + pair * pixels + row, most + tl.log(total), mask=row < pixels)


@triton.jit
def means(
    q,
    k,
    sums,
    out,
    pixels,
    tokens,
    channels,
    heads,
    q_image,
    q_head,
    q_row,
    k_image,
    k_head,
    k_row,
    scale,
    EACH: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The probabilities' means over groups of EACH heads -> out [images,groups,pixels,tokens]."""
    first, start, group = tl.program_id(0) * TILE, tl.program_id(1) * TILE, tl.program_id(2).to(tl.int64)
    row, column = first + tl.arange(0, TILE), start + tl.arange(0, TILE)
    found = tl.zeros([TILE, TILE], tl.float32)
    for one in range(EACH):
        pair = group * EACH + one
        left = _rows(q + pair // heads * q_image + pair % heads * q_head, first, pixels, q_row, channels, TILE, DEPTH)
        right = _rows(k + pair // heads * k_image + pair % heads * k_head, start, tokens, k_row, channels, TILE, DEPTH)
        total = tl.load(sums + pair * pixels + row, mask=row < pixels, other=0.0)
        found += tl.exp(_logits(left, right, start, tokens, scale, TILE) - total[:, None])
    at = out + (group * pixels + row[:, None]) * tokens + column[None, :]
    tl.store(at, found / EACH, mask=(row < pixels)[:, None] & (column < tokens)[None, :])


@triton.jit
def columns(
    q,
    k,
    sums,
    weights,
    out,
    objects,
    pixels,
    tokens,
    channels,
    heads,
    q_image,
    q_head,
    q_row,
    k_image,
    k_head,
    k_row,
    scale,
    OBJECTS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The probabilities' sums over tokens by weights [images,objects,tokens] -> out [images,heads,pixels,objects]."""
    first, pair = tl.program_id(0) * TILE, tl.program_id(1).to(tl.int64)
    row, one = first + tl.arange(0, TILE), tl.arange(0, OBJECTS)
    left = _rows(q + pair // heads * q_image + pair % heads * q_head, first, pixels, q_row, channels, TILE, DEPTH)
    keys = k + pair // heads * k_image + pair % heads * k_head
    total = tl.load(sums + pair * pixels + row, mask=row < pixels, other=0.0)
    own = weights + pair // heads * objects * tokens
    found = tl.zeros([TILE, OBJECTS], tl.float32)
    for start in range(0, tokens, TILE):
        right = _rows(keys, start, tokens, k_row, channels, TILE, DEPTH)
        probs = tl.exp(_logits(left, right, start, tokens, scale, TILE) - total[:, None])
        column = start + tl.arange(0, TILE)
        inside = (column < tokens)[:, None] & (one < objects)[None, :]
        by = tl.load(own + one[None, :] * tokens + column[:, None], mask=inside, other=0.0)
        found += tl.dot(probs, by, input_precision="ieee")
    at = out + (pair * pixels + row[:, None]) * objects + one[None, :]
    tl.store(at, found, mask=(row < pixels)[:, None] & (one < objects)[None, :])


@triton.jit
def mask_sums(
    q,
    k,
    sums,
    masks,
    out,
    objects,
    pixels,
    tokens,
    channels,
    heads,
    q_image,
    q_head,
    q_row,
    k_image,
    k_head,
    k_row,
    scale,
    steps,
    OBJECTS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The probabilities' sums over each strip of `steps` tiles of pixels, by masks [images,objects,pixels] and then
    without a mask -> out [strips,images,heads,objects+1,tokens].
    """
    start, pair, part = tl.program_id(0) * TILE, tl.program_id(1).to(tl.int64), tl.program_id(2)
    column, one = start + tl.arange(0, TILE), tl.arange(0, OBJECTS)
    queries = q + pair // heads * q_image + pair % heads * q_head
    right = _rows(k + pair // heads * k_image + pair % heads * k_head, start, tokens, k_row, channels, TILE, DEPTH)
    own = masks + pair // heads * objects * pixels
    found = tl.zeros([OBJECTS, TILE], tl.float32)
    for step in range(steps):
        first = (part * steps + step) * TILE
        row = first + tl.arange(0, TILE)
        left = _rows(queries, first, pixels, q_row, channels, TILE, DEPTH)
        total = tl.load(sums + pair * pixels + row, mask=row < pixels, other=0.0)
        probs = tl.exp(_logits(left, right, start, tokens, scale, TILE) - total[:, None])
        inside = (row < pixels)[None, :] & (one < objects)[:, None]
        by = tl.load(own + one[:, None] * pixels + row[None, :], mask=inside, other=0.0)
        by = tl.where((one == objects)[:, None] & (row < pixels)[None, :], 1.0, by)
        found += tl.dot(by, probs, input_precision="ieee")
    pairs = tl.num_programs(1)
    at = out + ((part * pairs + pair) * (objects + 1) + one[:, None]) * tokens + column[None, :]
    tl.store(at, found, mask=(one <= objects)[:, None] & (column < tokens)[None, :])
