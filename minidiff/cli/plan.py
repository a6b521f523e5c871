"""Lines of requests as batches: pictures of the same kind, whatever their texts, seeds and places, are one call."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..request import Request
from ..request_checks import MOST_IMAGES
from ..resolve import counted_seeds
from ..vocabulary import modernised

WINDOW = 2048
"""Pictures that are planned at a time: memory does not grow with the file."""
_MOST_PIXELS = 1 << 26  # of pictures to start from, in one window
# What each image of a call has of its own; images of one batch agree in the rest.
_LISTED = ("prompt", "negative_prompt", "seed", "boxes", "regions", "relations", "image", "mask")
OWN = (*_LISTED, "images_per_prompt", "vary")
_FIXED: Mapping[str, object] = {"output": "pil", "progress": False}


@dataclass(frozen=True, eq=False)
class Job:
    """One picture: image number `image` of a line. request: which makes it alone, with its seed; or the error.

    kind: equal for those that can be one batch. digest: of the line's text.
    """

    line: int
    image: int
    digest: int
    kind: str = ""
    request: Request | None = None
    error: str | None = None

    @property
    def key(self) -> int:
        """A number of this picture, in the order of the file."""
        return self.line * MOST_IMAGES + self.image

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return f"{self.line:07d}" if self.request is None or not self.image else f"{self.line:07d}-{self.image}"


def jobs(line: int, text: str, changes: Mapping[str, object]) -> list[Job]:
    """The pictures of a line, or its error. changes: fields that replace the line's own.

    A line without a seed gets one of its number, so that any worker, and a restart, makes the same picture.
    """
    digest = digest_of(text)
    if "\ufffd" in text:  # as read_lines() shows bytes that are none
        return [Job(line, 0, digest, error="the line is not UTF-8; expected UTF-8: save the file so")]
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        return [Job(line, 0, digest, error=f"the line is no JSON: {error}")]
    try:
        if isinstance(values, dict):
            values = {**modernised(values), **changes, **_FIXED}
        request = Request.from_plain(values)
    except (ValueError, OSError, RecursionError) as error:
        return [Job(line, 0, digest, error=str(error))]
    if request.seed is None:
        first = int.from_bytes(hashlib.blake2b(str(line).encode(), digest_size=4).digest(), "little")
        request = request.filled({"seed": first})
    request = request.filled(counted_seeds(request))
    alone = [request.alone(i) for i in range(request.images)]
    return [Job(line, i, digest, _kind(values, one), one) for i, one in enumerate(alone)]


def digest_of(text: str) -> int:
    """Of a line: another for another text."""
    return int.from_bytes(hashlib.blake2b(text.strip().encode(errors="replace"), digest_size=8).digest(), "little")


def _kind(values: Mapping[str, object], request: Request) -> str:
    shared = {name: value for name, value in values.items() if name not in OWN and value is not None}
    size = getattr(request.image, "size", None) if None in (request.width, request.height) else None
    there = [bool(getattr(request, name)) for name in ("boxes", "regions", "relations", "image", "mask")]
    varied = None if request.vary is None else request.vary[1]
    return json.dumps([str(request.model), there, size, varied, shared], sort_keys=True)


def batches(jobs: Iterable[Job], size: int) -> Iterator[list[Job]]:
    """The jobs in batches of at most `size` of one kind; within a window, those of one model follow each other."""
    for window in _windows(jobs):
        kinds: dict[str, list[Job]] = {}
        for job in window:
            kinds.setdefault(job.kind, []).append(job)
        for kind in sorted(kinds):
            yield from (kinds[kind][start : start + size] for start in range(0, len(kinds[kind]), size))


def _windows(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    window: list[Job] = []
    pixels = 0
    for job in jobs:
        window.append(job)
        for picture in () if job.request is None else (job.request.image, job.request.mask):
            width, height = getattr(picture, "size", (0, 0))
            pixels += width * height
        if len(window) >= WINDOW or pixels > _MOST_PIXELS:
            yield window
            window, pixels = [], 0
    yield window


def together(batch: list[Job]) -> Request:
    """One request for the jobs of a batch: the inverse of Request.alone."""
    each = [job.request for job in batch if job.request is not None]
    own: dict[str, object] = {}
    for name in _LISTED:
        values = tuple(getattr(one, name) for one in each)
        if name == "negative_prompt":
            values = tuple(value or "" for value in values) if any(values) else (None,)
        own[name] = None if all(value is None for value in values) else values
    varied = [one.vary for one in each if one.vary is not None]
    own["vary"] = (tuple(seed for seed, _ in varied), varied[0][1]) if varied else None
    return each[0].filled(own)
