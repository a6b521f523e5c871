"""What the page does: the one model in memory, runs of it that can be watched and stopped, and what is shown of them.

Knows no gradio. The page makes one run at a time.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ... import draw
from ...guidance.labels import named
from ...guidance.layout import PlacedObject, plain_boxes, read_objects
from ...model import Model
from ...request import Request
from ...result import Result
from ...run import sample_steps
from ...vocabulary import BUNDLED
from ...weights.image_prompt import with_image_prompt
from ...weights.load import load
from ...weights.lora import LoRA
from ..pictures import blackened
from ..take import Taken
from ..values import LoraFlag
from .copied import command, python
from .form import Values, phrases, words
from .preview import fit_preview

_TRIES = "where several start noises are tried first, Cancel waits for them"
PICTURE, BOXES = "(picture)", "(boxes)"
"""What to show of a picture, beside the words with a heat map, of which these are none."""


@dataclass(frozen=True)
class Source:
    """What to load: a model, the arguments of load() beside it, LoRAs and IP-Adapters."""

    name: str = BUNDLED
    loading: Mapping[str, Any] = field(default_factory=dict)
    loras: tuple[LoraFlag, ...] = ()
    adapters: tuple[str, ...] = ()
    encoder: str | None = None

    def load(self) -> Model:
        """The model. A LoRA that counts nothing is left out."""
        loras = [LoRA(file, 1.0 if weight is None else weight, text) for file, weight, text in self.loras]
        model = load(self.name, **self.loading, loras=loras)
        for file in self.adapters:
            model = with_image_prompt(model, file, self.encoder or "")
        return model


@dataclass(frozen=True, eq=False)
class Look:
    """A picture, finished or not, and what can be shown of it.

    layout: its boxes and masks, by labels that no two objects share. shares: by these, the fraction of the phrase's
    attention inside. maps: the attention [h,w] to each word and phrase, if it was recorded.
    """

    image: Image.Image
    layout: Mapping[str, object]
    shares: Mapping[str, float]
    maps: Mapping[str, NDArray[np.float32]]

    def shown(self, what: str) -> Image.Image:
        """The picture, with its boxes and shares, or the heat map of a word. ValueError for a word without a map."""
        if what == BOXES and self.layout:
            named = {name: f"{name} {self.shares[name]:.0%}" if name in self.shares else name for name in self.layout}
            return draw.boxes(self.image, {named[name]: place for name, place in self.layout.items()})
        if what in (PICTURE, BOXES):
            return self.image
        if what not in self.maps:
            there = ", ".join(self.maps) or 'none, since "attention" was off'
            raise ValueError(f"there is no heat map of {what!r} for this picture; it has those of {there}")
        return draw.heatmap(self.image, self.maps[what], what)


@dataclass(frozen=True, eq=False)
class Made:
    """A finished picture of the page: its file, what to show of it, and what makes it again."""

    file: Path
    look: Look
    seed: int | None
    report: str
    python: str
    command: str


@dataclass(frozen=True, eq=False)
class Progress:
    """A run after a step: its pictures so far, and at the end what was made. `stopped`: it was left before the end."""

    step: int
    steps: int
    looks: tuple[Look, ...] = ()
    made: tuple[Made, ...] = ()
    notes: tuple[str, ...] = ()
    stopped: bool = False

    def __str__(self) -> str:
        if self.made:
            return f"made in {self.steps} steps"
        if self.stopped:
            return f"stopped after {self.step} of {self.steps} steps"
        return f"step {self.step} of {self.steps}" if self.steps else "loading the model"


class Studio:
    """The model in memory, and runs with it. folder: where pictures are written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._loaded: tuple[Source, Model, Callable[[Tensor], Tensor]] | None = None

    def model(self, source: Source) -> Model:
        """The model of a source. There is one in memory: another source replaces it."""
        if self._loaded is None or self._loaded[0] != source:
            self._loaded = None  # its memory is free before the next is read
            model = source.load()
            self._loaded = (source, model, fit_preview(model) or model.decode)
        return self._loaded[1]

    def run(
        self, values: Values, source: Source, stop: threading.Event, every: int = 1, what: str = BOXES
    ) -> Iterator[Progress]:
        """The steps of a request, until it ends or `stop` is set, which is looked at before each.

        every: steps between previews, which are of `what`, and not decoded: see preview.py.

        ValueError for a request that cannot be; the pictures of a finished one are written to the folder.
        """
        request = Request.from_plain(values)
        yield Progress(0, 0, notes=(_TRIES,) if request.tries > 1 else ())
        with _noted() as notes:
            run = sample_steps(request.filled({"model": self.model(source)}))
            assert self._loaded is not None
            preview = self._loaded[2]
        taken = 0
        while taken < len(run) and not stop.is_set():
            with _noted() as more:
                taken = next(run).index + 1
                seen: tuple[Look, ...] = ()
                if taken % every == 0 and taken < len(run):
                    seen = looks(_clean(run.result(preview)), run.request, [what])
            notes = list(dict.fromkeys(notes + more))
            yield Progress(taken, len(run), seen, notes=tuple(notes))
        if taken < len(run):
            yield Progress(taken, len(run), stopped=True)
            return
        result = _clean(run.result())
        made = tuple(self._made(result, run.request, values, source))
        yield Progress(taken, taken, tuple(one.look for one in made), made, tuple(notes))

    def _made(self, result: Result, request: Request, values: Values, source: Source) -> Iterator[Made]:
        if "tries" in result.info:  # the seeds that were best make the same without the others
            values = {name: value for name, value in values.items() if name != "tries"} | {"seed": list(result.seeds)}
        values = {"seed": result.seeds[0], **values}
        for one, look in zip(result, looks(result, request), strict=True):
            (file,) = one.save(self.folder)
            report = "" if one.reports is None else str(one.reports[0])
            yield Made(file, look, one.seeds[0], report, python(values, source), command(values, source, str(file)))


