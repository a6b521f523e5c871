"""The pictures that the command line writes beside an image: its boxes and attention heat maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..checks import warn
from ..draw import boxes, heatmap
from ..png.write import png_bytes, slug, write_png
from ..prompts.named import words
from ..recorded import Attention
from ..result import Result


def blackened(result: Result) -> Result:
    """The Result with every image black that the safety checker flagged."""
    assert isinstance(result.images, list) and result.flagged is not None  # "pil", with a checker
    pairs = zip(result.images, result.flagged, strict=True)
    return replace(result, images=[Image.new("RGB", image.size) if bad else image for image, bad in pairs])


def write_pictures(result: Result, written: Sequence[Path], layouts: Sequence[Mapping[Any, object]]) -> list[Path]:
    """Write NAME-boxes.png (if it has boxes) and NAME-attention-PHRASE.png for each phrase beside each image's file.

    written: the image files; layouts: one per image, possibly empty. Phrases are those of the boxes, or else the words
    of the prompt. The images are already saved, so any failure here is only a warning.
    """
    found: list[Path] = []
    images = result.images
    assert isinstance(images, list)  # the command line always uses "pil"
    for i, (path, layout) in enumerate(zip(written, layouts, strict=True)):
        for name, picture in _pictures(result, i, images[i], layout):
            try:
                found.append(write_png(png_bytes(picture()), path.with_name(f"{path.stem}-{name}.png")))
            except Exception as error:
                warn(f"{path} was written, but not its picture {name}: {error}")
    return found


def _pictures(
    result: Result, i: int, image: Image.Image, layout: Mapping[Any, object]
) -> Iterator[tuple[str, Callable[[], Image.Image]]]:
    """The name of each picture and the function that draws it."""
    if layout:
        yield "boxes", lambda: boxes(image, layout)
    attention = result.attention
    if attention is None:
        return
    prompt = result.parameters[i].get("prompt")
    phrases = [str(name) for name in layout] or (words(prompt) if isinstance(prompt, str) else [])
    top = _largest(attention, i, phrases)
    for phrase in phrases:
        yield (
            f"attention-{slug(phrase)}",
            lambda phrase=phrase: heatmap(image, attention.of(i, phrase), phrase, top),  # type: ignore[misc]
        )


def _largest(attention: Attention, i: int, phrases: Sequence[str]) -> float | None:
    """The maximum of an image's maps, their shared scale; a phrase without a map is reported when drawn."""
    found = []
    for phrase in phrases:
        with suppress(ValueError):
            found.append(float(attention.of(i, phrase).max()))
    return max(found, default=0.0) or None
