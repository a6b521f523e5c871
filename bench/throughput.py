"""One step of sampling with classifier-free guidance: minidiff against diffusers and OpenVINO, the same weights.

A step is the UNet on two rows, [uncond, cond]. The variants of a stage alternate in one process, and ratios are those
of their medians.
"""

import argparse
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidiff.guidance.regions import Region, share_bias, share_edits, share_name, shares
from minidiff.networks.attention import HEAD_MEAN, Maps, Record
from minidiff.networks.sites import block, choose, cross, place
from minidiff.networks.unet import DEEP, UNet
from minidiff.recorded import MEAN
from minidiff.speed.device import choose_dtype, is_int8

from . import openvino
from .machine import print_header
from .models import Size
from .networks import (
    ALIKE,
    DTYPES,
    SIZES,
    Inputs,
    Weights,
    add_network_arguments,
    compiled_unet,
    device,
    int8_unet,
    judged_dtype,
    our_unet,
    their_compiled_unet,
    their_unet,
    unet_weights,
)
from .reference import relative_error
from .table import Row, finish, print_rows
from .timing import Timing, by_turns, gemm_rate, print_timing

LOADED, LAST, OURS = "diffusers, as loaded", "diffusers, channels_last", "minidiff"
THEIRS_COMPILED, OURS_COMPILED, RECORDED = "diffusers, compiled", "minidiff, compiled", "minidiff, compiled, recording"
OPENVINO, HALF, INT8 = "OpenVINO", "minidiff, bfloat16", "minidiff, int8"
THREE, FOUR = "minidiff, three steps, cache_interval 3", "minidiff, four regions"
Step = Callable[[], Tensor]
BOUNDS = (
    (OURS, LAST, 0.95),
    (OURS, LOADED, 0.85),
    (OURS_COMPILED, THEIRS_COMPILED, 1.0),
    (OURS_COMPILED, LAST, 0.8),
    (OURS_COMPILED, OPENVINO, 1.0),
    (RECORDED, OURS_COMPILED, 1.03),
    (INT8, OURS, 0.5),
    (THREE, OURS, 3 * 0.55),
    (FOUR, OURS, 1.1),
)
"""Variant, reference, and the maximum ratio of their medians."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `python -m bench throughput`."""
    add_network_arguments(parser, [judged_dtype()])
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="steps of each variant (default 5)")
    parser.add_argument("--eager", action="store_true", help="skip compiled variants")


def run(args: argparse.Namespace) -> int:
    """Print a table of variants per dtype. Returns 1 if a bound is violated."""
    facts = {"batch": "2 rows", "latents": f"{args.latents}x{args.latents}", "context": "77", "size": args.size}
    facts |= {"repeats": str(args.repeats), "threads": str(torch.get_num_threads())}
    print_header("one step with classifier-free guidance, random weights", facts)
    if not args.eager:
        print("compiling takes minutes, during the first calls", flush=True)
    rows: list[Row] = []
    timings: dict[str, dict[str, Timing]] = {}
    for name in args.dtype:
        before = gemm_rate(DTYPES[name], device())
        found, apart = measured(args.size, name, args.latents, args.repeats, stages(name, args.eager))
        print(f"{name}: {before:.2f} TFLOP/s in a matrix product before, {gemm_rate(DTYPES[name], device()):.2f} after")
        for stage, variants in found.items():
            base = variants.get(LAST, variants.get(OURS_COMPILED, variants.get(OURS)))
            print(f"{stage}:")
            for timing in variants.values():
                print_timing(timing, None if base is None else base.median)
            rows += list(bounds(variants, name))
            timings[f"{name}, {stage}"] = variants
        limits = {HALF: ALIKE["bfloat16"], INT8: 3 * apart.get(HALF, 0)}
        rows += [Row(f"{one}: eps", name, error, limits.get(one, ALIKE[name])) for one, error in apart.items()]
    print_rows(rows)
    return finish(rows, args.json, timings)


