"""What a batch has made: a log that survives kill -9, and the manifest written from it.

Each process appends to a log of its own, JSON Lines, all rows of a finished batch in one write after its pictures. A
row cut off by a kill is no row, so at most that batch is made again, under the same names. Killing a process loses
nothing that it wrote; cutting the power may lose the last seconds.
"""

from __future__ import annotations

import json
import os
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..png.chunk import Plain
from ..request_checks import MOST_IMAGES
from .lines import import_parquet
from .plan import Job, digest_of

Row: TypeAlias = "dict[str, Any]"
COLUMNS = {
    "line": "int64",
    "image": "int32",
    "file": "string",
    "seed": "uint64",
    "prompt": "string",
    "parameters": "string",
    "report": "string",
    "flagged": "bool_",
    "error": "string",
}
"""The columns of rows, with pyarrow's types: parameters and report are JSON. A manifest has one more, "tar": the shard
of --tar that holds the file."""


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there wholly or not at all, replacing another."""
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_bytes(data)
    os.replace(unfinished, path)


def append(path: Path, rows: Sequence[Row]) -> None:
    """Add rows to a log, with the time, after cutting off what a kill left unfinished."""
    data = "".join(json.dumps(row | {"time": time.time()}) + "\n" for row in rows).encode()
    with path.open("ab+") as file:
        end = file.tell()
        if end:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(data)


def _read(log: Path) -> Iterator[tuple[int, Row]]:
    """Each whole row of a log, with the place where it begins."""
    place = 0
    with log.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield place, json.loads(line)
            place += len(line)


@dataclass(frozen=True, eq=False)
class Done:
    """The pictures and errors in the logs of a folder: the newest row of each, in the order of the file of requests."""

    logs: tuple[Path, ...]
    keys: NDArray[np.int64]
    digests: NDArray[np.uint64]
    where: NDArray[np.int64]  # [rows, 2]: the log, and the place in it
    made: NDArray[np.bool_]  # False for errors, which are tried again

    @classmethod
    def read(cls, folder: Path) -> Done:
        """ValueError for a log that is none."""
        logs = tuple(sorted(folder.glob("rows-*.jsonl")))
        keys, digests, where, made, times = array("q"), array("Q"), array("q"), array("b"), array("d")
        for i, log in enumerate(logs):
            newest = 0.0  # the order in a log is sure, whatever its clock says
            try:
                for place, row in _read(log):
                    keys.append(int(row["line"]) * MOST_IMAGES + int(row["image"]))
                    digests.append(int(row["digest"], 16))
                    where.extend((i, place))
                    made.append(row.get("error") is None)
                    times.append(newest := max(newest, float(row.get("time", 0.0))))
            except (ValueError, KeyError, TypeError, OverflowError) as error:
                raise ValueError(f"{log} is not a log of minidiff batch: {error}; move it away") from error
        own, order = np.array(keys, dtype=np.int64), np.argsort(-np.array(times)[::-1], kind="stable")
        latest = len(own) - 1 - order
        unique, first = np.unique(own[latest], return_index=True)
        last = latest[first]
        places = np.array(where, dtype=np.int64).reshape(-1, 2)
        return cls(
            logs, unique, np.array(digests, dtype=np.uint64)[last], places[last], np.array(made, dtype=bool)[last]
        )

    def __contains__(self, job: Job) -> bool:
        i = int(np.searchsorted(self.keys, job.key))
        there = i < len(self.keys) and self.keys[i] == job.key and self.digests[i] == job.digest
        return bool(there and self.made[i])

    def rows(self, digests: NDArray[np.uint64]) -> Iterator[Row]:
        """The rows of lines, in their order, not those of what a line was before. digests: see line_digests()."""
        lines = self.keys // MOST_IMAGES
        asked = (lines < len(digests)) & (digests.take(lines, mode="clip") == self.digests)
        where = self.where[asked]
        parts = (where[start : start + 4096].tolist() for start in range(0, len(where), 4096))  # a list takes much more
        files = [log.open("rb") for log in self.logs]
        try:
            for log, place in chain.from_iterable(parts):
                files[log].seek(place)
                row: Row = json.loads(files[log].readline())
                yield row
        finally:
            for file in files:
                file.close()


def line_digests(lines: Iterable[tuple[int, str]]) -> NDArray[np.uint64]:
    """The digest of each line's text at its number; 0 where there is no line."""
    found = array("Q", [0])
    for number, text in lines:
        found.extend([0] * (number - len(found)))
        found.append(digest_of(text))
    return np.array(found, dtype=np.uint64)


