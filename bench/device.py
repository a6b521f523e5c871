"""Everything that must hold on a CUDA card, in one command of under four minutes, with random weights and the bundled
model. Without a card it is a dry run: the same code on small networks, with the bounds of results alone.

Stages run in sequence, the cheapest and most telling first, and the JSON file is written after each row: a run that is
cut keeps what it measured. A stage that fails is a row that is OUT, with its message. What takes long is measured where
`--only` asks for it; what is compiled has processes of its own (device_compiled.py).
"""

import argparse
import gc
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import minidiff
from minidiff.guidance.evaluate import plainly
from minidiff.vocabulary import OBJECTIVES

from .device_compiled import Compiled, floor_row
from .device_rows import (
    CUDA,
    HALF,
    IMAGES,
    Check,
    as_graph,
    error_of,
    memory_rows,
    plain_step,
    ratio_row,
    rms_of,
    same_rows,
    waits_in,
)
from .device_variants import recorded, tf32, variants
from .guided import PUBLISHED
from .kernels import ATTENTIONS, WORST
from .machine import print_header
from .networks import (
    DTYPES,
    PLACES,
    SIZES,
    Inputs,
    device,
    guided_pass,
    layout_guide,
    our_unet,
    our_vae,
    their_unet,
    their_vae,
    tokens,
    unet_weights,
)
from .published import Published
from .table import LEVELS, RELATIVE, Row, finish, print_head, print_row, write
from .throughput import LOADED, OURS, ours, theirs
from .timing import gemm_rate