def measured(
    size: str, dtype: str, edge: int, repeats: int, stages: Iterable[str]
) -> tuple[dict[str, dict[str, Timing]], dict[str, float]]:
    """Timings of the variants by stage, and each prediction's relative error to that of diffusers as loaded.

    Each stage is a process: networks that are packed, or compiled by other compilers, hold a second copy of the weights
    until it ends, and all variants together do not fit into 24 GB in float32.
    """
    found: dict[str, dict[str, Timing]] = {}
    eps: dict[str, np.ndarray] = {}
    for name in stages:
        with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
            found[name], some = pool.submit(stage, name, size, dtype, edge, repeats).result()
        eps |= some
    first = torch.from_numpy(eps.pop(LOADED))
    return found, {name: relative_error(torch.from_numpy(value), first) for name, value in eps.items()}


def stage(name: str, size: str, dtype: str, edge: int, repeats: int) -> tuple[dict[str, Timing], dict[str, np.ndarray]]:
    """Timings and predictions of a stage's variants, with the same weights."""
    warnings.simplefilter("ignore")  # torch's compiler and OpenVINO's converter warn about diffusers' code
    inputs = Inputs.random(SIZES[size], DTYPES[dtype], 2, edge, edge)
    variants = STAGES[name](SIZES[size], unet_weights(SIZES[size], DTYPES[dtype]), inputs)
    eps: dict[str, Tensor] = {}
    found = by_turns(_kept(variants, eps), repeats)
    return found, {name: value.float().cpu().numpy() for name, value in eps.items()}


def _kept(variants: Mapping[str, Step], eps: dict[str, Tensor]) -> dict[str, Callable[[], None]]:
    """The same calls, storing their last result in `eps`."""

    def kept(name: str, step: Step) -> None:
        eps[name] = step()

    return {name: partial(kept, name, step) for name, step in variants.items()}


def eager(size: Size, weights: Weights, inputs: Inputs) -> dict[str, Step]:
    """Variants that need no compiler."""
    return {
        LOADED: theirs(their_unet(size, weights), inputs),
        LAST: theirs(their_unet(size, weights).to(memory_format=torch.channels_last), inputs),
        OURS: ours(our_unet(size, weights), inputs),
    }


def compiled(size: Size, weights: Weights, inputs: Inputs) -> dict[str, Step]:
    """Both networks compiled by the same compiler, and the fastest diffusers variant without one."""
    last = _channels_last(weights)
    return {
        LAST: theirs(their_unet(size, last), inputs),
        THEIRS_COMPILED: theirs(their_compiled_unet(size, last), inputs),
        OURS_COMPILED: ours(compiled_unet(size, last), inputs),
    }


def recorded(size: Size, weights: Weights, inputs: Inputs) -> dict[str, Step]:
    """Ours compiled, with and without recording, and OpenVINO, which crashes on bfloat16 weights in channels_last."""
    unet = compiled_unet(size, weights)
    four = choose(cross & (place("mid") | block("up", 1)), unet.positions(*inputs.x.shape[2:]))
    return {
        **({OPENVINO: openvino.step(their_unet(size, weights), inputs)} if openvino.comparable() else {}),
        OURS_COMPILED: ours(unet, inputs),
        RECORDED: streamed(unet, inputs, Record(four, HEAD_MEAN)),
    }


def quantised(size: Size, weights: Weights, inputs: Inputs) -> dict[str, Step]:
    """Ours in float32, in bfloat16 and in int8."""

    def step(make: Callable[[Size, Weights], UNet], dtype: torch.dtype) -> Step:
        cast = Inputs(inputs.x.to(dtype), inputs.t, inputs.context.to(dtype))
        return ours(make(size, {name: value.to(dtype) for name, value in weights.items()}), cast)

    return {
        OURS: ours(our_unet(size, weights), inputs),
        HALF: step(our_unet, torch.bfloat16),
        INT8: step(int8_unet, choose_dtype("int8", device())),
    }


