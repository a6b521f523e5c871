"""All benchmarks of speed and memory in sequence, each in its own process."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .load import ROOT
from .machine import machine, versions
from .networks import judged_dtype

IMAGE = ("--image", "64") if judged_dtype() == "bfloat16" else ()
"""Whole guided images: 6 minutes on two cores with matrix units, 25 without, in float32."""
PARTS: dict[str, tuple[str, ...]] = {
    "kernels": (),
    "throughput": ("--repeats", "3"),
    "guided": ("--repeats", "3", *IMAGE),
    "memory": ("--dtype", "bfloat16"),
    "scaling": ("--repeats", "3", "--dtype", "bfloat16"),
    "load": ("--repeats", "1"),
}
"""Benchmark -> its arguments."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `python -m bench all`."""
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="NAME", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--plots", metavar="FOLDER", help="folder for scaling's plots (PNG)")


def run(args: argparse.Namespace) -> int:
    """Run each and pass its output through. Returns 1 if any had a violated bound."""
    started, codes, found = time.perf_counter(), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in PARTS if args.only is None else args.only:
            path = Path(folder) / f"{name}.json"
            command = [sys.executable, "-m", "bench", name, *PARTS[name], "--json", str(path)]
            command += ["--plots", args.plots] if name == "scaling" and args.plots is not None else []
            before = time.perf_counter()
            codes[name] = subprocess.run(command, cwd=ROOT, check=False).returncode
            print(f"\n{name}: {time.perf_counter() - before:.0f} s, exit code {codes[name]}\n", flush=True)
            found[name] = json.loads(path.read_text()) if path.is_file() else None
    print(f"all: {(time.perf_counter() - started) / 60:.1f} minutes")
    if args.json is not None:
        text = json.dumps({"machine": machine(), "versions": versions(), "benches": found}, indent=1)
        Path(args.json).write_text(text + "\n", encoding="utf-8")
    return int(any(codes.values()))  # a killed process has a negative code
