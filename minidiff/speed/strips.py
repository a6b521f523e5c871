"""Large grids strip by strip: group norm, activation and 3x3 convolution, or a feed-forward layer, without more copies.

Exact up to rounding, unlike tiles with blended seams: the norm's mean and variance are those of the whole grid, and
each strip's convolution includes the adjacent rows.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..networks import resample
from ..networks.norm import GroupNorm, are_hooked, is_hooked
from ..networks.transformer import GEGLU, FeedForward
from .packed import PackedConv2d, PackedLinear, transformed

Network = TypeVar("Network", bound=nn.Module)
AT_ONCE = 2**22
"""Elements of a grid processed at a time (16 MB in float32)."""
_GATED = 2**20
"""Numbers to gate at a time: they stay in the cache (4 MB in float32)."""


def by_strips(network: Network) -> Network:
    """Make a network process its largest grids strip by strip, in place."""
    for module in network.modules():
        for name, function in _STRIPS.items():
            if hasattr(type(module), name):
                setattr(module, name, function)
    return network


def norm_silu_conv(norm: GroupNorm, conv: nn.Module, x: Tensor) -> Tensor:
    """conv(silu(norm(x))) for a 3x3 convolution with padding 1: [B,C,h,w] -> [B,C',h,w]."""
    if not _can_divide(x):
        return conv(norm(x))
    if len(x) > 1:
        return torch.cat([norm_silu_conv(norm, conv, one) for one in x.split(1)])
    weight, bias = (value.to(torch.promote_types(x.dtype, torch.float32)) for value in (norm.weight, norm.bias))
    mean, variance = _statistics(norm, x, weight, bias)

    def strip(part: Tensor) -> Tensor:
        # with given statistics, the group norm of one image is a batch norm in inference mode
        return F.silu(F.batch_norm(part, mean, variance, weight, bias, eps=norm.eps), inplace=True)

    return _by_strips(x, lambda part: conv(strip(part)), 1)


def grow_conv(conv: nn.Module, x: Tensor) -> Tensor:
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution with padding 1: [B,C,h,w] -> [B,C',2h,2w]."""
    whole = partial(resample.grow_conv, conv)
    divides = _can_divide(x) and not (isinstance(conv, PackedConv2d) and conv.grows(x))  # that divides for itself
    return _by_strips(x, whole, 2) if divides else whole(x)


def feed_forward(layer: FeedForward, x: Tensor) -> Tensor:
    """The layer, on the CPU: [B,N,C] -> [B,N,C]. Parts of what is between its products stay in the cache; the whole of
    it, and of its gradient, would go to fresh pages.
    """
    gated = cast(GEGLU, layer.net[0])
    linear: list[nn.Module] = [gated.proj, layer.net[2]]
    if x.device.type != "cpu" or any(type(one) is not PackedLinear for one in linear):
        return layer.whole(x)
    hooked = any(is_hooked(one) or one._backward_hooks or one._backward_pre_hooks for one in (gated, *linear))
    if hooked or are_hooked() or transformed() or torch.is_autocast_enabled("cpu"):
        return layer.whole(x)
    parts = x.flatten(0, -2).chunk(-(-x.shape[:-1].numel() * gated.width // _GATED))
    return torch.cat([layer.whole(part) for part in parts]).unflatten(0, x.shape[:-1])


_STRIPS: dict[str, Callable[..., Tensor]] = {
    "norm_silu_conv_strips": norm_silu_conv,
    "grow_conv_strips": grow_conv,
    "strips": feed_forward,
}


def _can_divide(x: Tensor) -> bool:
    """Whether to use strips: on the CPU, and in float32 on a card, without gradients.

    Autograd would keep all that strips save, and only the CPU's group norm returns its statistics in float32 whatever
    its input is. On a card cuDNN's exact float32 convolutions copy channels_last grids to and fro in its workspace.
    """
    there = x.device.type == "cpu" or (x.is_cuda and x.dtype == torch.float32)
    return there and not torch.is_grad_enabled()


def _strips(x: Tensor, growth: int) -> Iterator[tuple[int, int]]:
    """The first row and the end (exclusive) of each strip."""
    height = x.shape[2]
    at_once = AT_ONCE * (2 if x.is_cuda else 1)  # where each strip's dozen launches cost more
    rows = max(1, at_once * height // (growth * x.numel()))
    return ((top, min(top + rows, height)) for top in range(0, height, rows))


def _by_strips(x: Tensor, make: Callable[[Tensor], Tensor], scale: int) -> Tensor:
    """make(x), which has `scale` times as many rows and columns, each of which depends on adjacent rows of x alone."""
    height, out = x.shape[2], None
    for top, end in _strips(x, scale**2):
        first = max(top - 1, 0)  # the convolution needs one more row; zero padding only at the grid's edges
        y = make(x[:, :, first : min(end + 1, height)])
        if out is None:
            size = (len(x), y.shape[1], scale * height, y.shape[3])
            out = torch.empty(size, dtype=y.dtype, device=y.device, memory_format=torch.channels_last)
        out[:, :, scale * top : scale * end] = y[:, :, scale * (top - first) : scale * (end - first)]
    assert out is not None
    return out


def _statistics(norm: nn.GroupNorm, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [C] of each channel's group, for one image, in the dtype of `weight` and `bias`."""
    found: list[Tensor] = []
    for top, end in _strips(x, 1):
        # on a card this operator takes no other order
        order = torch.channels_last if x.device.type == "cpu" else torch.contiguous_format
        part = x[:, :, top:end].contiguous(memory_format=order)
        channels, cells, groups = part.shape[1], part[0, 0].numel(), norm.num_groups
        _, mean, rstd = torch.native_group_norm(part, weight, bias, 1, channels, cells, groups, norm.eps)
        share = mean.new_full(mean.shape, (end - top) / x.shape[2])
        found.append(torch.cat([share, mean, rstd**-2 - norm.eps]))
    shares, means, variances = torch.stack(found, dim=1)  # [strips,groups] each
    mean = (shares * means).sum(0)
    variance = (shares * (variances + (means - mean) ** 2)).sum(0)
    each = x.shape[1] // norm.num_groups
    return mean.repeat_interleave(each), variance.repeat_interleave(each)