def write_manifest(rows: Iterable[Row], path: Path, tar: Callable[[Row], str | None]) -> None:
    """Rows as Parquet, whole or not at all. tar: the name of the shard that holds a row's file."""
    parquet = import_parquet("to write the manifest")
    import pyarrow

    schema = pyarrow.schema([(name, getattr(pyarrow, kind)()) for name, kind in {**COLUMNS, "tar": "string"}.items()])
    unfinished = path.with_name(f".{path.name}.tmp")
    with parquet.ParquetWriter(unfinished, schema) as writer:
        some: list[Row] = []
        for row in rows:
            some.append(row | {"tar": tar(row)})
            if len(some) == 1024:
                writer.write_table(pyarrow.Table.from_pylist(some, schema))
                some = []
        writer.write_table(pyarrow.Table.from_pylist(some, schema))
    os.replace(unfinished, path)


def begin(own: Path, asked: Mapping[str, Plain], usual: Mapping[str, Plain]) -> Mapping[str, Plain]:
    """Note what all of a folder's pictures have in common: what was asked, or else, where it is begun, what is usual.

    own: the log that this process holds there. Returns what is noted. ValueError where pictures were made, or another
    process is about to make some, with other flags.
    """
    folder, unfinished = own.parent, own.with_name(f".batch.json.{own.stem}.tmp")
    unfinished.unlink(missing_ok=True)  # a kill left it
    logs = list(folder.glob("rows-*.jsonl"))
    path, made = folder / "batch.json", any(log.stat().st_size for log in logs)
    if path.exists():
        try:
            there = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not minidiff batch's: {error}; expected another folder") from error
        kept = {name: there.get(name) for name in usual}
        wanted = {**asked, **{name: asked[name] if asked[name] is not None else kept[name] for name in usual}}
        different = [f"{name} {_said(then)} then, {_said(now)} now" for name, then, now in _changes(there, wanted)]
        if not different:
            return kept | wanted
        if made or any(_held(log) for log in logs if log != own):
            listed = "; ".join(different)
            raise ValueError(f"{folder} was begun with other flags: {listed}; expected the same, or another folder")
    elif made:
        raise ValueError(f"{path} is missing beside its logs; expected the folder of a batch, or another folder")
    chosen = {**asked, **{name: value for name, value in usual.items() if asked[name] is None}}
    unfinished.write_bytes(json.dumps(chosen, indent=1, sort_keys=True).encode())
    try:
        if path.exists():
            os.replace(unfinished, path)
        else:
            _linked(unfinished, path)
    except FileExistsError:  # another process was faster
        return begin(own, asked, usual)
    return chosen


def _linked(unfinished: Path, path: Path) -> None:
    """Rename a file. FileExistsError where the new name is taken."""
    try:
        os.link(unfinished, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        os.replace(unfinished, path)
    else:
        unfinished.unlink()


_WORDS = {"loras": "--lora", "words": "--word", "adapters": "--ip-adapter", "tar_of": "--tar of a file with the digest"}


def _changes(then: Mapping[str, Plain], now: Mapping[str, Plain]) -> Iterator[tuple[str, Plain, Plain]]:
    """The flags that differ, each with its two values."""

    def flat(settings: Mapping[str, Plain]) -> dict[str, Plain]:
        inner = [dict(settings.get(group) or {}) for group in ("fields", "loading")]  # type: ignore[arg-type]
        others = {name: value for name, value in settings.items() if name not in ("fields", "loading")}
        together = {name: value for part in (*inner, others) for name, value in part.items()}
        return {name: value for name, value in together.items() if not (value is None or value is False or value == [])}

    before, after = flat(then), flat(now)
    for name in dict.fromkeys([*before, *after]):
        if before.get(name) != after.get(name):
            yield _WORDS.get(name, f"--{name.replace('_', '-')}"), before.get(name), after.get(name)


def _said(value: Plain) -> str:
    if isinstance(value, list):
        return ",".join(_said(one) for one in value if one is not None)
    if isinstance(value, dict) and "object" in value:
        return "as an older minidiff noted it"
    return "not given" if value is None else str(value)


@contextmanager
def only(log: Path) -> Iterator[None]:
    """Hold a log, in a folder that is made. ValueError where another process does: each would cut what the other
    appends.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        if not _locked(file):
            raise ValueError(
                f"another minidiff batch is at work in {log.parent}; expected another folder, or --shard 1/2 here and "
                "2/2 there from the start"
            )
        yield


def _held(log: Path) -> bool:
    with log.open("ab") as file:
        return not _locked(file)


def _locked(file: IO[bytes]) -> bool:
    """Lock a file until it is closed. False where another process has; True, too, on a system without such locks."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        pass
    return True
