"""What a card does in one pass over memory instead of several, in Triton: it waits for memory, not for arithmetic.

torch's group norm wants [B,C,h,w] in that order, convolutions are fastest in [B,h,w,C], and the copies between them
take a quarter of a step; here the norm works on [B,h,w,C], and applies the activation while it writes. A convolution's
bias is another pass in cuDNN, and a product adds another tensor in place of its result sooner than a bias; so what
comes next, or what came before, adds the bias. After nearest-neighbour upsampling a 3x3 convolution multiplies equal
numbers: the small grid with sums of weights takes 4 products a cell instead of 9.
Without gradients only, but for 1x1 convolutions; elsewhere torch's own kernels run. Sums are in float32.
"""

import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..checks import warn
from ..networks import resample, vae
from ..networks.attention import AttentionLayer, Hooks, Maps
from ..networks.config import UNetConfig
from ..networks.norm import GroupNorm, GroupNormSiLU, LayerNorm, is_hooked
from ..networks.transformer import GEGLU, FeedForward, Transformer, TransformerBlock
from ..networks.unet import ResBlock

Network = TypeVar("Network", bound=nn.Module)
STRIPS = 256
"""The most parts whose sums are combined for a group norm."""
_WIDE = 4096
"""Output channels at which a convolution is divided: cuDNN takes twice as long per channel for 2560 and 5120 of 1280 at
16x16 cells (not for 2560 of 640 at 32x32).
"""
_MOST = 2**13
"""The most channels of a layer norm."""
_LAST = torch.channels_last


def fuse(network: Network) -> Network:
    """Give a network's layers on a card these kernels, in place, where Triton is installed."""
    for module in network.modules():
        if type(module) is nn.Conv2d and module.kernel_size == (1, 1):
            module.__class__ = PointConv2d
    if find_spec("triton") is None:
        return network
    from .keeps import kept

    one = next(network.parameters())
    if not works(_apart, one.device, one.dtype, 16, 32):
        return network
    for module in network.modules():
        if isinstance(module, AttentionLayer):
            module.fused = kept
    return _fused(network)


def _fused(network: Network) -> Network:
    for module in network.modules():
        for kind, function in (
            (GroupNorm, group_norm),
            (LayerNorm, layer_norm),
            (GEGLU, gated_gelu),
            (ResBlock, res_block),
            (Transformer, transformer),
        ):
            if isinstance(module, kind):
                setattr(module, "fused", function)  # noqa: B010  # a function of a class would become a method
        if isinstance(module, resample.Upsample | vae.Upsample) and type(module.conv) is nn.Conv2d:
            module.conv.__class__ = GrowConv2d
    return network


@cache
def works(apart: Callable[..., float], device: torch.device, dtype: torch.dtype, *cases: Any) -> bool:
    """Whether kernels can be built and are right here, tried on small cases: Triton needs a C compiler, and knows some
    cards and dtypes only. The bounds are above what rounding does, TF32's too.

    apart: the maximum relative error of a case, (device, dtype, case). It depends on none of torch's defaults, and
    leaves the random numbers of the caller as they are.
    """
    try:
        alone = _disable_current_modes()  # one may forbid what a probe does: the second call of a kind is watched
        with alone, torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.autocast("cuda", enabled=False):
            far = max(apart(device, dtype, case) for case in cases)
        most = 1e-2 if dtype == torch.float32 else 5e-2
        problem = "" if far <= most else f"a small layer's result is {far:.0e} off"
    except torch.OutOfMemoryError:  # of this moment alone, and an exception is not cached
        raise
    except Exception as error:  # whatever a compiler raises
        problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if problem:
        warn(f"torch's own kernels are used, which take up to 1.5 times as long: Triton's fail here ({problem})")
    return not problem


def error(found: Tensor, expected: Tensor) -> float:
    """The maximum relative error; inf for NaN."""
    far = float((found.cpu().float() - expected).abs().max() / expected.abs().max())
    return math.inf if math.isnan(far) else far


