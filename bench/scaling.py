"""Cost as a function of batch size, resolution, number of boxes and number of steps, timed in one process.

Steps are compared with diffusers in channels_last, guided passes with the published method; a guided and recorded run
has no counterpart.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minidiff.networks.unet import UNet

from .machine import print_header
from .networks import (
    DTYPES,
    PLACES,
    SIZES,
    Inputs,
    device,
    guided_pass,
    guided_run,
    judged_dtype,
    layout_guide,
    our_unet,
    their_unet,
    tokens,
    unet_weights,
)
from .plot import lines
from .published import Published
from .table import Row, finish, print_rows
from .throughput import ours, theirs
from .timing import Timing, by_turns, gemm_rate, print_timing

BATCHES, BOXES, STEPS, EDGES = (1, 2, 4, 8), (1, 2, 4, 8), (2, 3, 4), (0.5, 0.75, 1.0, 1.25)
LEVEL = 1.05
"""Maximum cost ratio: an image in a batch to a single one, a step of a long run to one of a short run, the most
expensive number of boxes to the cheapest.
"""
BOXES_REPEATS = 4
"""Factor for the repeats of boxes: among four medians of three, a ratio of 1.05 occurs by chance."""
THEIRS = {"batch": "diffusers", "boxes": "the published method", "resolution": "diffusers"}
"""What each table is compared with."""
Calls = Mapping[str, Callable[[], object]]
Found = dict[str, dict[str, Timing]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `python -m bench scaling`."""
    parser.add_argument("--size", choices=SIZES, default="full", help="size of the networks (default: SD 1.5's)")
    parser.add_argument("--dtype", choices=DTYPES, default=judged_dtype())
    parser.add_argument("--latents", type=int, default=64, metavar="N", help="N x N latents per image; batches use N/2")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="calls of each variant (default 5)")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write a PNG per table")


def run(args: argparse.Namespace) -> int:
    """Print four tables. Returns 1 if a bound is violated."""
    size, dtype, half = SIZES[args.size], DTYPES[args.dtype], args.latents // 2
    facts = {"dtype": args.dtype, "size": args.size, "latents": f"{args.latents}x{args.latents}"}
    facts |= {"repeats": str(args.repeats), "threads": str(torch.get_num_threads())}
    print_header("scaling, random weights", facts)
    print(f"{gemm_rate(dtype, device()):.2f} TFLOP/s in a matrix product before")
    weights = unet_weights(size, dtype)
    unet, other = our_unet(size, weights), their_unet(size, weights).to(memory_format=torch.channels_last)
    everything = Inputs.random(size, dtype, 2 * max(BATCHES), half, half)
    edges = [int(args.latents * edge) for edge in EDGES]
    found = {
        **batches(unet, other, everything, args.repeats),
        **boxes(unet, Published.of(their_unet(size, weights)), _first(everything, 1), args.repeats),
        **steps(unet, _first(everything, 2), args.repeats),
        **resolutions(unet, other, [Inputs.random(size, dtype, 2, edge, edge) for edge in edges], args.repeats),
    }
    print(f"{gemm_rate(dtype, device()):.2f} TFLOP/s after\n")
    for timings in found.values():
        for timing in timings.values():
            print_timing(timing)
    rows = list(_rows(found, args.dtype))
    print_rows(rows)
    if args.plots is not None:
        _draw(found, args.plots)
    return finish(rows, args.json, found)


def batches(unet: UNet, other: Any, everything: Inputs, repeats: int) -> Found:
    """A step by batch size; seconds per image."""
    inputs = {str(count): _first(everything, 2 * count) for count in BATCHES}
    found = _beside(
        "batch",
        "images in a batch: {}, per image",
        {name: ours(unet, one) for name, one in inputs.items()},
        {name: theirs(other, one) for name, one in inputs.items()},
        repeats,
    )
    return {
        what: {name: replace(timing, seconds=_over(timing, int(name))) for name, timing in timings.items()}
        for what, timings in found.items()
    }


