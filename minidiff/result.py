"""What generate() returns, its PNG files, and the way back from a PNG to the arguments that made it.

A saved PNG holds two text chunks: `parameters`, the text that A1111 writes and most programs read, and `minidiff`,
JSON:
{"format": 1, "arguments": generate()'s arguments for this image alone, "info": what is no argument, "reproducible":
bool}.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import math
import os
import re
import tempfile
import unicodedata
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile, PngInfo
from torch import Tensor

from .png.infotext import parse_infotext, to_infotext

if TYPE_CHECKING:
    from .guidance.guide import Report
    from .recorded import Attention

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"
Images: TypeAlias = "list[Image.Image] | NDArray[np.float32] | Tensor"

FORMAT = 1  # of our chunk; a reader refuses any other
OTHER_FORMATS = (".avif", ".bmp", ".gif", ".heic", ".jpeg", ".jpg", ".jxl", ".ppm", ".svg", ".tif", ".tiff", ".webp")


@dataclass(frozen=True, eq=False)
class Result:
    """The images of one generate() call and what is needed to make each of them again.

    `images` follows generate's `output`: "pil" a list, "numpy" [B,H,W,3] float32 in [0,1], "tensor" [B,3,H,W] in [0,1],
    "latents" [B,4,h,w]. `latents` [B,4,h,w] float32 on the CPU are the last step's, whatever the output.
    `parameters[i]` are the arguments of generate() that make image i alone, as plain() writes them; `info` is what is
    true of the run and no argument: {"versions": {"minidiff": "0.1.0", ...}, "model_hash": ..., "device": ...}.
    `timings` are seconds by phase. `attention` are the maps that were asked for, `reports` what guidance did to each
    image where there were boxes. ValueError when the counts differ.
    """

    images: Images = field(repr=False)
    latents: Tensor = field(repr=False)
    seeds: tuple[int | None, ...]
    parameters: tuple[dict[str, Plain], ...] = field(repr=False)
    timings: dict[str, float]
    info: dict[str, Plain] = field(default_factory=dict, repr=False)
    attention: Attention | None = field(default=None, repr=False)
    reports: tuple[Report, ...] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        counts = (len(self.images), len(self.latents), len(self.seeds), len(self.parameters))
        if len(set(counts)) != 1:
            raise ValueError(
                f"a Result needs one of each for every image; got {counts[0]} images, {counts[1]} latents, "
                f"{counts[2]} seeds and {counts[3]} parameters"
            )

    def save(self, path: str | Path, *, metadata: bool = True) -> list[Path]:
        """Write every image as PNG and return the files written, in order. Never overwrites.

        A path that ends in .png is the name of the file; anything else, and any existing folder, is a folder and the
        names come from prompt and seed (a-red-circle-seed-42.png). Missing folders are made. A taken name gets the next
        free number, so three images saved as cat.png are cat.png, cat-1.png, cat-2.png; two processes never share a
        name. Where a file cannot be written it goes to the current folder, the home folder or the temporary folder,
        with a warning. metadata=False writes no text chunk. ValueError: another format than PNG, or latents. OSError:
        no folder could be written; the images are still in the Result.
        """
        check_output_path(path)
        named = Path(path).suffix.lower() == ".png" and not os.path.isdir(path)
        images = _pil_images(self.images, self.latents)
        written = []
        for image, seed, arguments in zip(images, self.seeds, self.parameters, strict=True):
            wanted = Path(path) if named else Path(path, _name(arguments.get("prompt"), seed))
            chunks = _chunks(arguments, self.info) if metadata else None
            try:
                written.append(_write(_encode(image, chunks), wanted))
            except OSError as error:
                raise OSError(f"{error}. Written before: {', '.join(map(str, written)) or 'none'}") from error
        return written


@dataclass(frozen=True)
class Metadata:
    """What a PNG says about its making. `source` is "minidiff" or "a1111".

    `arguments` go to generate(**arguments). `info` is the rest: our versions and model_hash, or an A1111 file's
    model_hash, version and "other" (keys we have no name for). `reproducible`: the arguments alone make the image
    again, given the same model, versions and dtype; False when one is only a fingerprint of a tensor or the name of an
    object, and for A1111's files, whose programs differ in noise and in prompt syntax.
    """

    arguments: dict[str, Plain]
    info: dict[str, Plain]
    reproducible: bool
    source: str


# ---- pixels


def to_numpy(images: Tensor) -> NDArray[np.float32]:
    """[B,3,H,W] in [0,1], any float dtype and device -> [B,H,W,3] float32. ValueError for another shape."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected images [B,3,H,W], got a tensor of shape {list(images.shape)}")
    array: NDArray[np.float32] = images.detach().cpu().permute(0, 2, 3, 1).float().numpy()
    return array