@torch.no_grad()
def _apart(device: torch.device, dtype: torch.dtype, channels: int) -> float:
    """The maximum relative error of all these kernels, on small layers with so many input channels."""
    config = UNetConfig(block_out_channels=(channels,), num_heads=(2,), cross_attention_dim=24, norm_num_groups=8)
    cells, tokens = (2, channels, 9, 7), (2, 5, channels)
    tried: list[tuple[nn.Module, tuple[tuple[int, ...], ...]]] = [
        (ResBlock(config, channels, 32), (cells, (2, 4 * channels))),
        (Transformer(config, "mid", 0, 0, 0), (cells, (2, 5, 24))),
        (vae.Upsample(channels), (cells,)),
        (GroupNorm(8, channels, 1e-5), (cells,)),
        (GroupNormSiLU(8, channels, 1e-5), (cells,)),
        (LayerNorm(channels), (tokens,)),
        (GEGLU(channels, 24), (tokens,)),
    ]
    apart = 0.0
    for layer, sizes in tried:
        layer = layer.to(torch.float32)
        given = [torch.randn(size, dtype=torch.float32) for size in sizes]
        expected = _called(layer, *given)
        layer = _fused(layer.to(device, dtype).to(memory_format=_LAST))  # type: ignore[call-overload]
        there = (one.to(device, dtype) for one in given)
        found = _called(layer, *(one.contiguous(memory_format=_LAST) if one.ndim == 4 else one for one in there))
        apart = max(apart, error(found, expected))
    return apart


def _called(layer: nn.Module, *given: Tensor) -> Tensor:
    if isinstance(layer, vae.Upsample) and isinstance(layer.conv, GrowConv2d):  # whatever the size
        return cast(Tensor, layer.conv.grow(*given))
    return layer(*given, Hooks({}, "all", (), {}))[0] if isinstance(layer, Transformer) else layer(*given)