def boxes(unet: UNet, published: Published, inputs: Inputs, repeats: int) -> Found:
    """A guided pass for one image by number of boxes."""

    def way(count: int) -> Callable[[], object]:
        return lambda: published.gradient(inputs.x, inputs.t, inputs.context, PLACES[:count], tokens(count))

    calls = {str(count): guided_pass(layout_guide(unet, inputs, count), inputs) for count in BOXES}
    others = {str(count): way(count) for count in BOXES}
    return _beside("boxes", "boxes: {}", calls, others, BOXES_REPEATS * repeats)


def steps(unet: UNet, inputs: Inputs, repeats: int) -> Found:
    """A guided and recorded run by number of steps."""
    return _beside("steps", "steps: {}", {str(count): guided_run(unet, inputs, count) for count in STEPS}, {}, repeats)


def resolutions(unet: UNet, other: Any, each: Sequence[Inputs], repeats: int) -> Found:
    """A step for one image by resolution."""
    inputs = {str(8 * one.x.shape[-1]): one for one in each}
    return _beside(
        "resolution",
        "pixels along an edge: {}",
        {name: ours(unet, one) for name, one in inputs.items()},
        {name: theirs(other, one) for name, one in inputs.items()},
        repeats,
    )


def _beside(what: str, named: str, own: Calls, other: Calls, repeats: int) -> Found:
    """Time both alternately; {} in `named` is the variant's name."""
    both = {("", name): call for name, call in own.items()}
    both |= {(f", {THEIRS[what]}", name): call for name, call in other.items()}
    timings = by_turns({name + whose: call for (whose, name), call in both.items()}, repeats)
    tables: Found = {}
    for whose, name in both:
        timing = replace(timings[name + whose], name=named.format(name) + whose)
        tables.setdefault(what + whose, {})[name] = timing
    return tables


def _over(timing: Timing, count: int) -> tuple[float, ...]:
    return tuple(one / count for one in timing.seconds)


def _first(inputs: Inputs, rows: int) -> Inputs:
    return Inputs(inputs.x[:rows], inputs.t, inputs.context[:rows])


def _rows(found: Mapping[str, Mapping[str, Timing]], dtype: str) -> Iterator[Row]:
    alone, *others = (timing.median for timing in found["batch"].values())
    yield Row("an image of a batch", f"{dtype}, to {max(BATCHES)}", max(others) / alone, LEVEL, "of one alone")
    short, *others = (timing.median / int(count) for count, timing in found["steps"].items())
    yield Row("a step of a run", f"{dtype}, to {max(STEPS)}", max(others) / short, LEVEL, f"of a run of {min(STEPS)}")
    medians = [timing.median for timing in found["boxes"].values()]
    ratio = max(medians) / min(medians)
    yield Row("the costliest number of boxes", f"{dtype}, to {max(BOXES)}", ratio, LEVEL, "of the cheapest")
    largest = list(found["resolution"])[-1]
    for part, what, name in (
        (f"an image of a batch of {max(BATCHES)}", "batch", str(max(BATCHES))),
        (f"a guided pass with {max(BOXES)} boxes", "boxes", str(max(BOXES))),
        (f"a step of {largest}x{largest}", "resolution", largest),
    ):
        other = found[f"{what}, {THEIRS[what]}"][name]
        yield Row(part, dtype, found[what][name].median / other.median, 1.0, f"of the seconds of {THEIRS[what]}")


def _draw(found: Mapping[str, Mapping[str, Timing]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = {
        "batch": ("images in a batch", "seconds of a step, per image"),
        "boxes": ("boxes", "seconds of a guided pass"),
        "steps": ("guided and recorded steps", "seconds of a run"),
        "resolution": ("pixels along an edge", "seconds of a step"),
    }
    for name, (x_name, y_name) in names.items():
        tables = {"minidiff": found[name]}
        if name in THEIRS:
            tables[THEIRS[name]] = found[f"{name}, {THEIRS[name]}"]
        curves = {curve: [(float(x), timing.median) for x, timing in table.items()] for curve, table in tables.items()}
        lines(curves, x_name, y_name).save(folder / f"{name}.png")
