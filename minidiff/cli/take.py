"""generate --from: read the settings of a picture as fields of a request.

Pictures are untrusted and cannot choose which model is loaded, except the bundled one or one already in the hub's
cache; the caller can name any.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from ..checks import number, shown
from ..png.chunk import plain, reproducible
from ..png.read import read_metadata
from ..prompts.parse import NETWORK
from ..request import FIELDS, Request
from ..vocabulary import BUNDLED

if TYPE_CHECKING:
    from ..model import Model
    from ..png.chunk import Plain
    from ..png.read import Metadata
    from .values import LoraFlag

_OF_THE_MODEL = ("vae", "tokenizer", "prediction_type", "variant", "revision", "dtype")
_ADAPTER = ("kind", "name", "file", "sha256")
# properties of the call, not of the picture; and the names of files, which no picture chooses
_PICTURES = ("image", "mask", "image_prompt")  # given again, since no picture holds another
_NEVER = ("output", "progress", "reduce", "image_prompt")
# When one of these fields is given, the file's values for the others would contradict it.
_REPLACED = {
    "steps": ("timesteps", "sigmas"),
    "timesteps": ("steps", "sigmas"),
    "sigmas": ("steps", "timesteps"),
    "sampler": ("schedule", "spacing", "eta"),
    "boxes": ("guidance",),
    "syntax": ("emphasis",),
}
# The kind of an adapter -> its flag.
_ADAPTER_FLAGS = {"word": "--word {name}=FILE", "lora": "--lora FILE", "image prompt": "--ip-adapter FILE"}


@dataclass(frozen=True, eq=False)
class Taken:
    """Read from a picture: the fields of a request, the arguments of load(), and notes for the user."""

    picture: str
    fields: Mapping[str, object]
    loading: dict[str, object]
    notes: tuple[str, ...]
    found: Metadata

    def differences(self, model: Model) -> Iterator[str]:
        """Notes on differences from the model and versions that made the picture."""
        named, info = self.found.arguments.get("model"), self.found.info
        made, versions = info.get("model_hash"), info.get("versions")
        if isinstance(made, str) and len(made) == 10 and model.sha256 is not None:  # other lengths are A1111's old hash
            if made != model.sha256[:10]:
                yield f"{self.picture} was made with a model file of sha256 {made}..., this is {model.sha256[:10]}..."
        elif isinstance(named, str) and named != model.name:
            yield f"{self.picture} was made with the model {named!r}, this is {model.name!r}"
        for name, then in versions.items() if isinstance(versions, dict) else ():
            if name in ("minidiff", "torch", "transformers") and then != version(name):
                yield f"{self.picture} was made with {name} {then}, this is {version(name)}: the last bits may differ"
        yield from self._adapter_differences(model)

    def _adapter_differences(self, model: Model) -> Iterator[str]:
        """Notes on adapters from other files. ValueError for those that the model lacks: no picture chooses files."""
        made = self.found.info.get("adapters")
        there = {(one.kind, one.name.lower()): one for one in model.adapters}
        missing = []
        for entry in made if isinstance(made, list) else []:
            kind, name, file, sha256 = map(entry.get, _ADAPTER) if isinstance(entry, dict) else [None] * 4
            if not (isinstance(kind, str) and isinstance(name, str) and isinstance(sha256, str)):
                raise ValueError(f"{self.picture}: its adapters are not understood: {shown(entry)}")
            one = there.get((kind, name.lower()))
            if one is None:
                flag = _ADAPTER_FLAGS.get(kind, "load it in Python").format(name=name)
                named = f"its file was {file}," if isinstance(file, str) else "its file was"
                missing.append(f"{kind} {name} ({flag}; {named} of sha256 {sha256[:10]}...)")
            elif not one.sha256.startswith(sha256):  # A1111 writes its first 12 digits
                yield f"{self.picture} was made with another file for the {kind} {name}, of sha256 {sha256[:10]}..."
        text = (
            f"{self.picture} was made with what is not on this model, and a picture cannot choose files: pass "
            f"{', '.join(missing)}"
        )
        if missing and self.found.source == "minidiff":
            raise ValueError(text)
        yield from [text] if missing else []


def take(picture: str, given: Mapping[str, object], loading: Mapping[str, object]) -> Taken:
    """Read a picture. given, loading: values from flags, which take precedence."""
    found = read_metadata(picture)
    replaced = {name for field, names in _REPLACED.items() if field in given for name in names}
    fields: dict[str, object] = {}
    left = []
    for name, value in found.arguments.items():
        if name == "model" or value is None or name in given or name in _NEVER:
            continue
        if name == "image_prompt_scale" and "image_prompt" not in given:
            continue
        if name not in FIELDS or name in replaced or _is_fingerprint(value):
            left += [name] if value and value != "uniform" else []
        elif name in ("prompt", "negative_prompt") and isinstance(value, str) and found.source == "a1111":
            fields[name] = NETWORK.sub("", value)
            left += [f"{network[0]} (load such a file with --lora)" for network in NETWORK.finditer(value)]
        else:
            fields[name] = value
    if "relations" in given and "boxes" in fields and fields["boxes"] == _planned(found.arguments.get("relations")):
        del fields["boxes"]  # those of the picture's own relations
    places = {"boxes", "relations"} & {*fields, *given}
    if not places and "guidance" in fields and fields["guidance"] != "none":
        del fields["guidance"]  # there is nothing to guide
    started = _started(picture, left, given)
    pictures = {"image_prompt": given.get("image_prompt"), "image": started}  # which other fields need
    checked = Request.from_plain({"prompt": "any", **pictures, **fields}, origin=picture)
    same = _same_pictures(picture, found.arguments.get("image_prompt"), given.get("image_prompt"))
    fields["model"], options, more = _model(picture, found, given, loading)
    options["loras"] = list(_weighted(picture, found, loading.get("loras")))
    other = found.info.get("other")
    left += [*more, *(list(other) if isinstance(other, dict) else [])]
    notes = [] if same else [f"{picture} was made with other image prompts than these"]
    if started and "image" in found.arguments and checked.plain()["image"] != [found.arguments["image"]]:
        notes.append(f"{picture} was made from another picture than {started}")
    notes += [f"not taken from {picture}: {', '.join(left)}"] if left else []
    if found.source == "a1111":
        notes.append(f"{picture} was not made by minidiff; its noise differs, so the image will not match")
    elif not reproducible({n: held for n, held in found.arguments.items() if n not in _PICTURES}, found.info):
        notes.append(f"{picture} does not record everything needed, so the image will differ")
    return Taken(picture, fields, options, tuple(notes), found)


def _started(picture: str, left: Sequence[str], given: Mapping[str, object]) -> object:
    """The first picture given to start from. ValueError where a picture was made from others: none chooses files."""
    missing = [f"--{name}" for name in ("image", "mask") if name in left]
    if missing:
        raise ValueError(f"{picture} was made from a picture that it does not hold: pass {' and '.join(missing)}")
    start = given.get("image")
    return start[0] if isinstance(start, list) else start


def _planned(relations: Plain) -> object:
    """The boxes that a request without any has of its relations, as a picture holds them."""
    from ..guidance.layout import plain_boxes, read_objects
    from ..guidance.relations import planned, read_relations
    from ..png.chunk import plain

    return plain(plain_boxes(read_objects(planned(read_relations(relations or [])))))  # type: ignore[arg-type]


def _same_pictures(picture: str, made: Plain, given: object) -> bool:
    """Whether the image prompts given are those that made a picture, by their pixels, boxes and scales.

    ValueError, with the flags to pass, where there were some and none are given: no picture chooses files.
    """
    if not made or given is not None:
        from ..guidance.image_prompt import read_image_prompts

        return given is None or _unnamed(made) == _unnamed(plain([one.plain() for one in read_image_prompts(given)]))
    flags = []
    for entry in made if isinstance(made, list) else [made]:
        one = entry if isinstance(entry, dict) else {}
        box, name = one.get("box"), one.get("name") or "FILE"
        single = box[0] if isinstance(box, list) and len(box) == 1 else None
        place = f"={','.join(map(shown, single))}" if isinstance(single, list) else ""
        sha256 = re.search("[0-9a-f]{64}", str(one.get("image")))
        of = f" (whose pixels have the sha256 {sha256[0][:12]}...)" if sha256 else ""
        flags.append(f"--image-prompt {name}{place}{of}")
    raise ValueError(f"{picture} was prompted with pictures too, and cannot choose files: pass {', '.join(flags)}")


def _unnamed(prompts: Plain) -> Plain:
    """Image prompts without the names of their files."""
    several = prompts if isinstance(prompts, list) else []
    return [{key: value for key, value in one.items() if key != "name"} for one in several if isinstance(one, dict)]


def _is_fingerprint(value: object) -> bool:
    """True where a value, or one inside it, only describes a tensor or object that the file does not hold."""
    if isinstance(value, list):
        return any(map(_is_fingerprint, value))
    if isinstance(value, dict):
        return bool(value.keys() & {"tensor", "fields"}) or any(map(_is_fingerprint, value.values()))
    return False


def _model(
    picture: str, found: Metadata, given: Mapping[str, object], loading: Mapping[str, object]
) -> tuple[object, dict[str, object], list[str]]:
    """The model, the arguments of load(), and the names of those not taken from the picture."""
    named, options = found.arguments.get("model"), found.info.get("load")
    model = given.get("model")
    if model is None:
        if named != BUNDLED and not _is_cached(named):
            raise ValueError(
                f"{picture} was made with {_described(named, found.info.get('model'))}; a picture cannot choose what "
                "is loaded: pass the model or its path with --model"
            )
        model = named
    same = named in (model, Path(str(model)).stem, Path(str(model)).resolve().name)
    values = {**(options if isinstance(options, dict) else {}), "dtype": found.info.get("dtype")}
    taken, left = dict(loading), []
    for name in _OF_THE_MODEL:
        value = values.get(name)
        if value is None or loading.get(name) is not None:
            continue
        if same and isinstance(value, str) and (name not in ("vae", "tokenizer") or _is_cached(value)):
            taken[name] = value
        else:
            left.append(name)
    return model, taken, left


def _weighted(picture: str, found: Metadata, loras: object) -> Iterator[LoraFlag]:
    """The files of --lora, those without a weight with the weights that they had in the picture."""
    made = found.info.get("adapters")
    entries = [one for one in made if isinstance(one, dict)] if isinstance(made, list) else []
    for file, weight, text_weight in loras if isinstance(loras, list) else []:
        entry = next((one for one in entries if (one.get("kind"), one.get("name")) == ("lora", Path(file).stem)), None)
        if weight is None and entry is not None:
            entries.remove(entry)  # a file that was put on twice has two weights
            own = entry.get("weights")
            weights = {**own} if isinstance(own, dict) else {}
            weight = number(f"{picture}: the weight of {file}", weights.get("weight"))
            if weights.get("text_weight") is not None:
                text_weight = number(f"{picture}: the text_weight of {file}", weights["text_weight"])
        yield file, weight, text_weight


def _described(named: object, made: object) -> str:
    """The model named by a picture, in words. made: details from minidiff's own pictures."""
    known: dict[object, object] = made if isinstance(made, dict) else {}
    kind, sha256 = known.get("kind"), known.get("sha256")
    what = f"a {kind}" if kind in ("file", "folder") else "a model"
    return f"{what} named {shown(named)}{f' of sha256 {sha256[:10]}...' if isinstance(sha256, str) else ''}"


def _is_cached(name: object) -> bool:
    """True for the id of a hub repository in the cache."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return False
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(name, file), str) for file in ("model_index.json", "config.json"))
