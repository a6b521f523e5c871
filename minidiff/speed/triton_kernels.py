"""The Triton kernels of fused.py. Tensors are contiguous [batch, cells, channels]."""

import triton
import triton.language as tl

power_of_2 = triton.next_power_of_2


@triton.jit
def moments(
    x,
    shift,
    bias,
    parts,
    cells,
    channels,
    strips,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each channel's mean and sum of squared deviations over a strip of ROWS cells -> parts [batch,strips,2,channels].

    With SHIFT, of x + shift [batch,channels] + bias [channels].

    Strips, not sums of squares: a large mean would drown a small variance.
    """
    strip, column, image = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    c = column * BLOCK + tl.arange(0, BLOCK)
    added = tl.zeros([BLOCK], tl.float32)
    if SHIFT:
        added += tl.load(shift + image * channels + c, mask=c < channels, other=0.0).to(tl.float32)
        added += tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)
    mean = tl.zeros([BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    count = 0.0
    last = tl.minimum(strip * ROWS + ROWS, cells)
    for start in range(0, ROWS, TILE):
        first = strip * ROWS + start
        row = first + tl.arange(0, TILE)
        inside = (row < last)[:, None] & (c < channels)[None, :]
        at = (image * cells + row[:, None]) * channels + c[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        here = tl.maximum(tl.minimum(last - first, TILE), 0).to(tl.float32)
        own = tl.sum(value, axis=0) / tl.maximum(here, 1.0)
        deviation = tl.where(inside, value - own[None, :], 0.0)
        apart = own - mean
        total = tl.maximum(count + here, 1.0)
        squares += tl.sum(deviation * deviation, axis=0) + apart * apart * (count * here / total)
        mean += apart * (here / total)
        count += here
    mean += added
    out = parts + (image * strips + strip) * 2 * channels + c
    tl.store(out, mean, mask=c < channels)
    tl.store(out + channels, squares, mask=c < channels)


@triton.jit
def combine(
    parts,
    scales,
    weight,
    bias,
    cells,
    channels,
    strips,
    eps,
    ROWS: tl.constexpr,
    EACH: tl.constexpr,
    STRIPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The strips' moments -> scales [batch,2,channels]: what a channel is multiplied by, and what is added then."""
    image, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    strip, offset = tl.arange(0, STRIPS), tl.arange(0, WIDTH)
    c = group * EACH + offset
    inside = (strip < strips)[:, None] & (offset < EACH)[None, :]
    at = parts + (image * strips + strip[:, None]) * 2 * channels + c[None, :]
    means = tl.load(at, mask=inside, other=0.0)
    squares = tl.load(at + channels, mask=inside, other=0.0)
    counts = tl.where(inside, tl.minimum(cells - strip * ROWS, ROWS)[:, None], 0).to(tl.float32)
    total = cells * EACH
    mean = tl.sum(tl.sum(means * counts, axis=1), axis=0) / total
    apart = tl.where(inside, means - mean, 0.0)
    variance = tl.sum(tl.sum(squares + counts * apart * apart, axis=1), axis=0) / total
    there = offset < EACH
    scale = tl.load(weight + c, mask=there, other=0.0).to(tl.float32) / tl.sqrt(variance + eps)
    shift = tl.load(bias + c, mask=there, other=0.0).to(tl.float32) - mean * scale
    out = scales + image * 2 * channels + c
    tl.store(out, scale, mask=there)
    tl.store(out + channels, shift, mask=there)


@triton.jit
def apply(
    x,
    shift,
    bias,
    y,
    scales,
    cells,
    channels,
    SHIFT: tl.constexpr,
    SILU: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(x, or x + shift + bias) times the first scale plus the second, then SiLU -> y."""
    image = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < cells)[:, None] & (c < channels)[None, :]
    at = (image * cells + row[:, None]) * channels + c[None, :]
    scale = tl.load(scales + image * 2 * channels + c, mask=c < channels, other=0.0)
    rest = tl.load(scales + image * 2 * channels + channels + c, mask=c < channels, other=0.0)
    if SHIFT:
        added = tl.load(shift + image * channels + c, mask=c < channels, other=0.0).to(tl.float32)
        added += tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)
        rest += added * scale
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * scale[None, :] + rest[None, :]
    if SILU:
        value = value / (1.0 + tl.exp(-value))
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def layer_norm(
    x,
    first,
    second,
    third,
    y,
    weight,
    bias,
    rows,
    channels,
    eps,
    LESS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Each row, less the first LESS of three vectors [channels], normalised -> y."""
    row = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (c < channels)[None, :]
    at = row[:, None] * channels + c[None, :]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    less = tl.zeros([BLOCK], tl.float32)
    if LESS > 0:
        less += tl.load(first + c, mask=c < channels, other=0.0).to(tl.float32)
    if LESS > 1:
        less += tl.load(second + c, mask=c < channels, other=0.0).to(tl.float32)
    if LESS > 2:
        less += tl.load(third + c, mask=c < channels, other=0.0).to(tl.float32)
    value -= less[None, :]
    mean = tl.sum(value, axis=1) / channels
    apart = tl.where(inside, value - mean[:, None], 0.0)
    variance = tl.sum(apart * apart, axis=1) / channels
    scale = tl.load(weight + c, mask=c < channels, other=0.0).to(tl.float32)
    shift = tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)
    found = apart / tl.sqrt(variance + eps)[:, None] * scale[None, :] + shift[None, :]
    tl.store(y + at, found.to(y.dtype.element_ty), mask=inside)


@triton.jit
def gated_gelu(both, bias, y, count, channels, BLOCK: tl.constexpr):
    """The first half of each row times gelu of the second, after the bias -> y, which has `count` elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    row = at // channels
    column = at - row * channels
    first = 2 * row * channels + column
    value = tl.load(both + first, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(both + first + channels, mask=inside, other=0.0).to(tl.float32)
    gate += tl.load(bias + channels + column, mask=inside, other=0.0).to(tl.float32)
    found = value * gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(y + at, found.to(y.dtype.element_ty), mask=inside)


@triton.jit
def add(x, other, bias, more, y, count, channels, MORE: tl.constexpr, BLOCK: tl.constexpr):
    """x + other + bias, and with MORE + another bias, by channel -> y, which has `count` elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    c = at % channels
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(other + at, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    if MORE:
        value += tl.load(more + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def total(first, second, third, fourth, y, channels, BLOCK: tl.constexpr):
    """The sum of four vectors [channels] -> y."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < channels
    value = tl.load(first + c, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(second + c, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(third + c, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(fourth + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + c, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def fold(weight, y, outputs, channels, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Weights [outputs,3,3,channels] -> [2,2,outputs,2,2,channels]: a doubled cell's four output cells see 2x2 cells of
    the small grid; for each of these the sum of its weights among 3x3.
    """
    place = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)[:, None]
    c = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (place < 4 * outputs) & (c < channels)
    down, right, o = place // (2 * outputs), place // outputs % 2, place % outputs
    for row in tl.static_range(2):
        for column in tl.static_range(2):
            value = tl.zeros([TILE, BLOCK], tl.float32)
            for i in tl.static_range(3):
                for j in tl.static_range(3):
                    here = inside & ((i > down) == (row > 0)) & ((j > right) == (column > 0))
                    at = ((o * 3 + i) * 3 + j) * channels + c
                    value += tl.load(weight + at, mask=here, other=0.0).to(tl.float32)
            at = ((place * 2 + row) * 2 + column) * channels + c
            tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def interleave(
    x,
    bias,
    y,
    height,
    width,
    channels,
    start,
    SHARES: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """x [batch,height+1,width+1,SHARES,channels]: what each 2x2 cells give to some of the four cells of a doubled cell,
    from number `start` on -> their places in y [batch,2*height,2*width,channels], plus the bias.
    """
    image = tl.program_id(2).to(tl.int64)
    cell = tl.program_id(0) * TILE + tl.arange(0, TILE)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (cell < height * width)[:, None] & (c < channels)[None, :]
    row, column = cell // width, cell % width
    added = tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)
    for share in tl.static_range(SHARES):
        down, right = (start + share) // 2, (start + share) % 2
        small = (image * (height + 1) + row + down) * (width + 1) + column + right
        at = (small * SHARES + share)[:, None] * channels + c[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) + added[None, :]
        large = (image * 2 * height + 2 * row + down) * 2 * width + 2 * column + right
        tl.store(y + large[:, None] * channels + c[None, :], value.to(y.dtype.element_ty), mask=inside)