def looks(result: Result, request: Request, names: Sequence[str] | None = None) -> tuple[Look, ...]:
    """What can be shown of each image. request: the run's, as resolved. names: to have maps of; default: all words."""
    layouts = [layout or {} for layout in request.layouts for _ in range(request.images_per_prompt)]
    return tuple(_look(one, layout, names) for one, layout in zip(result, layouts, strict=True))


def _look(one: Result, layout: Mapping[Any, object], asked: Sequence[str] | None) -> Look:
    prompt = str(one.parameters[0].get("prompt"))
    names = [*layout, *([*words(prompt), *phrases(prompt)] if asked is None else asked)]
    maps = {}
    for name in map(str, names if one.attention is not None else ()):
        with suppress(ValueError):  # a word beyond the encoder's length
            assert one.attention is not None
            maps[name] = one.attention.of(0, name).numpy()
    measured: dict[str, list[float]] = {}
    for report in one.reports or ():
        for name, share in zip(report.names, report.mass[-1].tolist() if len(report.mass) else (), strict=False):
            measured.setdefault(name, []).append(share)
    places: dict[str, object] = {}
    shares: dict[str, float] = {}
    for label, _, region in named(read_objects(layout)):
        inside = measured[region.name].pop(0) if measured.get(region.name) else math.nan
        if region.boxes or region.mask is not None:
            places[label] = plain_boxes([region])[region.name]
            inside = _share(region, maps[region.name]) if math.isnan(inside) and region.name in maps else inside
            shares |= {} if math.isnan(inside) else {label: inside}
    return Look(one.image, places, shares, maps)


def _share(region: PlacedObject, heat: NDArray[np.float32]) -> float:
    """The fraction of a map inside a region."""
    inside = region.coverage((heat.shape[0], heat.shape[1])).numpy()
    return float((heat * inside).sum() / max(float(heat.sum()), 1e-30))


def sheet(looks: Sequence[Look], what: str) -> Image.Image | None:
    """One picture, or a sheet of several; None without any. A word that has no map is shown as boxes."""
    known = what if what in (PICTURE, BOXES) or all(what in look.maps for look in looks) else BOXES
    shown = [look.shown(known) for look in looks]
    return (shown[0] if len(shown) == 1 else draw.sheet(shown)) if shown else None


def weighted(source: Source, weights: Sequence[float]) -> Source:
    """The source with other weights for its LoRAs; those of 0 are left out."""
    loras = tuple((file, weight, text) for (file, _, text), weight in zip(source.loras, weights, strict=True) if weight)
    return replace(source, loras=loras)


def differences(taken: Taken, source: Source, model: Model) -> Iterator[str]:
    """Notes on what made a picture and is otherwise here. ValueError for a LoRA that is missing."""
    yield from taken.differences(model)
    here = {**source.loading, "dtype": model.dtype_name, "loras": taken.loading["loras"]}
    for name, value in taken.loading.items():
        if value is not None and value != here.get(name):
            yield f"{taken.picture} was made with {name} {value}, this is {here.get(name) or 'without'}"


def _clean(result: Result) -> Result:
    return blackened(result) if any(result.flagged or ()) else result


@contextmanager
def _noted() -> Iterator[list[str]]:
    """Collect the texts of our warnings, not those of other threads' libraries."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += [str(one.message) for one in caught if one.category is UserWarning]
