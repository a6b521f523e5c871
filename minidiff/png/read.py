"""Read the generation parameters of a picture: our chunk, A1111's text, or the name of the program that wrote it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from ..checks import shown
from .chunk import Plain, parse_chunk, reproducible
from .infotext import parse_infotext, take_words
from .stealth import hidden_text

_PIXELS = 2**26  # 8192 x 8192: Pillow decodes a PNG to find the text behind its pixels
_USER_COMMENT, _NAMES = 0x9286, (0x010E, 0x010F, 0x0110)  # EXIF tags; the latter are description, make and model
# Programs with other formats than A1111's, by the keywords of their text chunks, most specific first; and by the keys
# of the JSON that some write in place of A1111's text.
_CHUNKS = {
    "InvokeAI": ("invokeai_metadata", "invokeai_graph", "sd-metadata", "Dream"),
    "Fooocus": ("fooocus_scheme",),
    "Easy Diffusion": ("use_stable_diffusion_model",),
    "ComfyUI": ("workflow", "prompt"),
}
_JSON = {
    "SwarmUI": ("sui_image_params",),
    "Fooocus": ("Performance", "performance", "Resolution", "base_model", "full_negative_prompt"),
}
_KNOWN = {"minidiff", "parameters"}.union(*_CHUNKS.values())


@dataclass(frozen=True)
class Metadata:
    """The generation parameters of a picture. `source` is "minidiff" or "a1111".

    `arguments` go to generate(**arguments). `info` is the rest: our versions and model, or an A1111 file's model_hash,
    version, words as "adapters" and "other" (keys we have no name for). `reproducible`: the arguments alone reproduce
    the image, given the same model, versions and dtype; False if one is only a fingerprint of a tensor or the name of
    an object, and for A1111's files, whose programs differ in noise and in prompt syntax.
    """

    arguments: dict[str, Plain]
    info: dict[str, Plain]
    reproducible: bool
    source: str


def read_parameters(picture: str | Path) -> dict[str, Plain]:
    """The arguments that made a picture, for generate(**arguments): read_metadata(picture).arguments, same errors."""
    return read_metadata(picture).arguments


def read_metadata(picture: str | Path) -> Metadata:
    """Read our chunk of a PNG, else A1111's text: from a PNG chunk, hidden in the pixels, or from EXIF, as in JPEG and
    WebP.

    ValueError: no such file, no picture, damaged, no metadata, or metadata of another program, which is named.
    """
    texts = _texts(picture)
    try:
        if "minidiff" in texts:
            arguments, info = parse_chunk(texts["minidiff"])
            return Metadata(arguments, info, reproducible(arguments, info), source="minidiff")
        program = _writer(texts)
        if program is None and "parameters" in texts:
            return _a1111(texts["parameters"])
    except ValueError as error:
        raise ValueError(f"{picture}: its metadata cannot be read: {error}") from error
    if program is not None:
        raise ValueError(
            f"{picture} was written by {program}, in a format that minidiff does not read; open it there, or copy "
            "the prompt and settings by hand"
        )
    names = ", ".join(name if name.isprintable() else shown(name) for name in sorted(texts)[:8])
    found = f"text chunks {names}, which are not ours" if texts else "no text chunk"
    raise ValueError(
        f"{picture} has no parameters that minidiff can read: it has {found}; it was saved without metadata, lost it "
        "later (many sites remove it), or is from another program"
    )


def _a1111(text: str) -> Metadata:
    arguments, rest = parse_infotext(text)
    words: list[Plain] = [{**word} for word in take_words(rest)]
    names = {"Model hash": "model_hash", "Version": "version"}
    info: dict[str, Plain] = {names[key]: value for key, value in rest.items() if key in names}
    info |= {"adapters": words} if words else {}
    info["other"] = {key: value for key, value in rest.items() if key not in names}
    if not rest.get("Version", "").startswith("minidiff"):  # ours say how they were read
        arguments.setdefault("syntax", "a1111")
    return Metadata({**arguments}, info, reproducible=False, source="a1111")


def _writer(texts: Mapping[str, str]) -> str | None:
    """The program that wrote these texts; None if it is unknown or writes A1111's format."""
    if texts.get("Software", "").startswith("NovelAI"):
        return "NovelAI"
    text = texts.get("parameters", "").strip()
    if text.startswith(("{", "[")) and len(text) < 1_000_000:  # a prompt may also start like this
        with suppress(ValueError, RecursionError):
            return _named(json.loads(text), _JSON) or "a program that minidiff does not know"
    if text:
        return None
    graphs = ("workflow", "prompt")  # a plain-text prompt is not ComfyUI's
    return _named({key for key in texts if key not in graphs or texts[key].lstrip().startswith("{")}, _CHUNKS)


def _named(keys: object, programs: Mapping[str, Sequence[str]]) -> str | None:
    there = keys if isinstance(keys, dict | set) else ()
    return next((name for name, own in programs.items() if any(key in there for key in own)), None)


def _texts(picture: str | Path) -> dict[str, str]:
    """The texts of a picture by keyword; text from EXIF or the pixels is `parameters`."""
    try:
        with Image.open(picture, formats=("PNG", "JPEG", "WEBP")) as image:
            if image.width * image.height > _PIXELS or getattr(image, "n_frames", 1) > 1:
                raise ValueError(
                    f"it has {getattr(image, 'n_frames', 1)} frames of {image.width}x{image.height}; expected one "
                    f"image of at most {_PIXELS:,} pixels"
                )
            image.load()
            found = {str(key): str(text) for key, text in getattr(image, "text", {}).items()}
            for more in (_exif_texts, hidden_text):
                if not found.keys() & _KNOWN:
                    found |= more(image)
            return found
    except FileNotFoundError as error:
        raise ValueError(f"no such file: {picture}") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{picture} is no PNG, JPEG or WebP file") from error
    except Exception as error:  # on damaged files, Pillow's readers may raise anything
        raise ValueError(f"cannot read {picture} as a picture: {error}") from error


def _exif_texts(image: Image.Image) -> dict[str, str]:
    """The texts in EXIF. A1111's is the user comment; ComfyUI's savers write "workflow:{...}" into other fields."""
    exif = image.getexif()
    fields = (str(exif.get(tag, "")).partition(":") for tag in _NAMES)
    found = {key.lower(): text for key, _, text in fields if key.lower() in ("prompt", "workflow")}
    comment = exif.get_ifd(0x8769).get(_USER_COMMENT, b"")
    text = _decoded(comment) if isinstance(comment, bytes) else str(comment)
    if "Steps: " in text or text.strip().startswith("{"):  # unlike "Screenshot"
        found["parameters"] = text
    return found


def _decoded(comment: bytes) -> str:
    """An EXIF user comment: eight bytes name its encoding. UNICODE is UTF-16 of either byte order, in practice."""
    kind, data = comment[:8], comment[8:]
    if kind.startswith(b"UNICODE"):
        little = data[1::2].count(0) > data[::2].count(0)
        return data.decode("utf-16-le" if little else "utf-16-be", errors="replace").strip("\0\ufeff")
    return data.decode("utf-8", errors="replace").strip("\0")