EAGER = f"{OURS}, eager"
EXACT, DECODED = 1e-5, 2e-5  # a decoder's sums run over more pixels
CAPTURED = 0.6
"""A step as loaded, of diffusers' time as loaded."""
GUIDED = 0.25
"""A guided pass, of the published way's time."""
GRADIENT = {"float32": 1e-3, "TF32": 0.02, "bfloat16": 0.5, "float16": 0.1}
"""Relative error of a gradient: bfloat16 keeps 8 bits of each factor."""
LOOKS = 5
PROMPT = "a red circle and a blue square"
BOXES = {"red circle": (0.05, 0.1, 0.45, 0.5), "blue square": (0.55, 0.5, 0.95, 0.9)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `python -m bench device`."""
    parser.add_argument("--size", choices=SIZES, default="full" if CUDA else "tiny", help="default: full on a card")
    parser.add_argument("--latents", type=int, default=64 if CUDA else 32, metavar="N", help="N x N latents")
    parser.add_argument("--only", nargs="+", choices=[*STAGES, "compiled"], metavar="STAGE", help="some stages")
    parser.add_argument("--budget", type=float, default=230.0, metavar="SECONDS", help="later stages are left out")
    parser.add_argument("--dtype", choices=HALF, default="bfloat16", help="of what is compiled")
    parser.add_argument("--images", type=int, default=1, metavar="N", help="in a compiled step")


def run(args: argparse.Namespace) -> int:
    """Print a row per measurement. Returns 1 if a bound is violated."""
    warnings.simplefilter("ignore")
    torch.backends.cudnn.allow_tf32 = False  # convolutions in float32 are exact here, as on the CPU
    began = time.perf_counter()
    print_header("on a card" if CUDA else "dry run without a card", {"size": args.size, "latents": str(args.latents)})
    print_head()
    check = Check(args.size, args.latents, unet_weights(SIZES[args.size], torch.float32))
    only = set(STAGES) - ASKED if args.only is None else args.only
    rows: list[Row] = []

    def stage(name: str, make: Callable[[], Iterator[Row]]) -> None:
        if name not in only or time.perf_counter() - began > args.budget:
            return
        before = time.perf_counter()
        for row in _guarded(name, make):
            rows.append(row if CUDA or row.unit in (RELATIVE, LEVELS) else replace(row, bound=math.inf))
            print_row(rows[-1])
            if args.json is not None:
                write(rows, args.json, check.timings)
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
        print(f"  {name}: {time.perf_counter() - before:.1f} s", flush=True)

    for name, make in STAGES.items():
        stage(name, partial(make, check))
    with Compiled(args.size, args.dtype, args.latents, args.images, "compiled" in only) as compiled:
        left = began + args.budget - time.perf_counter()
        stage("compiled", partial(compiled.rows, left, check.rate, check.timings))
    print(f"all: {time.perf_counter() - began:.1f} s")
    return finish(rows, args.json, check.timings)


def _guarded(name: str, make: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """The rows of a stage; what it raises is a row, so that the stages after it run."""
    try:
        yield from make()
    except Exception as problem:
        text = " ".join(str(problem).split())[:200]
        yield Row(name, "failed", math.nan, 0.0, RELATIVE, f"{type(problem).__name__}: {text}")


# --- stages


def rate(check: Check) -> Iterator[Row]:
    """The machine's own speed, without bounds."""
    check.rate = gemm_rate(torch.bfloat16, device(), 8192 if CUDA else 512)
    yield Row("matrix product", "bfloat16", check.rate, math.inf, "TFLOP/s")


def steps(check: Check) -> Iterator[Row]:
    """A step with classifier-free guidance: as loaded, which on a card is a captured graph, and without the graph,
    whose result must be the same bits.
    """
    size = SIZES[check.size]
    for dtype in HALF:
        weights = check.cast(dtype)
        own, other = our_unet(size, weights), their_unet(size, weights)
        for images in IMAGES:
            table, count, where = f"step, {dtype}, {images} images", 20 // images + 1, f"{dtype}, {images}"
            inputs = check.inputs(dtype, 2 * images)
            call, plain, reference = ours(own, inputs), plain_step(own, inputs), theirs(other, inputs)
            loaded, eager = check.time(table, LOADED, reference, count), check.time(table, EAGER, plain, count)
            yield ratio_row("step, eager", where, eager, loaded, math.inf, "diffusers'")  # the host's speed decides
            yield from memory_rows("step, eager", where, plain, reference)
            yield from same_rows("step, captured: bits", where, call, plain)
            seconds = check.time(table, OURS, call, count)
            yield ratio_row("step, captured", where, seconds, loaded, CAPTURED, "diffusers'")
            if check.size == "full":
                yield floor_row("step, captured", where, seconds, images, check.rate)


def guided(check: Check) -> Iterator[Row]:
    """A guided pass: its gradient, its time against the published way's, and what waits for the device in it."""
    for name in ("float32", *(("TF32",) if CUDA else ()), *HALF):
        with tf32(name == "TF32"):
            yield from _guided(check, name)


def _guided(check: Check, name: str) -> Iterator[Row]:
    size, dtype = SIZES[check.size], "float32" if name == "TF32" else name
    weights, one = check.cast(dtype), check.inputs(dtype, 1)
    unet = our_unet(size, weights)
    guide = layout_guide(unet, one, iterations=LOOKS)
    look = guided_pass(guide, one)
    eager_guide = layout_guide(unet, one, iterations=LOOKS)
    eager_guide.run = plainly
    plain = guided_pass(eager_guide, one)
    way = Published.of(their_unet(size, weights))
    published = partial(way.gradient, one.x, one.t, one.context, PLACES[:2], tokens(2))
    found, expected = plain()[0], published()[0]
    check.gradient = expected if check.gradient is None else check.gradient
    yield Row("guided pass: gradient", f"{name}, to float32", error_of(found, check.gradient), GRADIENT[name])
    gradients = (lambda way=way: way()[0] for way in (look, plain))
    yield from same_rows("guided pass, captured: bits", name, *gradients)
    table = f"guided, {name}"
    own, eager, other = (check.time(table, *one, 5) for one in ((OURS, look), (EAGER, plain), (PUBLISHED, published)))
    yield ratio_row("guided pass, eager", name, eager, other, 1.0, "the published way's")
    yield from memory_rows("guided pass, eager", name, plain, published)
    yield ratio_row("guided pass, captured", name, own, other, GUIDED, "the published way's")
    if CUDA:
        places = waits_in(partial(guide.refine, one.x.float(), one.t, 0.5, 0))
        waits = LOOKS * (2 if dtype == "float16" else 1)  # whose gradient may be too large
        note = ", ".join(sorted(set(places)))
        yield Row("waits for the device", f"{LOOKS} looks, {name}", len(places), waits, "waits", note)


def decode(check: Check) -> Iterator[Row]:
    """Decoding of one image at two sizes, in each dtype."""
    size = SIZES[check.size]
    for dtype in ("float32", *HALF):
        own, other = our_vae(size, DTYPES[dtype]), their_vae(size, DTYPES[dtype])
        for edge in (check.edge, 2 * check.edge) if dtype == HALF[-1] else (check.edge,):
            z = Inputs.random(size, DTYPES[dtype], 1, edge, edge).x
            call, reference = (
                torch.no_grad()(lambda network=network, z=z: network.decode(z)) for network in (own, other)
            )
            where = f"{dtype}, {8 * edge} pixels"
            yield Row("decode", where, error_of(call(), reference().sample), DECODED if dtype == "float32" else 0.1)
            seconds = [check.time(f"decode, {where}", *one, 3) for one in ((OURS, call), (LOADED, reference))]
            yield ratio_row("decode", where, seconds[0], seconds[1], 1.0, "diffusers'")
            yield from memory_rows("decode", where, call, reference)


def attention(check: Check) -> Iterator[Row]:
    """The fused kernel that torch takes by itself against each that it can be told to take."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    for pixels, length, channels in ATTENTIONS[:4]:
        pixels, length = (n if check.size == "full" else min(n, 77) for n in (pixels, length))
        q, k, v = (
            torch.randn(2, n, 8, channels, device=device(), dtype=torch.bfloat16).transpose(1, 2)
            for n in (pixels, length, length)
        )
        seconds = {}
        for name in ("default", "FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
            try:
                with nullcontext() if name == "default" else sdpa_kernel(getattr(SDPBackend, name)):
                    call = as_graph(partial(F.scaled_dot_product_attention, q, k, v))
                    seconds[name] = check.time(f"attention, {pixels}x{length}x{channels}", name, call)
            except RuntimeError:
                continue  # not for this shape or machine
        quickest = min(seconds, key=lambda name: seconds[name])
        where = f"{pixels} to {length} x {channels}"
        yield ratio_row("attention", where, seconds["default"], seconds[quickest], WORST, f"{quickest}'s")


def parity(check: Check) -> Iterator[Row]:
    """eps against diffusers' with the same weights; below float32, both against float32."""
    size = SIZES[check.size]
    exact: dict[tuple[int, int], Tensor] = {}
    for dtype in ("float32", *HALF):
        weights = check.cast(dtype)
        own, other = our_unet(size, weights), their_unet(size, weights)
        for grid in ((check.edge, check.edge), (3 * check.edge // 4, 5 * check.edge // 4)):
            inputs = Inputs.random(size, DTYPES[dtype], 2, *grid)
            found, expected = ours(own, inputs)(), theirs(other, inputs)()
            where = f"{dtype}, {grid[0]}x{grid[1]}"
            exact.setdefault(grid, expected)
            if dtype == "float32":
                yield Row("unet", where, error_of(found, expected), EXACT)
            else:
                far, further = (rms_of(one, exact[grid]) for one in (found, expected))
                unit, note = f"of diffusers' {dtype} error", f"{far:.1e} and {further:.1e}"
                yield Row("unet", where, far / further, 1.05, unit, note)


def pictures(check: Check) -> Iterator[Row]:
    """The bundled model's pictures on the card against the CPU's, plain and with boxes; and what README shows."""
    asked: dict[str, dict[str, Any]] = {"plain": {}, "boxes": {"boxes": BOXES}}
    drawn = {what: _picture("cpu", "float32", given) for what, given in asked.items()}
    for dtype in ("float32", *HALF) if CUDA else ("bfloat16",):
        for what, given in asked.items():
            found = _picture(device().type, dtype, given)
            far = float((found - drawn[what]).abs().max()) * 255
            note = f"RMS {rms_of(found, drawn[what]) * 255:.2f}"
            bound = 2.0 if dtype == "float32" else math.inf  # a trained network amplifies rounding with boxes
            yield Row(f"picture, {what}", dtype, far, bound, LEVELS, note)
    model = minidiff.load(device=device())
    weighted = {"word_weights": model.text.word_weights(PROMPT, {"red circle": 2.0})}
    for name, given in {
        "reweight": {"edits": minidiff.reweight(), "inputs": weighted},
        "forward guidance": {"boxes": BOXES, "guidance": "none", "edits": minidiff.forward_guidance(0.8)},
        "attention": {"attention": True},
        **{name: {"boxes": BOXES, "guidance": name} for name in OBJECTIVES},
    }.items():
        minidiff.generate(PROMPT, model=model, steps=2, **given)
        yield Row(f"runs: {name}", device().type, 0.0, 0.0)


STAGES = {
    "rate": rate,
    "steps": steps,
    "recorded": recorded,
    "guided": guided,
    "decode": decode,
    "attention": attention,
    "pictures": pictures,
    "parity": parity,
    "variants": variants,
}
ASKED = {"variants"}
"""Stages that run when `--only` names them."""


def _picture(at: str, dtype: str, given: dict[str, Any]) -> Tensor:
    model = minidiff.load(device=at, dtype=dtype)
    images = minidiff.generate(PROMPT, model=model, seed=3, output="tensor", steps=10 if CUDA else 2, **given).images
    assert isinstance(images, Tensor)
    return images
