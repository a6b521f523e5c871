"""Layout guidance: one guided pass, and a whole guided image, against the published method on current diffusers.

A guided pass is the UNet's forward pass for one image and the gradient of the loss with respect to its latents. Both
compute the same loss with the same weights; the table shows their difference.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from minidiff.denoise import guided
from minidiff.guidance.begins import Begins
from minidiff.guidance.evaluate import look_loss
from minidiff.networks.unet import UNet
from minidiff.sampling import SD15_SCHEDULER_CONFIG, Euler, NoiseSchedule, sample
from minidiff.speed.accelerate import looks_of

from .machine import print_header
from .memory import measure
from .models import Size
from .networks import (
    ALIKE,
    DTYPES,
    PLACES,
    SIZES,
    Inputs,
    Weights,
    add_network_arguments,
    compiled_unet,
    device,
    guided_pass,
    judged_dtype,
    layout_guide,
    our_unet,
    their_unet,
    tokens,
    unet_weights,
)
from .published import Published
from .reference import reference_scheduler, relative_error
from .table import Row, finish, print_rows
from .timing import Timing, by_turns, gemm_rate, print_timing, seconds

PUBLISHED, OURS, COMPILED = "the published method, diffusers", "minidiff", "minidiff, compiled"
TIME = {"bfloat16": 0.35, "float16": 0.35, "float32": 0.4}
WHOLE, RESUMED = "a step", "a step that goes on with a look"
MEMORY, IMAGE, RESUMES = 0.22, 0.5, 0.85
FULL = 64
"""Minimum latents per edge for the bound on a whole image: below, the cost common to both dominates."""
STEPS, GUIDED, ITERATIONS = 20, 10, 5
SCALE = 7.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `python -m bench guided`."""
    add_network_arguments(parser, list(dict.fromkeys((judged_dtype(), "float32"))))
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="passes of each variant (default 5)")
    parser.add_argument("--eager", action="store_true", help="skip compiled variants")
    parser.add_argument(
        "--image",
        type=int,
        metavar="N",
        help=f"also whole images of N x N latents: {STEPS} steps, {GUIDED} of them guided, {ITERATIONS} passes each; "
        f"{FULL} x {FULL} have a bound",
    )


def run(args: argparse.Namespace) -> int:
    """Print a table per dtype. Returns 1 if a bound is violated."""
    facts = {"batch": "1", "latents": f"{args.latents}x{args.latents}", "boxes": "2", "size": args.size}
    facts |= {"repeats": str(args.repeats), "threads": str(torch.get_num_threads())}
    print_header("layout guidance against the published method, random weights", facts)
    rows: list[Row] = []
    timings: dict[str, dict[str, Timing]] = {}
    for name in args.dtype:
        size, dtype = SIZES[args.size], DTYPES[name]
        print(f"{name}: {gemm_rate(dtype, device()):.2f} TFLOP/s in a matrix product before", flush=True)
        memory = memory_row(args.size, name, args.latents)
        weights = unet_weights(size, dtype)
        if args.image is not None:
            row = image_row(size, weights, name, args.image)
            rows += [row] if args.image >= FULL else []
        found, apart = passes(size, weights, args.latents, args.repeats, not args.eager)
        for variants in found.values():
            for timing in variants.values():
                print_timing(timing, next(iter(variants.values())).median)
        rows += [memory, *pass_rows(found, apart, name)]
        del weights
        print(f"{name}: {gemm_rate(dtype, device()):.2f} TFLOP/s in a matrix product after", flush=True)
        timings |= {f"{name}, {stage}": variants for stage, variants in found.items()}
    print_rows(rows)
    return finish(rows, args.json, timings)


def passes(
    size: Size, weights: Weights, edge: int, repeats: int, compiled: bool
) -> tuple[dict[str, dict[str, Timing]], tuple[float, float]]:
    """Timings of the variants, eager and then compiled, and our relative error in (loss, gradient).

    Each of ours alternates with the published method; all three do not fit into 24 GB in float32. Where steps go on
    with looks, they are timed, too.
    """
    inputs = Inputs.random(size, weights["conv_in.weight"].dtype, 1, edge, edge)
    unet = our_unet(size, weights)
    own = guided_pass(layout_guide(unet, inputs), inputs)
    way = Published.of(their_unet(size, weights))

    def published() -> tuple[Tensor, Tensor]:
        return way.gradient(inputs.x, inputs.t, inputs.context, PLACES[:2], tokens(2))

    (gradient, loss), (expected_gradient, expected_loss) = own(), published()
    apart = relative_error(loss, expected_loss.expand(1)), relative_error(gradient, expected_gradient)
    found = {"eager": by_turns({PUBLISHED: published, OURS: own}, repeats)}
    if looks_of(unet, look_loss, edge * edge).resumes:
        found["steps"] = by_turns(steps(unet, inputs), repeats)
    del own, unet
    if compiled:
        whole = compiled_unet(size, weights)
        own = guided_pass(layout_guide(whole, inputs), inputs)
        found["compiled"] = by_turns({PUBLISHED: published, COMPILED: own}, repeats)
    return found, apart


