"""What a card does in one pass over memory instead of several, in Triton: it waits for memory, not for arithmetic.

torch's group norm wants [B,C,h,w] in that order, convolutions are fastest in [B,h,w,C], and the copies between them
take a quarter of a step; here the norm works on [B,h,w,C], and applies the activation while it writes. A convolution's
bias is another pass in cuDNN; here what comes next adds it.
Without gradients only, but for 1x1 convolutions; elsewhere torch's own kernels run. Sums are in float32.
"""

import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..checks import warn
from ..networks.attention import AttentionLayer
from ..networks.config import UNetConfig
from ..networks.norm import GroupNorm, GroupNormSiLU, LayerNorm
from ..networks.unet import GEGLU, ResBlock

Network = TypeVar("Network", bound=nn.Module)
STRIPS = 256
"""The most parts whose sums are combined for a group norm."""
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
        ):
            if isinstance(module, kind):
                setattr(module, "fused", function)  # noqa: B010  # a function of a class would become a method
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
    config = UNetConfig(block_out_channels=(16,), norm_num_groups=8)
    cells, tokens = (2, channels, 9, 7), (2, 5, channels)
    tried: list[tuple[nn.Module, tuple[int, ...]]] = [
        (ResBlock(config, channels, 32), cells),
        (GroupNorm(8, channels, 1e-5), cells),
        (GroupNormSiLU(8, channels, 1e-5), cells),
        (LayerNorm(channels), tokens),
        (GEGLU(channels, 24), tokens),
    ]
    apart = 0.0
    for layer, size in tried:
        layer = layer.to(torch.float32)
        given = [torch.randn(size, dtype=torch.float32)]
        given += [torch.randn(2, 64, dtype=torch.float32)] if isinstance(layer, ResBlock) else []
        expected = layer(*given)
        layer = _fused(layer.to(device, dtype).to(memory_format=_LAST))  # type: ignore[call-overload]
        there = (one.to(device, dtype) for one in given)
        found = layer(*(one.contiguous(memory_format=_LAST) if one.ndim == 4 else one for one in there))
        apart = max(apart, error(found, expected))
    return apart


class PointConv2d(nn.Conv2d):
    """A 1x1 convolution, computed as the linear map of channels that it is: it adds the bias in the same pass."""

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,h,w] -> [B,C',h,w]."""
        last = x.is_cuda and x.is_contiguous(memory_format=_LAST) and not torch.compiler.is_compiling()
        if not last or self.stride != (1, 1) or self.padding != (0, 0) or self.groups != 1:
            return super().forward(x)
        return F.linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


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
    out, count = torch.empty_like(y), y.numel()
    with torch.cuda.device_of(y):
        kernels.add[(-(-count // 1024),)](
            y, skip, second.bias, more, out, count, y.shape[1], MORE=more is not None, BLOCK=1024
        )
    return out


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
    if not _usable(norm, x) or not x.is_contiguous() or x.shape[-1] > 2**13:
        return norm.plain(x)
    from . import triton_kernels as kernels

    channels = x.shape[-1]
    y, block = torch.empty_like(x), kernels.power_of_2(channels)
    rows, tile = x.numel() // channels, max(1, 2048 // block)
    with torch.cuda.device_of(x):
        kernels.layer_norm[(-(-rows // tile),)](
            x, y, norm.weight, norm.bias, rows, channels, norm.eps, TILE=tile, BLOCK=block
        )
    return y


def gated_gelu(layer: GEGLU, both: Tensor) -> Tensor:
    """value * gelu(gate) of contiguous [...,2C], the value's channels first."""
    if not _usable(layer.proj, both) or not both.is_contiguous():
        return layer.gated(both)
    from . import triton_kernels as kernels

    channels = both.shape[-1] // 2
    y = both.new_empty(*both.shape[:-1], channels)
    with torch.cuda.device_of(both):
        kernels.gated_gelu[(-(-y.numel() // 1024),)](both, y, y.numel(), channels, BLOCK=1024)
    return y


def _convolved(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution without its bias, in channels_last."""
    y = F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    return y.contiguous(memory_format=_LAST)


def _pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1x1 convolution without its bias, in channels_last."""
    return F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1)).permute(0, 3, 1, 2)


def _bare(layer: nn.Module) -> bool:
    """Whether a layer is its weights alone, so that they can be used without calling it."""
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer):
        return False
    if isinstance(layer, GroupNorm):
        return type(layer) in (GroupNorm, GroupNormSiLU) and layer.weight is not None
    return type(layer) in (nn.Conv2d, PointConv2d) and layer.bias is not None and layer.padding_mode == "zeros"


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