class PointConv2d(nn.Conv2d):
    """A 1x1 convolution, computed as the linear map of channels that it is: it adds the bias in the same pass."""

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,h,w] -> [B,C',h,w]."""
        last = x.is_cuda and x.is_contiguous(memory_format=_LAST) and not torch.compiler.is_compiling()
        if not last or self.stride != (1, 1) or self.padding != (0, 0) or self.groups != 1:
            return super().forward(x)
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class GrowConv2d(nn.Conv2d):
    """A 3x3 convolution that can upsample before, without the large grid."""

    def grow(self, x: Tensor) -> Tensor | None:
        """Nearest-neighbour upsampling by 2, then this: [B,C,h,w] -> [B,C',2h,2w]; None where torch does it. An output
        cell's 3x3 cells are of 2x2 cells of x, so four convolutions of x with sums of the weights give the four output
        cells of each.
        """
        out, channels = self.weight.shape[:2]
        if not (_bare(self) and _usable(self, x)):
            return None
        from . import triton_kernels as kernels

        x, weight = (one.contiguous(memory_format=_LAST) for one in (x, self.weight))
        (batch, _, height, width), block = x.shape, min(128, kernels.power_of_2(out))
        folded = torch.empty(4 * out, channels, 2, 2, dtype=x.dtype, device=x.device, memory_format=_LAST)
        with torch.cuda.device_of(x):
            kernels.fold[-(-out // 2), -(-channels // 128)](weight, folded, out, channels, TILE=8, BLOCK=128)
            size, shares = (batch, out, 2 * height, 2 * width), 4 if 4 * out < _WIDE else 1
            y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=_LAST)
            for first in range(0, 4, shares):
                part = F.conv2d(x, folded[first * out : (first + shares) * out], padding=1)
                part = part.contiguous(memory_format=_LAST)
                kernels.interleave[-(-height * width // 16), -(-out // block), batch](
                    part, self.bias, y, height, width, out, first, SHARES=shares, TILE=16, BLOCK=block
                )
        return y


def transformer(layer: Transformer, x: Tensor, context: Tensor, hooks: Hooks) -> tuple[Tensor | None, Maps]:
    """A transformer whose products add their results to the tokens in place.

    The biases of all of them are added by the first; until a product has come, what reads the tokens takes its bias
    away.
    """
    block = cast(TransformerBlock, layer.transformer_blocks[0])
    ends = cast("tuple[nn.Linear, ...]", (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2]))
    linears, around = (layer.proj_in, layer.proj_out, *ends), (block, block.attn1, block.attn2, block.norm1)
    bare = all(_bare(one) for one in (*linears, *around, block.norm2, block.norm3, block.ff))
    fits = x.is_contiguous(memory_format=_LAST) and x.shape[1] <= _MOST and len(x) == len(context)
    if not bare or not fits or not _usable(layer.proj_in, x):
        return layer.plain(x, context, hooks)
    from . import triton_kernels as kernels

    channels, pending = x.shape[1], [cast(Tensor, one.bias) for one in ends]
    total, grid = torch.empty_like(pending[0]), (x.shape[2], x.shape[3])
    with torch.cuda.device_of(x):
        kernels.total[(-(-channels // 1024),)](layer.proj_in.bias, *pending, total, channels, BLOCK=1024)
    tokens = F.linear(_tokens(layer.norm(x)), _matrix(layer.proj_in), total)
    maps: Maps = {}
    for norm, attn, end in zip((block.norm1, block.norm2), (block.attn1, block.attn2), ends, strict=False):
        y = _layer_norm(norm, tokens, pending)
        y, kept = attn.heads(y, y if attn is block.attn1 else context, grid, hooks)
        if kept is not None:
            maps[attn.site] = kept
        if attn.site == hooks.stop:
            return None, maps
        _add_product(tokens, y, end)
        pending.pop(0)
    _add_product(tokens, block.ff.net[0](_layer_norm(block.norm3, tokens, pending)), ends[2])
    out = F.linear(tokens, _matrix(layer.proj_out)).unflatten(1, grid).permute(0, 3, 1, 2)
    return _sum(kernels, out, x, layer.proj_out.bias), maps


def _tokens(x: Tensor) -> Tensor:
    """[B,C,h,w] in channels_last -> [B,N,C]."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _matrix(layer: nn.Linear | nn.Conv2d) -> Tensor:
    """The weights of a linear map of channels, [C',C]."""
    return layer.weight.flatten(1)


def _add_product(tokens: Tensor, y: Tensor, linear: nn.Linear) -> None:
    """Add linear(y) without its bias to the tokens [B,N,C], in place."""
    tokens.flatten(0, 1).addmm_(y.flatten(0, 1), linear.weight.T)


def res_block(block: ResBlock, x: Tensor, emb: Tensor) -> Tensor:
    """A residual block, whose biases are added by what follows the convolutions."""
    first, second, shortcut = block.conv1, block.conv2, block.conv_shortcut
    bare = all(_bare(one) for one in (first, second, block.norm2, *(() if shortcut is None else (shortcut,))))
    if not bare or not _usable(block.norm1, x) or not x.is_contiguous(memory_format=_LAST):
        return block.plain(x, emb)
    from . import triton_kernels as kernels

    y = _convolved(first, block.norm1(x))
    y = _group_norm(block.norm2, y, block.time_emb_proj(emb), first.bias)
    y = _convolved(second, y)
    skip = x if shortcut is None else _pointwise(shortcut, x)
    more = None if shortcut is None else shortcut.bias
    return _sum(kernels, y, skip, second.bias, more)


def _sum(kernels: Any, y: Tensor, other: Tensor, *biases: Tensor | None) -> Tensor:
    """y + other + one or two biases [C], in place of y; grids [B,C,h,w] in channels_last."""
    count, (bias, more) = y.numel(), (*biases, None)[:2]
    with torch.cuda.device_of(y):
        kernels.add[(-(-count // 1024),)](y, other, bias, more, y, count, y.shape[1], MORE=more is not None, BLOCK=1024)
    return y


def group_norm(norm: GroupNorm, x: Tensor) -> Tensor:
    """Group norm, then SiLU if `norm.silu`, of [B,C,h,w] in channels_last."""
    if not _usable(norm, x) or x.ndim != 4 or not x.is_contiguous(memory_format=_LAST):
        return norm.plain(x)
    return _group_norm(norm, x)


def _group_norm(norm: GroupNorm, x: Tensor, shift: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """The same of x + shift [B,C] + bias [C]."""
    from . import triton_kernels as kernels

    (batch, channels, height, width), each = x.shape, x.shape[1] // norm.num_groups
    cells = height * width
    rows = max(64, kernels.power_of_2(-(-cells // STRIPS)))
    strips, block = -(-cells // rows), min(128, kernels.power_of_2(channels))
    parts = torch.empty(batch, strips, 2, channels, dtype=torch.float32, device=x.device)
    scales = torch.empty(batch, 2, channels, dtype=torch.float32, device=x.device)
    y, columns, shifted = torch.empty_like(x), -(-channels // block), shift is not None
    with torch.cuda.device_of(x):
        kernels.moments[strips, columns, batch](
            x, shift, bias, parts, cells, channels, strips, SHIFT=shifted, ROWS=rows, TILE=64, BLOCK=block
        )
        kernels.combine[batch, norm.num_groups](
            parts,
            scales,
            norm.weight,
            norm.bias,
            cells,
            channels,
            strips,
            norm.eps,
            ROWS=rows,
            EACH=each,
            STRIPS=kernels.power_of_2(strips),
            WIDTH=kernels.power_of_2(each),
        )
        kernels.apply[-(-cells // 64), columns, batch](
            x, shift, bias, y, scales, cells, channels, SHIFT=shifted, SILU=norm.silu, TILE=64, BLOCK=block
        )
    return y


def layer_norm(norm: LayerNorm, x: Tensor) -> Tensor:
    """Layer norm over the last dimension of a contiguous tensor."""
    if not _usable(norm, x) or not x.is_contiguous() or x.shape[-1] > _MOST:
        return norm.plain(x)
    return _layer_norm(norm, x, [])


def _layer_norm(norm: nn.LayerNorm, x: Tensor, less: list[Tensor]) -> Tensor:
    """The same of x less up to three vectors [C]."""
    from . import triton_kernels as kernels

    channels = x.shape[-1]
    y, block = torch.empty_like(x), kernels.power_of_2(channels)
    rows, tile = x.numel() // channels, max(1, 2048 // block)
    with torch.cuda.device_of(x):
        kernels.layer_norm[(-(-rows // tile),)](
            x,
            *[*less, None, None, None][:3],
            y,
            norm.weight,
            norm.bias,
            rows,
            channels,
            norm.eps,
            LESS=len(less),
            TILE=tile,
            BLOCK=block,
        )
    return y


def gated_gelu(layer: GEGLU, x: Tensor) -> Tensor:
    """A GEGLU, whose bias is added with the activation: [B,N,C] -> [B,N,C']."""
    if not _usable(layer.proj, x) or not _bare(layer.proj):
        return layer.plain(x)
    from . import triton_kernels as kernels

    both = F.linear(x, layer.proj.weight)
    channels = both.shape[-1] // 2
    y = both.new_empty(*both.shape[:-1], channels)
    with torch.cuda.device_of(both):
        kernels.gated_gelu[(-(-y.numel() // 1024),)](both, layer.proj.bias, y, y.numel(), channels, BLOCK=1024)
    return y


def _convolved(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution without its bias, in channels_last."""
    y = F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    return y.contiguous(memory_format=_LAST)


def _pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1x1 convolution without its bias, in channels_last."""
    return F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1)).permute(0, 3, 1, 2)


def _bare(layer: nn.Module) -> bool:
    """Whether a layer does what its class says, with all its weights, so that they can be used without calling it."""
    if is_hooked(layer):
        return False
    if type(layer) in (AttentionLayer, FeedForward, TransformerBlock):
        return True
    if type(layer) in (GroupNorm, GroupNormSiLU, LayerNorm, nn.Linear):
        return layer.weight is not None and layer.bias is not None
    conv = type(layer) in (nn.Conv2d, PointConv2d, GrowConv2d)
    return conv and layer.bias is not None and layer.padding_mode == "zeros"


def _usable(layer: Any, x: Tensor) -> bool:
    return x.dtype == layer.weight.dtype and usable(x)


def usable(x: Tensor) -> bool:
    """Whether these kernels take a tensor."""
    return (
        not torch.is_grad_enabled()
        and x.is_cuda
        and x.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and x.numel() > 0
        and not torch.is_autocast_enabled("cuda")
        and not torch.compiler.is_compiling()
    )
