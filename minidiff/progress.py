"""A progress bar over the steps of a run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TypeVar

Step = TypeVar("Step")


def with_progress(run: Iterator[Step], shown: bool | None) -> Iterator[Step]:
    """The run with a bar. shown: None shows it in a notebook, and where stderr is a terminal."""
    if shown is None:
        shown = "ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty())  # None under pythonw
    if not shown:
        return run
    from tqdm.auto import tqdm

    bar: Iterator[Step] = tqdm(run, unit="step")
    return bar
