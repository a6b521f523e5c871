"""minidiff batch --tar: pictures as webdataset shards, tar files of pairs KEY.png and KEY.json, instead of files.

A shard is written under another name and renamed, and then the files in it are removed: after kill -9, a picture is in
a file, in a shard, or in both, and `remove_packed` ends the last.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ..request_checks import MOST_IMAGES
from .manifest import COLUMNS, Row

_JSON = ("parameters", "report")
_PICTURE = re.compile(r"[0-9]{7,12}(-[0-9]{1,9})?\.png")


def packing(made: Iterable[list[Row]], folder: Path, stem: str, size: int) -> Iterator[list[Row]]:
    """The rows of each batch as they come; of every `size` pictures a shard is made, and fewer may be left."""
    waiting: list[Row] = []
    for rows in made:
        yield rows
        waiting += (row for row in rows if row.get("file") is not None)
        while len(waiting) >= size:
            pack(waiting[:size], folder, stem)
            waiting = waiting[size:]


def pack(rows: Sequence[Row], folder: Path, stem: str) -> None:
    """Make the next shard, STEM-000000.tar: pairs of each row's picture and the row as JSON, which replace its file."""
    path = next(path for path in _names(folder, stem) if not path.exists())
    unfinished = path.with_name(f".{path.name}.tmp")
    with unfinished.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            for row in rows:
                name = Path(row["file"])
                known: Row = {column: row.get(column) for column in COLUMNS if column not in ("file", "error")}
                known |= {column: None if known[column] is None else json.loads(known[column]) for column in _JSON}
                _add(tar, name.name, (folder / name).read_bytes())
                _add(tar, f"{name.stem}.json", json.dumps(known).encode())
        file.flush()
        os.fsync(file.fileno())  # the pictures are removed next
    os.replace(unfinished, path)
    for row in rows:
        (folder / row["file"]).unlink()


def waiting(rows: Iterable[Row], folder: Path) -> Iterator[Row]:
    """Those of rows whose pictures are in no shard."""
    return (row for row in rows if row.get("file") is not None and (folder / row["file"]).exists())


def shards(folder: Path, stem: str) -> Callable[[Row], str | None]:
    """A function that names the shard which holds a row's file."""
    keys, numbers = array("q"), array("i")
    for number, path in enumerate(_names(folder, stem)):
        if not path.exists():
            break
        for name in _members(path):
            line, _, image = name.removesuffix(".png").partition("-")
            keys.append(int(line) * MOST_IMAGES + int(image or 0))
            numbers.append(number)
    order = np.argsort(keys, kind="stable")
    ordered, held = np.array(keys, dtype=np.int64)[order], np.array(numbers)[order]

    def shard(row: Row) -> str | None:
        key = row["line"] * MOST_IMAGES + row["image"]
        i = int(np.searchsorted(ordered, key))
        there = row.get("file") is not None and i < len(ordered) and ordered[i] == key
        return f"{stem}-{held[i]:06d}.tar" if there else None

    return shard


def _members(path: Path) -> list[str]:
    """The names of pictures in a shard, not those that others gave. ValueError for a file that is none."""
    try:
        with tarfile.open(path) as tar:
            return [name for name in tar.getnames() if _PICTURE.fullmatch(name)]
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no shard of minidiff batch: {error}; move it away") from error


def remove_packed(folder: Path, stem: str) -> None:
    """Remove the files of pictures that are in a shard, which a kill left. ValueError for a file that is no shard."""
    for path in _names(folder, stem):
        if not path.exists():
            return
        for name in _members(path):
            (folder / name).unlink(missing_ok=True)


def _names(folder: Path, stem: str) -> Iterator[Path]:
    return (folder / f"{stem}-{number:06d}.tar" for number in range(10**9))


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # dated 1970: the same pictures make the same shard
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
