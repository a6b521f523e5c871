"""minidiff batch: a file of requests, on this machine or on Ray."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..vocabulary import BUNDLED
from .lines import as_text, import_parquet, read_lines
from .manifest import COLUMNS, Done, Row, append, begin, line_digests, only, write_manifest, write_whole
from .plan import Job, batches, jobs, together

if TYPE_CHECKING:
    from ..model import Model
    from ..request import Request
    from ..result import Result

BATCH = 32
"""The most images per call where nothing else is said: more gain little (bench/RESULTS.md)."""
_ENOUGH = 1 << 26  # bytes of the tensor below: larger batches gain nothing, and a kill loses more
_STEP = 30  # memory of a step for one image, in tensors [2,h,w,channels of the first block]: measured 25 (bench memory)


class Draw:
    """Makes the pictures of rows of requests: a callable class for the map_batches of ray.data, which the command uses.

    A row holds the fields of a Request, or "request" with all of them as JSON; "line" (a whole number) names its
    pictures and, where it has no seed, gives it one. It returns a row per picture with the columns of a manifest
    (minidiff.cli.manifest.COLUMNS); an invalid row becomes one with its error.

    out: the folder for pictures, which are then not made again by another call, after a kill either; None: each row
    holds its PNG, in the column "png". fields: of a Request, which replace the rows' own. loading: the arguments of
    minidiff.load. adapters: the arguments of minidiff.with_image_prompt, for each. batch_size: images per call of
    minidiff.generate; default: at most 32, as many as gain time and there is memory for, and guided ones alone.
    threads: that torch computes with on a CPU; None: as many as it has. The number is the process's: call one Draw at a
    time in it. log: the name of this process in the folder.

    ValueError, when called, where the model of `fields` and `loading` cannot be loaded: no row is to blame.

    Each picture equals generate's within 1/255 in float32, whatever its batch. Guided ones only where batch_size is 1
    or None: matrix kernels round in another order for another batch, by 1e-7, and where a loss does not come down below
    its threshold each step of guidance multiplies such a difference by up to ten (in 4 of 32 small pictures it was seen
    at the end). Another kind of processor and another number of threads round otherwise, too: guided pictures are
    equal, whatever the number of workers, on one kind of processor with the same `threads`.
    """

    def __init__(
        self,
        out: str | Path | None = None,
        *,
        fields: Mapping[str, object] | None = None,
        loading: Mapping[str, object] | None = None,
        adapters: Sequence[tuple[str, str]] = (),
        batch_size: int | None = None,
        threads: int | None = None,
        log: str | None = None,
    ) -> None:
        self._out = None if out is None else Path(out)
        self._fields, self._loading, self._adapters = dict(fields or {}), dict(loading or {}), adapters
        self._size, self._threads = batch_size, threads
        self._log = log or f"{socket.gethostname()}-{os.getpid()}"
        self._loaded: tuple[str, Model] | None = None
        self._done = None if self._out is None else Done.read(self._out)

    def __call__(self, batch: Mapping[str, Sequence[object]]) -> dict[str, list[object]]:
        """The manifest's rows for a batch of rows, column by column."""
        columns = {name: list(values) for name, values in batch.items()}
        count = len(next(iter(columns.values()), []))
        lines = [self._line({name: column[i] for name, column in columns.items()}) for i in range(count)]
        place = {line: i for i, (line, _) in enumerate(lines)}
        rows = [row for some in self.rows(lines) for row in some]
        rows.sort(key=lambda row: (place[row["line"]], row["image"]))
        names = (*COLUMNS, "png") if self._out is None else COLUMNS
        return {name: [row.get(name) for row in rows] for name in names}

    @staticmethod
    def _line(row: dict[str, object]) -> tuple[int, str]:
        plain = {name: getattr(value, "tolist", lambda value=value: value)() for name, value in row.items()}
        number, text = plain.pop("line", None), plain.pop("request", None)
        text = text if isinstance(text, str) else as_text(plain)
        return int(str(number)) if number is not None else _number(text), text

    def rows(self, lines: Iterable[tuple[int, str]]) -> Iterator[list[Row]]:
        """The rows of each batch, after its pictures are written. lines: numbers and JSON texts; done ones are
        skipped."""
        planned = (job for line, text in lines for job in jobs(line, text, self._fields))
        left = planned if self._done is None else (job for job in planned if job not in self._done)
        for batch in batches(left, self._size or BATCH):
            for some in self._made(batch):
                if self._out is not None:
                    for row in some:
                        if "png" in row:
                            write_whole(self._out / row["file"], row.pop("png"))
                    append(self._out / f"rows-{self._log}.jsonl", some)
                yield some

    def _made(self, batch: list[Job]) -> Iterator[list[Row]]:
        """The rows of a batch; where it fails, or needs too much memory, those of its halves."""
        import torch

        if batch[0].request is None:
            yield [_row(job, error=job.error) for job in batch]
            return
        try:
            model = self._model(batch[0].request)
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            if str(batch[0].request.model) == str(self._fields.get("model", BUNDLED)):
                raise
            yield [_row(job, error=str(error)) for job in batch]
            return
        try:
            size = self._size or _fitting(batch[0].request, model)
            if len(batch) > size:
                half = size
            else:
                with _computing(self._threads):
                    rows = _rows(batch, _generate(batch, model))
                yield rows
                return
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            if len(batch) == 1:
                yield [_row(batch[0], error=str(error))]
                return
            half = len(batch) // 2
        yield from self._made(batch[:half])
        yield from self._made(batch[half:])

    def _model(self, request: Request) -> Model:
        """The request's model, kept until another is asked for."""
        from ..weights.image_prompt import with_image_prompt
        from ..weights.load import load

        source = str(request.model)
        if self._loaded is None or self._loaded[0] != source:
            self._loaded = None  # frees the memory of the model before
            model = load(source, **self._loading)  # type: ignore[arg-type]
            for file, encoder in self._adapters:
                model = with_image_prompt(model, file, encoder)
            self._loaded = source, model
        return self._loaded[1]


