"""Layers of a UNet in 8-bit integers, for CPUs with VNNI instructions: three to four times float32's rate.

Weights have a scale per output channel; inputs a scale and a zero point per tensor, measured in each call (Jacob et al.
2018, "Quantization and training of neural networks for integer-arithmetic-only inference"). Sums are exact integers,
results float. Gradients pass straight through: they are those of the float weights (Bengio et al. 2013).
"""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..networks.attention import attention
from ..networks.transformer import FeedForward
from ..networks.unet import UNet
from .device import machine
from .packed import Packed, PackedConv2d, PackedLinear, is_plain, transformed

Network = TypeVar("Network", bound=nn.Module)
_FLOAT = ("conv_in", "conv_out", "time_embedding", "time_emb_proj", "attn2.to_k", "attn2.to_v")
"""Layers that stay float: the first and the last, and those that read the timestep or the text: they cost little, and
texts have outliers.
"""
_LARGE = 2**12
"""Weights from which a layer is quantised."""
_ONES = [1, 1]
_ROWS = 512
"""Rows of a feed-forward layer at a time: what is between its linear maps stays in the cache, and has own scales."""
_KEYS = 1024
"""Keys from which attention's products are computed in bfloat16."""
_PROBABILITIES = 2**20
"""At a time: they stay in the cache. Several threads take 16 times as many, since they wait after each product."""


def to_int8(unet: Network) -> Network:
    """Quantise, in place, the convolutions and linear layers of a UNet. Norms stay float, as do attention's products:
    bfloat16 where they are large and that is faster.

    The float weights are kept for gradients and adapters; those mapped from a file leave memory when it is needed.
    """
    for path, layer in list(unet.named_modules()):
        if any(f".{name}." in f".{path}." for name in _FLOAT):
            continue
        if type(layer) is nn.Linear and layer.weight.numel() >= _LARGE:
            unet.set_submodule(path, Int8Linear(layer))
        elif is_plain(layer) and layer.weight.numel() >= _LARGE:
            unet.set_submodule(path, Int8Conv2d(layer))
        elif type(layer) is FeedForward:
            layer.__class__ = FeedForwardByRows
    if isinstance(unet, UNet) and _halves_pay():
        setattr(unet, "attend", attend)  # noqa: B010  # a function of the instance is no method
    return unet


