"""Rows of a benchmark with bounds: a value, its upper bound, and whether it holds."""

import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from .machine import machine, versions
from .timing import Timing

RELATIVE = "max|diff| / max|ref|"
LEVELS = "1/255"


@dataclass(frozen=True)
class Row:
    """`value` in `unit` must not exceed `bound`. `shape`: the input; `note`: further information."""

    part: str
    shape: str
    value: float
    bound: float
    unit: str = RELATIVE
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the bound holds; False for NaN."""
        return self.value <= self.bound


def print_row(row: Row) -> None:
    """Print one row, unbuffered."""
    verdict = "ok" if row.ok else "OUT"
    value = f"{row.value:.2e}" if row.bound < 0.01 else f"{row.value:.3g}"
    note = f"  ({row.note})" if row.note else ""
    print(f"{row.part:<38} {row.shape:<24} {value:>9} {row.bound:>8.3g}  {verdict:<3}  {row.unit}{note}", flush=True)


def print_head() -> None:
    """Print the table header."""
    print(f"{'part':<38} {'shape':<24} {'value':>9} {'bound':>8}  {'':<3}  unit")


def print_rows(rows: Iterable[Row]) -> None:
    """Print a whole table, after an empty line."""
    print()
    print_head()
    for row in rows:
        print_row(row)


def finish(rows: Iterable[Row], path: str | None, timings: Mapping[str, Mapping[str, Timing]] | None = None) -> int:
    """Print the verdict, write rows and timings to `path` as JSON, and return the exit code: 1 if a bound is violated
    or there are no rows.
    """
    rows = list(rows)
    wrong = [row for row in rows if not row.ok]
    print(f"\n{len(rows) - len(wrong)} of {len(rows)} rows within their bounds" + (", OUT:" if wrong else ""))
    for row in wrong:
        print_row(row)
    if path is not None:
        write(rows, path, timings)
        print(f"wrote {path}")
    return 1 if wrong or not rows else 0


def write(rows: Iterable[Row], path: str, timings: Mapping[str, Mapping[str, Timing]] | None = None) -> None:
    """Write rows, timings, machine and versions as JSON, which has no NaN or infinity: such values become null."""
    found = {"machine": machine(), "versions": versions(), "arguments": sys.argv[1:]}
    values = [{**asdict(row), "value": _finite(row.value), "bound": _finite(row.bound), "ok": row.ok} for row in rows]
    seconds = {table: {name: asdict(one) for name, one in some.items()} for table, some in (timings or {}).items()}
    Path(path).write_text(json.dumps({**found, "rows": values, "timings": seconds}, indent=1) + "\n", encoding="utf-8")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