@contextmanager
def _computing(threads: int | None) -> Iterator[None]:
    import torch

    there = torch.get_num_threads()
    torch.set_num_threads(threads or there)
    try:
        yield
    finally:
        torch.set_num_threads(there)


def _generate(batch: list[Job], model: Model) -> Result:
    from ..run import generate
    from .pictures import blackened

    result = generate(together(batch).filled({"model": model}))
    return blackened(result) if any(result.flagged or ()) else result


def _rows(batch: list[Job], result: Result) -> list[Row]:
    found = []
    for job, one in zip(batch, result, strict=True):
        facts = {
            "file": f"{job.name}.png",
            "seed": one.seeds[0],
            "prompt": one.parameters[0].get("prompt"),
            "parameters": json.dumps(one.parameters[0]),
            "report": None if one.reports is None else json.dumps(one.plain()["images"][0]["report"]),  # type: ignore
            "flagged": None if one.flagged is None else one.flagged[0],
            "png": one.png_bytes(),
        }
        found.append(_row(job, **facts))
    return found


def _row(job: Job, **facts: object) -> Row:
    return {"line": job.line, "image": job.image, "digest": f"{job.digest:016x}", **facts}


def _fitting(request: Request, model: Model) -> int:
    """How many images like this one are enough, and fit into half of the memory that is free: from 1."""
    import torch

    if request.guided:
        return 1  # see Draw
    width, height = (edge or model.unet.config.sample_size * model.vae.config.factor for edge in _size(request))
    tensor = 2 * width * height // model.vae.config.factor**2 * model.unet.config.block_out_channels[0]
    tensor *= model.dtype.itemsize
    enough = max(1, _ENOUGH // tensor)
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
    elif hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return enough
    return max(1, min(enough, free // 2 // (_STEP * tensor)))


def _size(request: Request) -> tuple[int | None, int | None]:
    start = getattr(request.image, "size", (None, None))
    return request.width or start[0], request.height or start[1]


def _number(text: str) -> int:
    """A number for a row without one, of its text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=5).digest(), "little")


# ---- the command


def batch(args: argparse.Namespace) -> int:
    """Make the pictures of a file of requests, and its manifest. Returns the exit code."""
    import torch

    from ..png.chunk import plain
    from ..request import Request
    from ..speed.accelerate import keep_memory
    from .main import LOADING, check_adapters, given_fields, lora_values, note

    keep_memory()
    source, out, shard = Path(args.requests), Path(args.out), args.shard or (1, 1)
    import_parquet("to write the manifest")
    check_adapters(args)
    fields, adapters = given_fields(args), [(file, args.image_encoder) for file in args.ip_adapter or ()]
    Request("any", **fields)  # type: ignore[arg-type]  # a wrong flag is no line's error
    loading = {name: getattr(args, name) for name in LOADING}
    settings = {"fields": plain(fields), "loading": plain(loading), "adapters": plain(adapters)}
    settings |= {"threads": args.threads} | ({} if args.tar is None else {"tar_of": _digest(source)})
    digests = line_digests((n, text) for n, text in read_lines(source) if n % shard[1] == shard[0] % shard[1])
    if not digests.any():
        note(f"there is no line to make in {source}")
    cluster, threads = None, torch.get_num_threads()
    if args.ray is not None:
        from .cluster import connect

        cluster = connect(args.ray, args.workers)
        threads = cluster.threads
    options: dict[str, Any] = {
        "fields": fields,
        "loading": loading | {"loras": lora_values(args.loras)},
        "adapters": adapters,
    }
    name = f"{shard[0]}-of-{shard[1]}"
    log = out / f"rows-{name}.jsonl"
    with only(log):
        options |= {"batch_size": args.batch_size, "threads": begin(log, settings, {"threads": threads})["threads"]}
        lines = ((number, text) for number, text in read_lines(source) if number % shard[1] == shard[0] % shard[1])
        if cluster is None:
            made = Draw(out, log=name, **options).rows(lines)
        else:
            made = cluster.draw(out / f"requests-{name}.parquet", lines, options)
        try:
            manifest, errors = _written(made, out, shard, digests, args.tar)
        except OSError as error:
            raise OSError(f"{error}; {out} keeps what is made, and the same command goes on from there") from error
    if errors:
        note(
            f"{errors} of {np.count_nonzero(digests)} lines have an error, in the column error of {manifest}; they are "
            "tried again next time"
        )
    print(manifest)
    return 0


def _written(
    made: Iterator[list[Row]], out: Path, shard: tuple[int, int], digests: NDArray[np.uint64], tar: int | None
) -> tuple[Path, int]:
    """Make the pictures of lines with these digests. Returns the manifest, and how many lines have an error."""
    from tqdm import tqdm

    from .tars import pack, packing, remove_packed, shards, waiting

    part = "" if shard[1] == 1 else f"-{shard[0]}-of-{shard[1]}"
    stem = f"pictures{part}"
    if tar is not None:
        remove_packed(out, stem)
    done = sum(row["image"] == 0 and row.get("error") is None for row in Done.read(out).rows(digests))
    with tqdm(total=np.count_nonzero(digests), initial=done, unit="line", disable=None) as bar:
        for rows in made if tar is None else packing(made, out, stem, tar):
            bar.update(sum(row["image"] == 0 for row in rows))
    known = Done.read(out)
    left = waiting(known.rows(digests), out) if tar is not None else iter(())
    while some := list(islice(left, tar)):
        pack(some, out, stem)
    manifest = out / f"manifest{part}.parquet"
    write_manifest(known.rows(digests), manifest, (lambda row: None) if tar is None else shards(out, stem))
    return manifest, len({row["line"] for row in known.rows(digests) if row.get("error") is not None})


def _digest(path: Path) -> str:
    """Of a file of requests: a picture in a shard cannot be made again for a changed line."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:16]