def cached(size: Size, weights: Weights, inputs: Inputs) -> dict[str, Step]:
    """A step, and three of which two reuse the deep layers' result."""
    unet = our_unet(size, weights)

    @torch.no_grad()
    def three() -> Tensor:
        _, maps = unet(inputs.x, inputs.t, inputs.context, None, (), {}, True)
        for _ in range(2):
            eps, _ = unet(inputs.x, inputs.t, inputs.context, None, (), {}, maps[DEEP])
        assert eps is not None
        return eps

    return {OURS: ours(unet, inputs), THREE: three}


def regional(size: Size, weights: Weights, inputs: Inputs) -> dict[str, Step]:
    """A step, and one with a text for each quarter beside the prompt, in both rows; all the same, so is the result."""
    unet, length = our_unet(size, weights), inputs.context.shape[1]
    there = unet.positions(*inputs.x.shape[2:])
    boxes = [(x, y, x + 0.5, y + 0.5) for y in (0, 0.5) for x in (0, 0.5)]
    quarters = [[Region("", box, negative="") for box in boxes]] * (len(inputs.x) // 2)
    biases = {
        share_name(rows, grid): share_bias(shares(quarters, grid, 0.0, rows == "uncond"), [length] * 5).to(inputs.x)
        for grid in {at.grid for at in there.values()}
        for rows in ("cond", "uncond")
    }
    edits, context = share_edits(choose(cross, there), negative=True), inputs.context.repeat(1, 5, 1)

    @torch.no_grad()
    def four() -> Tensor:
        eps, _ = unet(inputs.x, inputs.t, context, None, edits, biases)
        assert eps is not None
        return eps

    return {OURS: ours(unet, inputs), FOUR: four}


STAGES = {
    "eager": eager,
    "cached": cached,
    "regions": regional,
    "int8": quantised,
    "compiled": compiled,
    "recorded": recorded,
}


def stages(dtype: str, only_eager: bool) -> list[str]:
    """The stages for a dtype: int8 is compared with float32, on CPUs that have kernels for it."""
    try:
        int8 = dtype == "float32" and is_int8("int8", device())
    except ValueError:
        int8 = False
    return [
        "eager",
        "cached",
        "regions",
        *(["int8"] if int8 else []),
        *([] if only_eager else ["compiled", "recorded"]),
    ]


def _channels_last(weights: Weights) -> Weights:
    return {name: value.contiguous(memory_format=_layout(value)) for name, value in weights.items()}


def _layout(value: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if value.ndim == 4 else torch.contiguous_format


def theirs(unet: Any, inputs: Inputs) -> Step:
    """A step of UNet2DConditionModel."""

    @torch.no_grad()
    def step() -> Tensor:
        return unet(inputs.x, inputs.t, encoder_hidden_states=inputs.context, return_dict=False)[0]

    return step


def ours(unet: UNet, inputs: Inputs) -> Step:
    """A step of UNet."""

    @torch.no_grad()
    def step() -> Tensor:
        eps, _ = unet(inputs.x, inputs.t, inputs.context)
        assert eps is not None
        return eps

    return step


def streamed(unet: UNet, inputs: Inputs, record: Record) -> Step:
    """A step that records and averages its maps with those of earlier steps."""
    kept: list[Maps | None] = [None]

    @torch.no_grad()
    def step() -> Tensor:
        eps, maps = unet(inputs.x, inputs.t, inputs.context, record)
        assert eps is not None
        kept[0] = MEAN(kept[0], maps, 0 if kept[0] is None else 1)
        return eps

    return step


def bounds(found: Mapping[str, Timing], dtype: str) -> Iterator[Row]:
    """The ratios with bounds, for the variants that ran."""
    for name, other, bound in BOUNDS:
        if name in found and other in found:
            ratio = found[name].median / found[other].median
            yield Row(f"{name} / {other}", dtype, ratio, bound, "of its seconds")
