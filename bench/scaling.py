"""How cost grows with the batch, the resolution, the number of steps and of boxes: seconds by turns, in one process."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from minidiff.networks.unet import UNet

from .machine import print_header
from .networks import (
    DTYPES,
    SIZES,
    Inputs,
    device,
    guided_pass,
    guided_run,
    judged_dtype,
    layout_guide,
    our_unet,
    unet_weights,
)
from .plot import lines
from .table import Row, finish, print_rows
from .throughput import ours
from .timing import Timing, by_turns, gemm_rate, print_timing

BATCHES, BOXES, STEPS, EDGES = (1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4), (0.5, 0.75, 1.0, 1.25)
LEVEL = 1.05
"""What an image of a batch may cost of one alone, a step of many of a single one, the dearest number of boxes of the
cheapest.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `python -m bench scaling`."""
    parser.add_argument("--size", choices=SIZES, default="full", help="of the networks (default: SD 1.5's)")
    parser.add_argument("--dtype", choices=DTYPES, default=judged_dtype())
    parser.add_argument("--latents", type=int, default=64, metavar="N", help="of a whole image; batches take N/2")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="calls of each variant (default 5)")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="write a PNG for each")


def run(args: argparse.Namespace) -> int:
    """Four tables; 1 where a ratio is out of its bound."""
    size, dtype, half = SIZES[args.size], DTYPES[args.dtype], args.latents // 2
    facts = {"dtype": args.dtype, "size": args.size, "latents": f"{args.latents}x{args.latents}"}
    facts |= {"repeats": str(args.repeats), "threads": str(torch.get_num_threads())}
    print_header("scaling, random weights", facts)
    print(f"{gemm_rate(dtype, device()):.2f} TFLOP/s in a matrix product before")
    unet = our_unet(size, unet_weights(size, dtype))
    everything = Inputs.random(size, dtype, 2 * max(BATCHES), half, half)
    found = {
        "batch": batches(unet, everything, args.repeats),
        "boxes": boxes(unet, _first(everything, 1), args.repeats),
        "steps": steps(unet, _first(everything, 2), args.repeats),
        "resolution": resolutions(unet, [int(args.latents * edge) for edge in EDGES], args),
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


def batches(unet: UNet, everything: Inputs, repeats: int) -> dict[str, Timing]:
    """A step of so many images; seconds per image."""
    calls = {str(count): ours(unet, _first(everything, 2 * count)) for count in BATCHES}
    found = by_turns(calls, repeats)
    return {
        name: replace(timing, name=f"images in a batch: {name}, per image", seconds=_over(timing, int(name)))
        for name, timing in found.items()
    }


def boxes(unet: UNet, inputs: Inputs, repeats: int) -> dict[str, Timing]:
    """A guided pass of one image with so many boxes."""
    calls = {str(count): guided_pass(layout_guide(unet, inputs, count), inputs) for count in BOXES}
    return {name: replace(found, name=f"boxes: {name}") for name, found in by_turns(calls, repeats).items()}


def steps(unet: UNet, inputs: Inputs, repeats: int) -> dict[str, Timing]:
    """A run of so many guided and recorded steps."""
    calls = {str(count): guided_run(unet, inputs, count) for count in STEPS}
    return {count: replace(found, name=f"steps: {count}") for count, found in by_turns(calls, repeats).items()}


def resolutions(unet: UNet, edges: Sequence[int], args: argparse.Namespace) -> dict[str, Timing]:
    """A step of one image of each size."""
    size, dtype = SIZES[args.size], DTYPES[args.dtype]
    calls = {str(8 * edge): ours(unet, Inputs.random(size, dtype, 2, edge, edge)) for edge in edges}
    return {
        name: replace(found, name=f"pixels: {name}x{name}") for name, found in by_turns(calls, args.repeats).items()
    }


def _over(timing: Timing, count: int) -> tuple[float, ...]:
    return tuple(one / count for one in timing.seconds)


def _first(inputs: Inputs, rows: int) -> Inputs:
    return Inputs(inputs.x[:rows], inputs.t, inputs.context[:rows])


def _rows(found: Mapping[str, Mapping[str, Timing]], dtype: str) -> Iterator[Row]:
    alone, *others = (timing.median for timing in found["batch"].values())
    yield Row("an image of a batch", f"{dtype}, to {max(BATCHES)}", max(others) / alone, LEVEL, "of one alone")
    one, *others = (timing.median / int(count) for count, timing in found["steps"].items())
    yield Row("a step of a run", f"{dtype}, to {max(STEPS)}", max(others) / one, LEVEL, "of a run of one")
    medians = [timing.median for timing in found["boxes"].values()]
    ratio = max(medians) / min(medians)
    yield Row("the dearest number of boxes", f"{dtype}, to {max(BOXES)}", ratio, LEVEL, "of the cheapest")


def _draw(found: Mapping[str, Mapping[str, Timing]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = {
        "batch": ("images in a batch", "seconds of a step, per image"),
        "boxes": ("boxes", "seconds of a guided pass"),
        "steps": ("guided and recorded steps", "seconds of a run"),
        "resolution": ("pixels along an edge", "seconds of a step"),
    }
    for name, (x_name, y_name) in names.items():
        points = [(float(x), timing.median) for x, timing in found[name].items()]
        lines({"minidiff": points}, x_name, y_name).save(folder / f"{name}.png")