class FeedForwardByRows(FeedForward):
    """A feed-forward layer, some rows at a time."""

    def forward(self, x: Tensor) -> Tensor:
        """[B,N,C] -> [B,N,C]."""
        rows = x.flatten(0, -2)
        if torch.compiler.is_compiling() or len(rows) <= _ROWS:
            return super().forward(x)
        return torch.cat([super(FeedForwardByRows, self).forward(some) for some in rows.split(_ROWS)]).view_as(x)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attention`, where it is large and no gradient is asked for with products and probabilities in bfloat16."""
    tracked = torch.is_grad_enabled() and any(one.requires_grad for one in (q, k, v))
    if tracked or k.shape[2] < _KEYS or q.dtype != torch.float32 or torch.compiler.is_compiling() or transformed():
        return attention(q, k, v)
    keys = (k * k.shape[-1] ** -0.5).bfloat16().mT.contiguous()
    queries, values = q.bfloat16(), F.pad(v.bfloat16(), (0, -v.shape[-1] % 16)).contiguous()  # whole vectors
    rows = max(1, _PROBABILITIES * (1 if torch.get_num_threads() == 1 else 16) // k.shape[2])
    logits = keys.new_empty(min(rows, q.shape[2]), k.shape[2])
    out = q.new_empty(len(q), q.shape[2], q.shape[1], v.shape[-1])  # [B,N,H,D], as the next layer reads it
    for i, j in itertools.product(*map(range, q.shape[:2])):
        for into, some in zip(out[i, :, j].split(rows), queries[i, j].split(rows), strict=True):
            probs = torch.mm(some, keys[i, j], out=logits[: len(some)])
            torch.softmax(probs, 1, out=probs)  # in place: each row is read before it is written
            into.copy_((probs @ values[i, j])[:, : v.shape[-1]])
    return out.transpose(1, 2)


@cache
def _halves_pay() -> bool:
    """Whether a product in bfloat16 is faster than one in float32 here; torch's own kernel is not without AMX."""
    rates = machine().rates
    return bool(rates) and rates["bfloat16 product"] > 1.3 * rates["float32 product"]


def quantise(x: Tensor) -> tuple[Tensor, float, int] | None:
    """A contiguous tensor as (uint8 q, scale, zero point): x is about scale * (q - zero). None if x is not finite.

    Zero is exact, as padding needs, and its point at least 1, since oneDNN's packed weights differ at 0.
    """
    least, most = (float(value) for value in torch.aminmax(x)) if x.numel() else (0.0, 0.0)
    least, most = min(least, 0.0), max(most, 0.0)
    if not math.isfinite(most - least):
        return None
    scale = max((most - least) / 253, 1e-30)  # of 256 values: one lost to the zero point, one each to rounding
    zero = 1 + round(-least / scale)
    # In float32 the spacing from 2**23 on is 1: the sum is rounded, and its last byte is q. It is the fastest way that
    # torch offers, five times faster than a conversion to uint8.
    shifted = torch.add(torch.tensor(2.0**23 + zero, dtype=torch.float32, device=x.device), x.float(), alpha=1 / scale)
    return shifted.view(torch.int32).to(torch.uint8), scale, zero


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [C',...] as (int8 q, float32 scale [C']): w is about scale * q."""
    scale = weight_scales(weight)
    return (weight.detach().float() / scale.view(-1, *[1] * (weight.ndim - 1))).round_().to(torch.int8), scale


def weight_scales(weight: Tensor) -> Tensor:
    """The scales of `quantise_weight` alone, for much less than its work."""
    return weight.detach().flatten(1).abs().amax(dim=1).float().clamp(min=1e-30) / 127


class Int8Linear(PackedLinear):
    """nn.Linear in int8."""

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        found = quantise(rows)
        if found is None:
            return self.plain(x, self.weight, bias)
        q, scale, zero = found
        scales, zeros = _scales(self)
        packed = self._derive(
            "int8", lambda: torch.ops.onednn.qlinear_prepack(quantise_weight(self.weight)[0], list(rows.shape))
        )
        y = torch.ops.onednn.qlinear_pointwise(
            q, scale, zero, packed, scales, zeros, _float(bias), 1.0, 0, x.dtype, "none", [], ""
        )
        return y.view(*x.shape[:-1], self.shape[0])


class Int8Conv2d(PackedConv2d):
    """nn.Conv2d in int8."""

    def grows(self, x: Tensor) -> bool:
        """Never: on a grid of upsampled cells int8 is faster than float32 without."""
        return False

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        found = quantise(x.movedim(1, -1).contiguous())
        if found is None:
            return self.plain(x, self.weight, bias)
        q, scale, zero = found
        scales, zeros = _scales(self)
        how = self.stride, self.padding, _ONES, 1
        packed = self._derive(
            "int8",
            lambda: torch.ops.onednn.qconv_prepack(
                quantise_weight(self.weight)[0], scales, scale, zero, *how, list(x.shape)
            ),
        )
        return torch.ops.onednn.qconv2d_pointwise(
            q.movedim(-1, 1), scale, zero, packed, scales, zeros, _float(bias), *how, 1.0, 0, x.dtype, "none", [], ""
        )


def _scales(layer: Packed) -> tuple[Tensor, Tensor]:
    """The scale of each output channel, and its zero point, which is 0."""
    scales = layer._derive("int8 scales", lambda: weight_scales(layer.weight))
    return scales, torch.zeros(len(scales), dtype=torch.int32, device=scales.device)


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()
