"""Stages of `bench device`: recorded steps, and what a card may do otherwise than as loaded, so that figures decide."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from minidiff.guidance.layout import mask_inputs
from minidiff.networks.attention import BOX_MASS, HEAD_MEAN, AttentionLayer, Keep, Maps, Record
from minidiff.networks.norm import GroupNorm
from minidiff.networks.sites import Where, at_most, block, choose, cross, place, self_
from minidiff.networks.transformer import Transformer
from minidiff.networks.unet import ResBlock, UNet
from minidiff.recorded import MEAN
from minidiff.speed.fused import GrowConv2d, PointConv2d

from .device_rows import CUDA, HALF, IMAGES, Check, extra_bytes, ratio_row
from .networks import ALIKE, SIZES, Inputs, our_unet, our_vae
from .reference import relative_error
from .table import Row
from .throughput import OURS, ours

EDGES = (IMAGES[0], IMAGES[-1]) if CUDA else IMAGES
FOUR = 1.03
"""A step that records four sites, of a plain step's time."""
AS_GOOD = 1.03
"""What is loaded, of the best variant's time or memory; smaller differences are noise."""
RECORDED: Mapping[str, tuple[Keep, Where]] = {
    "4 sites, head mean": (HEAD_MEAN, cross & (place("mid") | block("up", 1))),
    "4 sites, box mass": (BOX_MASS, cross & (place("mid") | block("up", 1))),
    "to the text, head mean": (HEAD_MEAN, cross),
    "to pixels, head mean": (HEAD_MEAN, self_ & at_most(32)),
}


# --- recorded steps


def recorded(check: Check) -> Iterator[Row]:
    """A step that records, against a plain one: with the kernels of speed/keeps.py, and with all probabilities."""
    size, dtype = SIZES[check.size], HALF[-1]
    weights = check.cast(dtype)
    unet, explicit = our_unet(size, weights), our_unet(size, weights)
    for layer in explicit.modules():
        if isinstance(layer, AttentionLayer):
            layer.fused = None
    for images in EDGES:
        inputs, count = check.inputs(dtype, 2 * images), 20 // images + 1
        where, table = f"{dtype}, {images}", f"recorded step, {dtype}, {images} images"
        plain = check.time(table, OURS, ours(unet, inputs), count)
        for name, (keep, sites) in RECORDED.items():
            there = unet.positions(check.edge, check.edge)
            record = Record(choose(sites, there), keep)
            masks = mask_inputs({at.grid: _halves(images, at.grid, inputs.x.device) for at in there.values()})
            fused, full = (_recording(network, inputs, record, masks) for network in (unet, explicit))
            found, expected = (step() for step in (fused, full))
            apart = max(relative_error(found[site].float(), expected[site].float()) for site in record.kinds)
            yield Row(f"maps: {name}", where, apart, ALIKE[dtype])
            bound = FOUR if name.startswith("4") else math.inf
            for way, step, most in (("", fused, bound), (", explicit", full, math.inf)):
                seconds = check.time(table, name + way, step, count)
                yield ratio_row(f"recorded: {name}", where + way, seconds, plain, most, "a plain step's")


def _halves(images: int, grid: tuple[int, int], at: torch.device) -> Tensor:
    """Masks of two objects: the left half and the right one."""
    left = torch.zeros(images, 1, *grid, device=at)
    left[..., : grid[1] // 2] = 1
    return torch.cat([left, 1 - left], dim=1)


def _recording(unet: UNet, inputs: Inputs, record: Record, masks: dict[str, Tensor]) -> Callable[[], Maps]:
    """A step that records and averages its maps with those of earlier steps; it returns its own."""
    kept: list[Maps | None] = [None]

    @torch.no_grad()
    def step() -> Maps:
        _, maps = unet(inputs.x, inputs.t, inputs.context, record, (), masks)
        kept[0] = MEAN(kept[0], maps, 0 if kept[0] is None else 1)
        return dict(maps)

    return step


# --- variants


def variants(check: Check) -> Iterator[Row]:
    """Steps and decoding as loaded, against the same without one thing that a card gets."""
    size = SIZES[check.size]
    for dtype, images in ((HALF[-1], EDGES[0]), (HALF[-1], EDGES[-1]), ("float32", EDGES[0])):
        seconds, table, weights = {}, f"variants of a step, {dtype}, {images} images", check.cast(dtype)
        inputs = check.inputs(dtype, 2 * images)
        for name, change in STEPS.items():
            unet = our_unet(size, weights)
            change(unet)
            seconds[name] = check.time(table, name, ours(unet, inputs), 20 // images + 1)
        yield from _best("variants, step", f"{dtype}, {images}", seconds)
    for rounded in (False, True):
        with tf32(rounded):
            yield from _decoders(check, "TF32" if rounded else "float32")


def _decoders(check: Check, where: str) -> Iterator[Row]:
    z = Inputs.random(SIZES[check.size], torch.float32, 1, check.edge, check.edge).x
    seconds, extra = {}, {}
    for name, change in DECODERS.items():
        vae = our_vae(SIZES[check.size], torch.float32)
        change(vae)
        call = torch.no_grad()(partial(vae.decode, z))
        seconds[name] = check.time(f"variants of decoding, {where}", name, call, 3)
        extra[name] = extra_bytes(call) / 1e9 if CUDA else 0.0
    yield from _best("variants, decode", where, seconds)
    if CUDA:
        yield from _best("variants, decode: GB", where, extra)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Convolutions in float32 with factors of 10 bits, as torch does by default, or exact."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _best(part: str, where: str, found: Mapping[str, float]) -> Iterator[Row]:
    """What is loaded, the first, against the best."""
    (loaded, *_), best = found, min(found, key=lambda name: found[name])
    note = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
    yield Row(part, where, found[loaded] / found[best], AS_GOOD, f"of {best}'s", note)


def _leave(network: nn.Module) -> None:
    pass


def _without(*kinds: type[nn.Module]) -> Callable[[nn.Module], None]:
    """Without the kernels of some layers."""

    def change(network: nn.Module) -> None:
        for module in network.modules():
            if isinstance(module, kinds) and hasattr(module, "fused"):
                module.fused = None
            if type(module) in kinds and isinstance(module, nn.Conv2d):
                module.__class__ = nn.Conv2d

    return change


def _channels_first(network: nn.Module) -> None:
    """[B,C,h,w] in that order, with torch's own kernels."""
    _without(GroupNorm, ResBlock, Transformer, PointConv2d, GrowConv2d)(network)
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def _whole(network: nn.Module) -> None:
    """No strips."""
    for module in network.modules():
        for name in ("norm_silu_conv_strips", "grow_conv_strips"):
            if hasattr(module, name):
                setattr(module, name, None)


def _first_and_whole(network: nn.Module) -> None:
    _channels_first(network)
    _whole(network)


Change = Callable[[nn.Module], None]
STEPS: dict[str, Change] = {
    "as loaded": _leave,
    "residual blocks by layers": _without(ResBlock),
    "1x1 as convolutions": _without(PointConv2d),
    "transformers by layers": _without(Transformer),
    "upsampled grids": _without(GrowConv2d),
    "torch's group norm": _without(GroupNorm, ResBlock),
    "channels first": _channels_first,
}
DECODERS: dict[str, Change] = {
    "as loaded": _leave,
    "whole": _whole,
    "upsampled grids": _without(GrowConv2d),
    "channels first": _channels_first,
    "channels first, whole": _first_and_whole,
}