def to_pil(images: Tensor) -> list[Image.Image]:
    """[B,3,H,W] in [0,1] -> RGB images, rounded half to even as diffusers does; values outside [0,1] are clipped."""
    return _array_to_pil(to_numpy(images))


def _array_to_pil(array: NDArray[np.float32]) -> list[Image.Image]:
    if array.ndim != 4 or array.shape[3] != 3:
        raise ValueError(f"expected images [B,H,W,3], got an array of shape {list(array.shape)}")
    # Unclipped, 1.01 would wrap round to black; generate's images are in range, a caller's may not be.
    return [Image.fromarray(pixels) for pixels in (array.clip(0, 1) * 255).round().astype("uint8")]


def _pil_images(images: Images, latents: Tensor) -> list[Image.Image]:
    if isinstance(images, Tensor):
        if images.shape[1] != 3 or images.shape == latents.shape:
            raise ValueError(
                f"this Result holds latents {list(images.shape)}, which are no image; generate with "
                "output='pil', 'numpy' or 'tensor' to save PNGs, or torch.save(result.latents, ...)"
            )
        return to_pil(images)
    return _array_to_pil(images) if isinstance(images, np.ndarray) else images


# ---- arguments as plain values


def plain(value: object) -> Plain:
    """`value` as JSON can hold it.

    Numbers, strings, lists and mappings stay; a dtype or device is its name; a path, or a string that is an existing
    absolute path, loses its folders. Tensors, arrays and images become {"tensor": {"shape", "dtype", "sha256"}},
    functions and other objects {"object": "module.qualname"}, dataclasses {"object": ..., "fields": {...}}: see
    reproducible().
    """
    if isinstance(value, (Tensor, np.ndarray, np.generic)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, Enum):
        return {"object": f"{_qualname(value)}.{value.name}"}
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return Path(value).name or value if os.path.isabs(value) and os.path.exists(value) else str(value)
    if isinstance(value, PurePath):
        return value.name or str(value)
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value).removeprefix("torch.")
    if isinstance(value, (Tensor, np.ndarray, Image.Image)):
        return _fingerprint(value)
    if isinstance(value, Mapping):
        return {
            key if isinstance(key, str) else json.dumps(key): plain(item)
            for key, item in ((plain(key), item) for key, item in value.items())
        }
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item) for item in value), key=json.dumps)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {entry.name: plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
        return {"object": _qualname(value), "fields": fields}
    return {"object": _qualname(value)}


def reproducible(parameters: Mapping[str, Plain]) -> bool:
    """False when a value inside stands for a tensor or an object that the file does not hold."""
    return not any(_marked(value) for value in parameters.values())


def _marked(value: Plain) -> bool:
    if isinstance(value, list):
        return any(_marked(item) for item in value)
    if not isinstance(value, dict):
        return False
    tensor = value.get("tensor")
    if (isinstance(tensor, dict) and "sha256" in tensor) or isinstance(value.get("object"), str):
        return True
    return any(_marked(item) for item in value.values())


def _fingerprint(value: Tensor | NDArray[np.generic] | Image.Image) -> Plain:
    """Equal for equal shape, dtype and bytes, whether tensor or array."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        # Through uint8, because numpy has no bfloat16.
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    else:
        value = np.asarray(value)
        dtype, data = str(value.dtype), value.tobytes()
    return {"tensor": {"shape": list(value.shape), "dtype": dtype, "sha256": hashlib.sha256(data).hexdigest()}}


def _qualname(value: object) -> str:
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(named, '__module__', None)}.{getattr(named, '__qualname__', None)}"


# ---- writing files


def check_output_path(path: str | Path) -> None:
    """ValueError when Result.save would refuse `path`, for callers who want to know before they generate."""
    try:
        suffix = Path(path).suffix
    except TypeError as error:
        raise ValueError(f"path is {path!r}, expected a str or a Path: a .png file or a folder") from error
    if suffix.lower() in OTHER_FORMATS and not Path(path).is_dir():
        raise ValueError(
            f"cannot save as {suffix}: only .png keeps the pixels and the parameters; name a .png file or a "
            f"folder, or convert with Pillow: result.images[0].save({str(Path(path).name)!r})"
        )


def _name(prompt: Plain, seed: int | None) -> str:
    text = slug(prompt if isinstance(prompt, str) else "")
    return f"{text}.png" if seed is None else f"{text}-seed-{seed}.png"


def slug(text: str, limit: int = 60) -> str:
    """A text as part of a file's name: lower-case ASCII letters, digits, hyphens; "image" for none."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    words = re.sub("[^a-z0-9]+", "-", ascii_text).strip("-")
    short = words if len(words) <= limit else words[: limit + 1].rpartition("-")[0] or words[:limit]
    return short or "image"


def _chunks(arguments: Mapping[str, Plain], info: Mapping[str, Plain]) -> PngInfo | None:
    """The two text chunks, or None with a warning when they cannot be written: the image matters more."""
    versions = info.get("versions")
    version = f"minidiff {versions['minidiff']}" if isinstance(versions, dict) and "minidiff" in versions else None
    chunks = PngInfo()
    try:
        chunk = {"format": FORMAT, "arguments": arguments, "info": info, "reproducible": reproducible(arguments)}
        text = to_infotext(arguments, model_hash=info.get("model_hash"), version=version)
        chunks.add_text("parameters", text)  # Pillow writes tEXt where latin-1 will do, else iTXt
        chunks.add_itxt("minidiff", json.dumps(_strict(chunk), ensure_ascii=False, allow_nan=False))
    except (ArithmeticError, AttributeError, RecursionError, TypeError, ValueError) as error:
        warnings.warn(f"the image is saved without metadata, its parameters cannot be written: {error}", stacklevel=3)
        return None
    return chunks


def _strict(value: object) -> object:
    """JSON has no word for nan and inf: {"float": "nan"}."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, list) else value


def write_png(image: Image.Image, path: Path) -> Path:
    """Write a picture that has no parameters, as Result.save does: under the next free name, elsewhere if need be."""
    return _write(_encode(image, None), path)


def _encode(image: Image.Image, chunks: PngInfo | None) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=chunks)
    return buffer.getvalue()


def _write(data: bytes, wanted: Path) -> Path:
    """Write to `wanted` or, where that fails, into the first of three folders that takes it, with a warning."""
    # A plain name elsewhere: the wanted one may be what failed (too long, not encodable).
    name = f"{slug(wanted.stem, limit=120)}.png"
    places = (Path.cwd, Path.home, lambda: Path(tempfile.gettempdir()))
    paths: list[Callable[[], Path]] = [lambda: wanted, *(lambda place=place: place() / name for place in places)]
    failures: list[str] = []
    for path in paths:
        try:
            written = _write_new(data, path())
        except (OSError, ValueError, RuntimeError) as error:  # ValueError: a NUL in the name; RuntimeError: no home
            failures.append(str(error))
            continue
        if failures:
            warnings.warn(f"could not write {wanted} ({failures[0]}); the image is in {written}", stacklevel=3)
        return written
    raise OSError(
        f"could not write {wanted}, nor {name} in the current, home or temporary folder ({'; '.join(failures)}); "
        "the images are still in the Result: make room, or save to another folder"
    )


def _write_new(data: bytes, wanted: Path) -> Path:
    """Write name.png, or name-1.png ...: the first that is free, claimed with O_EXCL. Leaves no partial file."""
    wanted.parent.mkdir(parents=True, exist_ok=True)
    path = wanted
    for number in itertools.count(1):
        try:
            file = path.open("xb")
            break
        except FileExistsError:
            path = wanted.with_name(f"{wanted.stem}-{number}{wanted.suffix}")
    try:
        with file:
            file.write(data)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


# ---- reading files


def read_parameters(png: str | Path) -> dict[str, Plain]:
    """The arguments that made a PNG, for generate(**arguments): read_metadata(png).arguments, with the same errors."""
    return read_metadata(png).arguments


def read_metadata(png: str | Path) -> Metadata:
    """From our chunk, else from A1111's `parameters`.

    ValueError: no such file, no PNG, damaged, no metadata, metadata of another program, or metadata that makes no
    sense.
    """
    chunks = _text_chunks(png)
    try:
        if "minidiff" in chunks:
            return _parse_ours(chunks["minidiff"])
        if "parameters" in chunks:
            return _parse_a1111(chunks["parameters"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{png}: its metadata is damaged: {error}") from error
    graphs = [name for name in ("workflow", "prompt") if chunks.get(name, "").lstrip().startswith("{")]
    if graphs:
        raise ValueError(
            f"{png} is a ComfyUI file: its workflow is a graph of nodes, JSON in the text chunk {graphs[0]!r}; "
            "open the file in ComfyUI"
        )
    found = f"text chunks {', '.join(sorted(chunks))}, which are not ours" if chunks else "no text chunk"
    raise ValueError(
        f"{png} holds no parameters that minidiff can read: it has {found}; it was saved without metadata, lost "
        "it on the way (many sites remove it), or is another program's"
    )


def _text_chunks(png: str | Path) -> dict[str, str]:
    try:
        with Image.open(png, formats=("PNG",)) as image:
            assert isinstance(image, PngImageFile)
            return {str(name): str(text) for name, text in image.text.items()}  # reads to the end of the file
    except FileNotFoundError as error:
        raise ValueError(f"no such file: {png}") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{png} is no PNG file; only PNGs hold parameters") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises here
        raise ValueError(f"cannot read {png} as PNG: {error}") from error


def _parse_a1111(text: str) -> Metadata:
    arguments, rest = parse_infotext(text)
    names = {"Model hash": "model_hash", "Version": "version"}
    info: dict[str, Plain] = {names[key]: value for key, value in rest.items() if key in names}
    info["other"] = {key: value for key, value in rest.items() if key not in names}
    return Metadata({**arguments}, info, reproducible=False, source="a1111")


def _parse_ours(text: str) -> Metadata:
    def revive(entry: dict[str, Plain]) -> Plain:
        number = entry.get("float")
        return float(number) if len(entry) == 1 and number in ("nan", "inf", "-inf") else entry

    def refuse(constant: str) -> Plain:
        raise ValueError(f"{constant} is not JSON")

    chunk = json.loads(text, object_hook=revive, parse_constant=refuse)
    known = isinstance(chunk, dict) and chunk.get("format") == FORMAT
    if not (known and isinstance(chunk.get("arguments"), dict) and isinstance(chunk.get("info"), dict)):
        raise ValueError(
            f"the chunk 'minidiff' should be an object with 'format' {FORMAT} and objects 'arguments' and 'info', "
            f"got {text[:80]!r}; a newer minidiff may read it"
        )
    return Metadata(chunk["arguments"], chunk["info"], reproducible(chunk["arguments"]), source="minidiff")
