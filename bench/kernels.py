"""The kernels of one guided step by shape: the one minidiff uses (marked *) against the alternatives.

Times are in milliseconds, best of several calls. Shapes are SD 1.5's at 64x64 latents, for one image.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minidiff.networks.attention import (
    BOX_MASS,
    COLUMNS,
    HEAD_MEAN,
    Keep,
    attention,
    attention_probs,
    mask_name,
    recorded_attention,
)
from minidiff.networks.sites import Site
from minidiff.speed.accelerate import prepare

from .machine import print_header
from .networks import DTYPES, add_dtype_argument, device, judged_dtype
from .table import Row, finish, print_rows
from .timing import best, gemm_rate

CONVOLUTIONS = (
    (320, 320, 64),
    (960, 320, 64),
    (640, 640, 32),
    (1920, 640, 32),
    (1280, 1280, 16),
    (2560, 1280, 16),
    (1280, 1280, 8),
    (2560, 1280, 8),
)
"""Input channels, output channels, edge of the grid; 3x3 kernels."""
ATTENTIONS = ((4096, 4096, 40), (1024, 1024, 80), (256, 256, 160), (4096, 77, 40), (256, 77, 160), (64, 77, 160))
"""Pixels, tokens, channels per head (of eight)."""
KEEPS: dict[str, Keep] = {"columns": COLUMNS, "box mass": BOX_MASS, "mean of heads": HEAD_MEAN}
WORST = 1.25
"""Maximum time of the kernel in use relative to the best one; smaller differences are noise."""


@dataclass(frozen=True)
class Kernels:
    """Milliseconds of each alternative; the first is the one in use."""

    name: str
    dtype: str
    milliseconds: dict[str, float]

    @property
    def row(self) -> Row:
        taken, *others = self.milliseconds.values()
        return Row(self.name, self.dtype, taken / min([taken, *others]), WORST, "of the quickest way's time")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `python -m bench kernels`."""
    add_dtype_argument(parser, [judged_dtype()])
    parser.add_argument("--shrink", type=int, default=1, metavar="N", help="divide channels and pixels by N")


def run(args: argparse.Namespace) -> int:
    """Print a line per kernel and shape. Returns 1 if an alternative beats a kernel in use."""
    print_header("kernels", {"batch": "1", "threads": str(torch.get_num_threads()), "shrink": str(args.shrink)})
    found: list[Kernels] = []
    for dtype in args.dtype:
        print(f"{dtype}: {gemm_rate(DTYPES[dtype], device()):.2f} TFLOP/s in a matrix product", flush=True)
        for kernels in _all(DTYPES[dtype], dtype, args.shrink):
            ways = [f"{way} {ms:.2f}" for way, ms in kernels.milliseconds.items()]
            print(f"{kernels.name:<44} * {', '.join(ways)} ms", flush=True)
            found.append(kernels)
        print(f"{dtype}: {gemm_rate(DTYPES[dtype], device()):.2f} TFLOP/s after", flush=True)
    rows = [kernels.row for kernels in found]
    print_rows(rows)
    return finish(rows, args.json)


def _all(dtype: torch.dtype, name: str, shrink: int) -> Iterator[Kernels]:
    for inside, outside, edge in CONVOLUTIONS:
        yield from convolution(dtype, name, inside // shrink, outside // shrink, edge)
    for pixels, tokens, channels in ATTENTIONS:
        few = tokens if tokens == 77 else tokens // shrink
        yield plain_attention(dtype, name, pixels // shrink, few, channels)
        for kept in KEEPS if tokens == 77 else ("columns",):
            yield recorded(dtype, name, kept, pixels // shrink, few, channels)


def convolution(dtype: torch.dtype, name: str, inside: int, outside: int, edge: int) -> Iterator[Kernels]:
    """A convolution's forward pass, and its backward pass to the input."""
    x = torch.randn(1, inside, edge, edge, device=device()).to(dtype).contiguous(memory_format=torch.channels_last)
    plain = nn.Conv2d(inside, outside, 3, padding=1).to(device(), dtype).requires_grad_(False)
    last, packed = (
        copy.deepcopy(plain).to(memory_format=torch.channels_last),
        prepare(nn.Sequential(copy.deepcopy(plain))),
    )
    ways = {"packed": packed, "channels_last": last, "as loaded": plain}
    shape = f"convolution {inside}->{outside} at {edge}x{edge}"
    with torch.no_grad():
        yield Kernels(f"{shape}, forward", name, {way: _ms(lambda conv=conv: conv(x)) for way, conv in ways.items()})
    x.requires_grad_()
    back = {}
    for way, conv in ways.items():
        y = conv(x)
        grad = torch.randn_like(y)
        back[way] = _ms(lambda y=y, grad=grad: torch.autograd.grad(y, x, grad, retain_graph=True))
    yield Kernels(f"{shape}, back", name, back)


def plain_attention(dtype: torch.dtype, name: str, pixels: int, tokens: int, channels: int) -> Kernels:
    """Attention without recording."""
    q, k, v = _qkv(dtype, pixels, tokens, channels)

    def explicit() -> Tensor:
        return attention_probs(q, k).to(dtype) @ v

    ways = {"fused": lambda: attention(q, k, v), "explicit": explicit}
    return Kernels(f"attention {pixels} to {tokens} x {channels}", name, {way: _ms(call) for way, call in ways.items()})


def recorded(dtype: torch.dtype, name: str, kept: str, pixels: int, tokens: int, channels: int) -> Kernels:
    """Attention that records two objects, or all tokens."""
    q, k, v = _qkv(dtype, pixels, tokens, channels)
    site, keep, grid = Site("mid", 0, 0, "cross"), KEEPS[kept], (min(8, pixels), pixels // min(8, pixels))
    inputs = {
        "token_weights": torch.eye(tokens, device=device())[None, :2],
        mask_name(grid): torch.rand(1, 2, *grid, device=device()),
    }

    def explicit() -> object:
        probs = attention_probs(q, k)
        return probs.to(dtype) @ v, keep(site, probs.unflatten(2, grid), inputs)

    def fused_beside() -> object:
        return attention(q, k, v), keep(site, attention_probs(q, k).unflatten(2, grid), inputs)

    ways: dict[str, Callable[[], object]] = {
        "taken": lambda: recorded_attention(site, q, k, v, grid, keep, inputs),
        "explicit": explicit,
        "fused beside explicit": fused_beside,
    }
    with torch.no_grad():
        found = {way: _ms(call) for way, call in ways.items()}
    return Kernels(f"{kept} of {pixels} to {tokens} x {channels}", name, found)


def _qkv(dtype: torch.dtype, pixels: int, tokens: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [1,8,N,D] in the memory layout of the layers, with heads adjacent."""
    rows = (pixels, tokens, tokens)
    q, k, v = (torch.randn(1, n, 8, channels, device=device()).to(dtype).transpose(1, 2) for n in rows)
    return q, k, v


def _ms(call: Callable[[], object]) -> float:
    return 1000 * best(call, 0.2)
