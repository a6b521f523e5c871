"""Memory: a step, a guided pass, a batch, a large image, its decoding, and runs of more steps, against diffusers.

Each number comes from a fresh process that runs the operation twice (once.py): "extra" is the second run's peak above
the memory in use before it, "in all" that peak itself, including the interpreter and every copy of the weights. Each
tensor has its own mapping there, so that heap fragmentation does not count.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass

from .load import python
from .machine import print_header
from .networks import add_network_arguments
from .table import Row, finish, print_head, print_row

STEPS = (3, 9)


@dataclass(frozen=True)
class Once:
    """The output of bench.once, in bytes and seconds."""

    loaded: int
    ready: int
    peak: int
    seconds: float

    @property
    def extra(self) -> int:
        return self.peak - self.ready


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `python -m bench memory`."""
    add_network_arguments(parser, ("bfloat16", "float32"))


def run(args: argparse.Namespace) -> int:
    """Print one row per measurement. Returns 1 if a bound is violated."""
    print_header("memory, random weights", {"size": args.size, "latents": f"{args.latents}x{args.latents}"})
    print_head()
    rows = []
    for dtype in args.dtype:
        for row in dtype_rows(args.size, dtype, args.latents):
            print_row(row)
            rows.append(row)
    return finish(rows, args.json)


def dtype_rows(size: str, dtype: str, edge: int) -> Iterator[Row]:
    """The rows of one dtype."""

    def once(case: str, library: str, at: int = edge, count: int = 1) -> Once:
        return measure(case, library, dtype, size, at, count)

    ours, theirs = once("step", "minidiff"), once("step", "diffusers")
    yield _row("a step, extra", dtype, ours.extra, theirs.extra, 1.0)
    yield _row("a step, in all", dtype, ours.peak, theirs.peak, 1.1)
    four = once("step", "minidiff", count=4)
    yield _row("a step of four images, extra", dtype, four.extra, 4 * ours.extra, 1.1, "of four times one image's")
    ours, theirs = once("guided", "minidiff"), once("guided", "diffusers")
    yield _row("a guided pass, extra", dtype, ours.extra, theirs.extra, 0.22)
    yield _row("a guided pass, in all", dtype, ours.peak, theirs.peak, 1.0)
    for scale in (1, 2):
        at = scale * edge
        ours, theirs = once("decode", "minidiff", at), once("decode", "diffusers", at)
        yield _row(f"decoding {8 * at}x{8 * at}, extra", dtype, ours.extra, theirs.extra, 0.75)
    ours, theirs = once("step", "minidiff", 2 * edge), once("step", "diffusers", 2 * edge)
    yield _row(f"a step of {16 * edge}x{16 * edge}, extra", dtype, ours.extra, theirs.extra, 1.0)
    few, many = (once("sampling", "minidiff", edge // 2, steps) for steps in STEPS)
    what = f"{STEPS[1]} guided and recorded steps"
    yield _row(what, dtype, many.peak, few.peak, 1.02, f"of {STEPS[0]} steps' peak")


def _row(part: str, dtype: str, ours: int, other: int, bound: float, unit: str = "of diffusers'") -> Row:
    return Row(part, dtype, ours / other, bound, unit, f"{ours / 1e9:.2f} GB and {other / 1e9:.2f} GB")


def measure(case: str, library: str, dtype: str, size: str, edge: int, count: int = 1) -> Once:
    """Measure one case in a fresh process."""
    return Once(**json.loads(python("-m", "bench.once", case, library, dtype, size, str(edge), str(count))))
