"""What a batch has made: a log that survives kill -9, and the manifest written from it.

Each process appends to a log of its own, JSON Lines, all rows of a finished batch in one write after its pictures. A
row cut off by a kill is no row, so at most that batch is made again, under the same names. Killing a process loses
nothing that it wrote; cutting the power may lose the last seconds.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..request_checks import MOST_IMAGES
from .lines import import_parquet
from .plan import Job

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
"""The columns of a manifest, with pyarrow's types: parameters and report are JSON."""


def write_whole(path: Path, data: bytes, mark: str = "") -> None:
    """Write a file so that it is there wholly or not at all, replacing another. mark: for several writers at once."""
    unfinished = path.with_name(f".{path.name}{mark}.tmp")
    unfinished.write_bytes(data)
    os.replace(unfinished, path)


def append(path: Path, rows: Sequence[Row]) -> None:
    """Add rows to a log, after cutting off what a kill left unfinished."""
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
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
    """The pictures and errors in the logs of a folder: the last row of each, in the order of the file of requests."""

    logs: tuple[Path, ...]
    keys: NDArray[np.int64]
    digests: NDArray[np.uint64]
    where: NDArray[np.int64]  # [rows, 2]: the log, and the place in it

    @classmethod
    def read(cls, folder: Path) -> Done:
        """ValueError for a log that is none."""
        logs = tuple(sorted(folder.glob("rows-*.jsonl")))
        keys, digests, where = array("q"), array("Q"), array("q")
        for i, log in enumerate(logs):
            try:
                for place, row in _read(log):
                    keys.append(int(row["line"]) * MOST_IMAGES + int(row["image"]))
                    digests.append(int(row["digest"], 16))
                    where.extend((i, place))
            except (ValueError, KeyError, TypeError, OverflowError) as error:
                raise ValueError(f"{log} is not a log of minidiff batch: {error}; move it away") from error
        own = np.array(keys, dtype=np.int64)
        unique, last = np.unique(own[::-1], return_index=True)
        last = len(own) - 1 - last
        return cls(
            logs, unique, np.array(digests, dtype=np.uint64)[last], np.array(where, dtype=np.int64).reshape(-1, 2)[last]
        )

    def __contains__(self, job: Job) -> bool:
        i = int(np.searchsorted(self.keys, job.key))
        return i < len(self.keys) and self.keys[i] == job.key and self.digests[i] == job.digest

    def rows(self, shard: tuple[int, int]) -> Iterator[Row]:
        """The rows of a shard's lines, in the order of the lines."""
        mine = (self.keys // MOST_IMAGES) % shard[1] == shard[0] % shard[1]
        files = [log.open("rb") for log in self.logs]
        try:
            for log, place in self.where[mine].tolist():
                files[log].seek(place)
                row: Row = json.loads(files[log].readline())
                yield row
        finally:
            for file in files:
                file.close()


def write_manifest(done: Done, path: Path, shard: tuple[int, int]) -> None:
    """The rows of a shard as Parquet, whole or not at all."""
    parquet = import_parquet("to write the manifest")
    import pyarrow

    schema = pyarrow.schema([(name, getattr(pyarrow, kind)()) for name, kind in COLUMNS.items()])
    unfinished = path.with_name(f".{path.name}.tmp")
    with parquet.ParquetWriter(unfinished, schema) as writer:
        some: list[Row] = []
        for row in done.rows(shard):
            some.append(row)
            if len(some) == 1024:
                writer.write_table(pyarrow.Table.from_pylist(some, schema))
                some = []
        writer.write_table(pyarrow.Table.from_pylist(some, schema))
    os.replace(unfinished, path)


def begin(folder: Path, settings: Mapping[str, object]) -> None:
    """Make the folder, and note what all of its pictures have in common. ValueError where it was begun otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    path, text = folder / "batch.json", json.dumps(settings, indent=1, sort_keys=True)
    if path.exists():
        there = path.read_text(encoding="utf-8")
        if there != text:
            raise ValueError(
                f"{folder} was begun with other flags, {' '.join(there.split())[:300]}; expected the same ones, or "
                "another folder"
            )
    elif any(folder.glob("rows-*.jsonl")):
        raise ValueError(f"{path} is missing beside its logs; expected the folder of a batch, or another folder")
    else:
        write_whole(path, text.encode(), f".{os.getpid()}")
