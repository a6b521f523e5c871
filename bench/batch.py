"""minidiff batch: planning a million lines, and pictures a second against a loop over generate."""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from minidiff.cli.batch import Draw
from minidiff.cli.lines import read_lines
from minidiff.cli.plan import batches, jobs

from .load_once import resident
from .machine import print_header
from .table import Row, finish, print_head, print_row
from .timing import by_turns

PROMPTS = ("a red circle", "a blue square and a green star", "a yellow ring")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this bench."""
    parser.add_argument("--lines", type=int, default=1_000_000, help="to plan (default: 1,000,000)")
    parser.add_argument("--pictures", type=int, default=96, help="to make (default: 96)")
    parser.add_argument("--repeats", type=int, default=3)


def run(args: argparse.Namespace) -> int:
    """Plan first, so that the peak of memory is that of planning."""
    print_header("batch", {"lines": str(args.lines), "pictures": str(args.pictures), "size": "64x64, 4 steps"})
    print_head()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for row in (*_planned(Path(folder), args.lines), *_drawn(Path(folder), args.pictures, args.repeats)):
            print_row(row)
            rows.append(row)
    return finish(rows, args.json)


def _planned(folder: Path, count: int) -> Iterator[Row]:
    file = folder / "requests.jsonl"
    _write(file, count, 20)

    started = time.process_time()  # one thread: what else the machine does shall not count
    planned = batches((job for line, text in read_lines(file) for job in jobs(line, text, {})), 8)
    assert sum(map(len, planned)) == count
    took = time.process_time() - started
    shape = f"{count} lines"
    yield Row("planning a thousand lines", shape, 1e3 * took / count, 0.2, "s", f"{count / took:,.0f} lines a second")
    yield Row("peak of the process's memory", shape, resident("VmHWM") / 1e6, 300, "MB")


def _drawn(folder: Path, count: int, repeats: int) -> Iterator[Row]:
    from minidiff import generate, load

    model = load()
    file = folder / "requests.jsonl"
    _write(file, count, 4)
    lines = list(read_lines(file))
    draws = iter(range(1000))

    def runner() -> None:
        draw = Draw(folder / str(next(draws)))
        draw._loaded = ("minidiff/shapes", model)
        draw._out.mkdir()
        assert sum(map(len, draw.rows(lines))) == count

    def loop(size: int) -> None:
        out = folder / str(next(draws))
        asked = [json.loads(text) for _, text in lines]
        for start in range(0, count, size):
            some = asked[start : start + size]
            prompts, seeds = ([one[name] for one in some] for name in ("prompt", "seed"))
            generate(prompts, seed=seeds, width=64, height=64, steps=4, model=model, progress=False).save(out)

    loops = {f"loop of {size}": (lambda size=size: loop(size)) for size in (4, 8, 16, 32)}
    found = by_turns({"runner": runner, **loops}, repeats)
    rates = {name: count / timing.median for name, timing in found.items()}
    best = max(loops, key=lambda name: rates[name])
    note = ", ".join(f"{name} {rate:.2f}/s" for name, rate in rates.items())
    yield Row(f"best {best} / runner", "64x64, 4 steps", rates[best] / rates["runner"], 1 / 0.9, "rate", note)


def _write(file: Path, count: int, steps: int) -> None:
    with file.open("w") as lines:
        for i in range(count):
            prompt = PROMPTS[i % len(PROMPTS)]
            lines.write(json.dumps({"prompt": prompt, "seed": i, "width": 64, "height": 64, "steps": steps}) + "\n")