def steps(unet: UNet, inputs: Inputs) -> dict[str, Callable[[], Tensor]]:
    """The latents' pass with two texts, and the same after a look at them."""
    guide, begins = layout_guide(unet, inputs), Begins(unet.forward)
    guide.forward, rows = begins.forward, range(len(inputs.x))
    guide.look(inputs.x.float(), inputs.t, 0.5, rows, 0, torch.full((len(rows),), math.inf))
    begins.keep(rows, ())
    begun, twice = begins.take(len(rows)), torch.cat([inputs.x, inputs.x])
    context = torch.cat([inputs.context, inputs.context])
    assert begun is not None

    @torch.no_grad()
    def whole() -> Tensor:
        return cast(Tensor, unet(twice, inputs.t, context)[0])

    return {WHOLE: whole, RESUMED: partial(unet.finish, begun, inputs.t, context)}


def pass_rows(found: dict[str, dict[str, Timing]], apart: tuple[float, float], dtype: str) -> Iterator[Row]:
    """Ratios to the published method, and the differences of loss and gradient."""
    for variants in found.values():
        if RESUMED in variants:
            ratio = variants[RESUMED].median / variants[WHOLE].median
            yield Row(RESUMED, dtype, ratio, RESUMES, "of a step's seconds")
            continue
        for name in variants.keys() - {PUBLISHED}:
            ratio = variants[name].median / variants[PUBLISHED].median
            yield Row(f"a guided pass: {name}", dtype, ratio, TIME[dtype], "of the published method's seconds")
    for what, error in zip(("loss", "gradient"), apart, strict=True):
        yield Row(f"{what} against the published method's", dtype, error, ALIKE[dtype])


def memory_row(size: str, dtype: str, edge: int) -> Row:
    """Memory of a pass in addition to that in use before it, in fresh processes."""
    ours, theirs = (measure("guided", library, dtype, size, edge).extra for library in ("minidiff", "diffusers"))
    note = f"{ours / 1e9:.2f} GB and {theirs / 1e9:.2f} GB"
    return Row("extra memory of a guided pass", dtype, ours / theirs, MEMORY, "of the published method's", note)


def image_row(size: Size, weights: Weights, dtype: str, edge: int) -> Row:
    """One whole image each, with the same number of guided passes."""
    inputs = Inputs.random(size, DTYPES[dtype], 2, edge, edge)
    ours = seconds(lambda: our_image(size, weights, inputs))
    theirs = seconds(lambda: their_image(size, weights, inputs))
    note = f"{ours:.1f} s and {theirs:.1f} s"
    of = f"{8 * edge}x{8 * edge} pixels"
    print(
        f"{dtype}: a guided image of {of}, minidiff {ours:.1f} s, the published method {theirs:.1f} s, "
        f"{ours / theirs:.2f} x",
        flush=True,
    )
    return Row(
        f"a guided image of {of}",
        f"{dtype}, {STEPS} steps",
        ours / theirs,
        IMAGE,
        "of the published method's seconds",
        note,
    )


def our_image(size: Size, weights: Weights, inputs: Inputs) -> Tensor:
    """Latents after a run that makes all its guided passes, including packing on first use."""
    unet = our_unet(size, weights)
    one = Inputs(inputs.x[:1], inputs.t, inputs.context[1:])
    guide = layout_guide(unet, one, iterations=ITERATIONS, steps=GUIDED)
    noise = NoiseSchedule.from_config(SD15_SCHEDULER_CONFIG)

    @torch.no_grad()
    def denoise(x: Tensor, t: Tensor, sigma: float, index: int) -> tuple[Tensor, dict[Any, Tensor]]:
        eps, maps = unet(torch.cat([x, x]).to(inputs.x.dtype), t, inputs.context)
        assert eps is not None
        return guided(*eps.float().chunk(2), SCALE), maps

    *_, last = sample(denoise, one.x.float(), Euler().schedule(noise, STEPS), Euler(), guide.refine)
    return last.latents


def their_image(size: Size, weights: Weights, inputs: Inputs) -> Tensor:
    """The same with diffusers' scheduler and the published pass."""
    published = Published.of(their_unet(size, weights))
    scheduler = reference_scheduler("euler", SD15_SCHEDULER_CONFIG, STEPS)
    x = inputs.x[:1].float() * scheduler.init_noise_sigma
    for index, (t, sigma) in enumerate(zip(scheduler.timesteps, scheduler.sigmas, strict=False)):
        for _ in range(ITERATIONS if index < GUIDED else 0):
            scaled = (x / (sigma**2 + 1) ** 0.5).to(inputs.x.dtype)
            gradient, _ = published.gradient(scaled, t, inputs.context[1:], PLACES[:2], tokens(2))
            x = x - 30 * sigma**2 * gradient.float() / (sigma**2 + 1) ** 0.5
        with torch.no_grad():
            scaled = (torch.cat([x, x]) / (sigma**2 + 1) ** 0.5).to(inputs.x.dtype)
            eps = published.unet(scaled, t, encoder_hidden_states=inputs.context, return_dict=False)[0].float()
            published.store.clear()
            x = scheduler.step(guided(*eps.chunk(2), SCALE), t, x, return_dict=False)[0]
    return x
