"""The lines of a file of requests, each as JSON text: from JSON Lines, a JSON list, CSV or Parquet."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..checks import shown

_TEXTS = ("prompt", "negative_prompt")  # always as they are: a prompt may be "2024" or "[a|b]"


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, JSON text) of each line, counted from 1 and read as they are asked for; blank ones are skipped.

    CSV has a header with names of fields; an empty cell is not given, and cells other than texts may hold JSON. So may
    strings of Parquet. ValueError for another ending, and for a file that cannot be read.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path} ends in {path.suffix!r}; expected one of {', '.join(_READERS)}")
    try:
        with path.open("rb") as file:
            if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise ValueError("its text is UTF-16; expected UTF-8: save it so")
        yield from enumerate_texts(reader(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read the requests in {path}: {error}; expected UTF-8: save it so") from error
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"cannot read the requests in {path}: {error}") from error


def enumerate_texts(texts: Iterable[str]) -> Iterator[tuple[int, str]]:
    """The texts that are not blank, with their numbers from 1."""
    return ((number, text) for number, text in enumerate(texts, start=1) if text.strip())


def as_text(values: Mapping[str, object]) -> str:
    """A row of a table as JSON: without what is empty, and with JSON in its cells read."""
    return json.dumps({name: _cell(name, value) for name, value in values.items() if value is not None and value != ""})


def _cell(name: str, value: object) -> object:
    if isinstance(value, list) and value and all(isinstance(one, tuple) for one in value):
        return dict(value)  # a map of Parquet
    if isinstance(value, dict):
        return {key: one for key, one in value.items() if one is not None}  # a struct has every row's fields
    if not isinstance(value, str) or name in _TEXTS:
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _jsonl(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", errors="replace") as file:  # a byte that is no UTF-8 spoils its line alone
        yield from file


def _json(path: Path) -> Iterator[str]:
    found = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(found, list):
        raise ValueError("expected a list of requests")
    return map(json.dumps, found)


def _csv(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restkey="more cells than the header has")
        names = reader.fieldnames or ()
        twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
        if twice:
            raise ValueError(f"its header holds {shown(twice[0])} more than once")
        yield from map(as_text, reader)


def _parquet(path: Path) -> Iterator[str]:
    parquet = import_parquet("to read Parquet")
    for some in parquet.ParquetFile(path).iter_batches(batch_size=1024):
        yield from map(as_text, some.to_pylist())


_READERS: Mapping[str, Callable[[Path], Iterator[str]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def import_parquet(why: str) -> Any:
    """pyarrow.parquet. ValueError where it is not installed."""
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ValueError(f"pyarrow is needed {why}; pip install 'minidiff[batch]'") from error
    return parquet
