"""Loading: minidiff.load against StableDiffusionPipeline.from_pretrained, a full-size model in the page cache.

Each load runs in a fresh process (load_once.py), alternating between the two libraries. Imports are excluded from the
load and reported separately. The peak resident set is measured from the start of the load until every weight has been
read once, so that memory-mapped files are included.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .machine import print_header
from .models import SD15, TINY, write_folder
from .table import Row, finish, print_rows

TIME_BOUND = 1.25
MEMORY_BOUND = 1.05
IMPORT_BOUND = 0.2
STARTUP_BOUND = 1.5
LIBRARIES = ("minidiff", "diffusers")
# dtype of the folder -> requested dtypes
CASES: dict[torch.dtype, tuple[str, ...]] = {
    torch.float16: ("float32", "bfloat16"),
    torch.float32: ("bfloat16", "float32"),
}
IMPORT = """
from time import perf_counter
start = perf_counter()
import torch
middle = perf_counter()
import minidiff
print(middle - start, perf_counter() - middle)
"""
NAMES = """
from time import perf_counter
start = perf_counter()
import torch
from transformers import CLIPTextModel, CLIPTokenizer
print(perf_counter() - start)
"""
STARTUP = """
from time import perf_counter
start = perf_counter()
import sys, tempfile
from minidiff.cli.main import main
from minidiff.result import Result
sampling, save = [], Result.save
def watched(result, *args, **kwargs):
    sampling.append(result.timings["sampling"])
    return save(result, *args, **kwargs)
Result.save = watched
with tempfile.TemporaryDirectory() as folder:
    assert main(["generate", "a red circle", "--seed", "0", "--out", folder]) == 0
    print(perf_counter() - start - sampling[0])
"""
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Load:
    """One load: seconds (`imported`: imports and a tiny load, `touch`: reading every page afterwards) and bytes."""

    imported: float
    wall: float
    cpu: float
    touch: float
    peak: int
    weights: int
    dtype: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `python -m bench load`."""
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="loads per library and case (default 3)")
    parser.add_argument("--dir", metavar="FOLDER", help="folder for the models, 4.3 GB at a time (default: temporary)")


def run(args: argparse.Namespace) -> int:
    """Print each library's numbers case by case. Returns 1 if a bound is violated."""
    if args.repeats < 1:
        raise ValueError(f"--repeats is {args.repeats}; expected at least 1")
    print_header(
        "loading a full-size model from the page cache, against diffusers",
        {"loads": f"{args.repeats} each, alternating, in fresh processes", "threads": str(torch.get_num_threads())},
    )
    rows = [import_row(max(5, args.repeats)), startup_row(max(5, args.repeats))]
    with tempfile.TemporaryDirectory(prefix="minidiff-bench-", dir=args.dir) as name:
        tiny = write_folder(Path(name) / "tiny", TINY)
        for stored, asked in CASES.items():
            folder = write_folder(Path(name) / "full", SD15, stored)
            for dtype in asked:
                case = f"{str(stored).removeprefix('torch.')} -> {dtype}"
                rows += case_rows(case, by_turns(folder, dtype, tiny, args.repeats))
            shutil.rmtree(folder)
    print_rows(rows)
    return finish(rows, args.json)


def case_rows(case: str, loads: dict[str, list[Load]]) -> Iterator[Row]:
    """Print both libraries' numbers, and yield the two rows with bounds: seconds and memory."""
    for library, found in loads.items():
        wall = sorted(load.wall for load in found)
        print(
            f"{case:<22} {library:<10} load {statistics.median(wall):6.2f} s ({wall[0]:.2f} to {wall[-1]:.2f}), "
            f"CPU {median(found, 'cpu'):5.2f} s, first touch {median(found, 'touch'):.2f} s, "
            f"imports {median(found, 'imported'):5.2f} s, "
            f"peak {median(found, 'peak') / 1e9:.2f} GB for {found[0].weights / 1e9:.2f} GB of weights",
            flush=True,
        )
    ours, theirs = (loads[library] for library in LIBRARIES)
    ratio = median(ours, "wall") / median(theirs, "wall")
    best = min(load.wall for load in ours) / min(load.wall for load in theirs)
    count = f"{len(ours)} loads each"
    yield Row(f"seconds, {case}", count, ratio, TIME_BOUND, "of diffusers'", f"medians; of the best loads {best:.2f}")
    yield Row(
        f"peak memory, {case}",
        count,
        peak_ratio(ours),
        MEMORY_BOUND,
        "of the weights",
        f"diffusers {peak_ratio(theirs):.2f}",
    )


def median(loads: Sequence[Load], field: str) -> float:
    """The median of one field over several loads."""
    return statistics.median(getattr(load, field) for load in loads)


def peak_ratio(loads: Sequence[Load]) -> float:
    """The largest peak resident set relative to the size of the weights."""
    return max(load.peak / load.weights for load in loads)


def import_row(repeats: int) -> Row:
    """Seconds of `import minidiff` after `import torch`, median over fresh processes."""
    times = [import_seconds() for _ in range(repeats)]
    alone, extra = (statistics.median(column) for column in zip(*times, strict=True))
    spread = f"{min(t for _, t in times):.2f} to {max(t for _, t in times):.2f}; import torch {alone:.2f}"
    return Row("import minidiff less import torch", f"{repeats} processes", extra, IMPORT_BOUND, "s", spread)


def import_seconds() -> tuple[float, float]:
    """(import torch, import minidiff after it) in a fresh process."""
    torch_seconds, extra = python("-c", IMPORT).split()
    return float(torch_seconds), float(extra)


def startup_row(repeats: int) -> Row:
    """`minidiff generate` with the bundled model, without sampling, relative to the imports that it requires."""
    times = [(float(python("-c", NAMES)), float(python("-c", STARTUP))) for _ in range(repeats)]
    names, ours = (statistics.median(column) for column in zip(*times, strict=True))
    note = f"{ours:.2f} s and {names:.2f} s"
    return Row(
        "start-up of minidiff generate", f"{repeats} processes", ours / names, STARTUP_BOUND, "of the imports", note
    )


def by_turns(folder: Path, dtype: str, tiny: Path, repeats: int) -> dict[str, list[Load]]:
    """Loads of `folder` in `dtype` by both, alternating. `tiny` is loaded first, to trigger late imports."""
    loads: dict[str, list[Load]] = {library: [] for library in LIBRARIES}
    for _ in range(repeats):
        for library in LIBRARIES:
            loads[library].append(load_once(library, folder, dtype, tiny))
    return loads


def load_once(library: str, folder: Path, dtype: str, tiny: Path) -> Load:
    """One load in a fresh process, after reading the folder's files into the page cache."""
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            while file.read(2**24):
                pass
    load = Load(**json.loads(python("-m", "bench.load_once", library, str(folder), dtype, str(tiny))))
    if load.dtype != dtype:
        raise ValueError(f"{library} loaded {load.dtype}; expected the requested {dtype}")
    return load


def python(*arguments: str) -> str:
    """Last line printed by a fresh interpreter in the repository's root. ValueError with its stderr if it fails."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"python {' '.join(arguments)} failed ({done.returncode}): {done.stderr.strip()[-2000:]}")
    return done.stdout.strip().splitlines()[-1]
