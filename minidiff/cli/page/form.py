"""The page's form: what its controls hold, as fields of a Request and back. Knows no gradio."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from ...guidance.guide import Guidance
from ...guidance.labels import Labelled, from_labels, to_labels
from ...guidance.layout import plain_boxes, read_objects
from ...prompts.named import phrases as phrases, words as words
from ...request import FIELDS, Plain, Request
from ...request_checks import FITS
from ...vocabulary import EMPHASES, OBJECTIVES, PRESETS, SAMPLERS, SCHEDULES, SPACINGS, SYNTAXES
from ..flags import parser

Values: TypeAlias = "dict[str, Plain]"
"""Fields of a request as JSON values; pictures as paths."""
Place: TypeAlias = Labelled
Size: TypeAlias = "tuple[int, int]"

# The fields that have a control, in the page's order: its choices, or the type of its value. All others are JSON.
# Numbers are typed as text: a browser's own end at 2**53, and its field for them shows 0 where there is none.
CONTROLS: Mapping[str, tuple[str, ...] | type] = {
    "prompt": str,
    "negative_prompt": str,
    "guidance": (*PRESETS, *OBJECTIVES, "none"),
    "tries": int,
    "seed": int,
    "steps": int,
    "sampler": SAMPLERS,
    "guidance_scale": float,
    "width": int,
    "height": int,
    "images_per_prompt": int,
    "schedule": tuple(SCHEDULES),
    "spacing": SPACINGS,
    "syntax": SYNTAXES,
    "emphasis": EMPHASES,
    "clip_skip": int,
    "strength": float,
    "fit": FITS,
    "attention": bool,
}
PICTURES = ("image", "mask", "image_prompt")
_CODE = ("context", "negative_context", "latents", "attention", "edits", "inputs")  # no JSON says them
_ELSEWHERE = ("model", "output", "reduce", "progress", *PICTURES)  # no text of the page names a file or a model
_BOARD = 1000  # pixels of the longer edge of what boxes are drawn on: they are whole pixels there
_COLOURS = ((230, 25, 75), (42, 111, 240), (26, 138, 60), (217, 96, 10), (123, 44, 191), (0, 131, 143))  # as in draw


def default(field: str) -> str:
    """What the help of its flag says of a field's default, such as "random"; "" for nothing."""
    commands = next(one for one in parser()._actions if isinstance(one, argparse._SubParsersAction))
    flags = {action.dest: action.help for action in commands.choices["generate"]._actions}
    found = re.search(r"default: ([^);]+)", flags.get(field) or "")
    return found[1] if found else ""


def others() -> list[str]:
    """The fields of a request that have no control and can be given as JSON."""
    return [name for name in FIELDS if name not in (*CONTROLS, *_CODE, *_ELSEWHERE)]


# ---- from the controls to a request


def read(entered: Mapping[str, object], places: Sequence[Place], more: str) -> Values:
    """The values of a request. entered: by field, None or "" where unset; more: further fields, a JSON object.

    ValueError for what cannot be one; Request.from_plain checks the values themselves.
    """
    values: dict[str, Any] = {}
    for name, value in entered.items():
        kind = CONTROLS[name]
        if value is None or value is False or (isinstance(value, str) and not value.strip()):
            continue
        numbers = kind in (int, float) or name == "seed"
        values[name] = _number(name, str(value), float if kind is float else int) if numbers else value
    if not all(label for label, _ in places):
        raise ValueError("a box has no phrase; double-click it and choose one, or delete it")
    if places:
        layout = from_labels(places, phrases=phrases(str(entered.get("prompt") or "")))
        values["boxes"] = json.loads(json.dumps(layout))  # with lists
    further = _further(more)
    for name in further:
        if name in values or name in _ELSEWHERE:
            raise ValueError(f"further settings hold {name!r}, which has its own control; leave it out there")
    return values | further


def _number(name: str, text: str, kind: type) -> Any:
    """A number as typed; for seeds, or one per image with commas."""
    try:
        found = [kind(part) for part in (text.split(",") if name == "seed" else [text])]
    except ValueError:
        expected = "a number" if kind is float else "a whole number"
        raise ValueError(f"{name} is {text!r}; expected {expected}") from None
    return found if len(found) > 1 else found[0]


def _further(text: str) -> Values:
    try:
        found = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"further settings are not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f'further settings are {text!r}; expected an object such as {{"guidance_rescale": 0.7}}')
    return found


# ---- and back


def fill(fields: Mapping[str, object]) -> tuple[dict[str, object], list[Place], str]:
    """What the controls show for the fields of a request: the values by name, the boxes, and the rest as JSON."""
    usual = {field.name: field.default for field in dataclasses.fields(Request)}
    rest = {name: value for name, value in fields.items() if value != usual[name] and name not in _ELSEWHERE}
    boxes, places = rest.pop("boxes", None), []
    if boxes is not None:
        places = drawn(boxes, str(fields.get("prompt") or ""))
        rest |= {} if places else {"boxes": boxes}
    if "guidance" in rest:
        rest["guidance"] = preset(rest["guidance"])
    shown: dict[str, object] = {}
    for name, kind in CONTROLS.items():
        value = rest.get(name)
        fits = value in kind if isinstance(kind, tuple) else isinstance(value, (int, str) if name == "seed" else kind)
        seeds = name == "seed" and isinstance(value, list)
        shown[name] = kind is bool and value is True
        if value is not None and (fits or seeds or (kind is float and isinstance(value, int))):
            text = ", ".join(str(one).removesuffix(".0") for one in (value if isinstance(value, list) else [value]))
            shown[name] = value if kind is bool else text
            del rest[name]
        elif kind is not bool:
            shown[name] = ""
    return shown, places, json.dumps(rest) if rest else ""


def preset(guidance: object) -> object:
    """The name of a published objective with its own settings, where a mapping is just that."""
    if not isinstance(guidance, Mapping):
        return guidance
    given = Guidance.read(guidance).plain()
    return next((name for name in OBJECTIVES if Guidance.read(name).plain() == given), dict(guidance))


def drawn(boxes: object, prompt: str) -> list[Place]:
    """The boxes of a layout, each with its label; none where they would not say all of it, with this prompt."""
    if not isinstance(boxes, Mapping):
        return []
    objects = read_objects(boxes)
    if not all(one.boxes for one in objects):
        return []
    places = to_labels(objects)
    same = plain_boxes(read_objects(from_labels(places, phrases=phrases(prompt)))) == plain_boxes(objects)
    return places if same and not any(one.name.startswith("tokens:") for one in objects) else []


# ---- the board that boxes are drawn on


def board_size(width: float | None, height: float | None) -> Size:
    """Pixels of the board for a picture of that size; square where it is unknown or no size."""
    if not (width and height and width > 0 and height > 0):
        return _BOARD, _BOARD
    return max(1, round(_BOARD * min(1, width / height))), max(1, round(_BOARD * min(1, height / width)))


def to_annotations(places: Sequence[Place], size: Size) -> list[dict[str, Any]]:
    """Boxes as the board takes them: the last first."""
    edges, found = ("xmin", "ymin", "xmax", "ymax"), []
    named = list(dict.fromkeys(phrase for phrase, _ in places))
    for phrase, box in places:
        pixels = {edge: round(at * size[i % 2]) for i, (edge, at) in enumerate(zip(edges, box, strict=True))}
        found.append({"label": phrase, "color": _COLOURS[named.index(phrase) % len(_COLOURS)], **pixels})
    return found[::-1]


def from_annotations(drawn: Sequence[Mapping[str, Any]], size: Size, known: Sequence[Place] = ()) -> list[Place]:
    """Boxes from the board. known: those that were put there, which are exact where they were not moved."""
    corners = ("label", "xmin", "ymin", "xmax", "ymax")
    exact = {tuple(one[c] for c in corners): p for one, p in zip(to_annotations(known, size), known[::-1], strict=True)}
    found: list[Place] = []
    for one in reversed(drawn):
        phrase, *pixels = key = tuple(one.get(corner, "") for corner in corners)
        x0, y0, x1, y1 = (min(1.0, max(0.0, round(p / size[i % 2], 3))) for i, p in enumerate(pixels))
        found.append(exact.get(key, (phrase or "", (x0, y0, x1, y1))))
    return found


def colours(count: int) -> list[str]:
    """A colour for each phrase of a list, in the board's form."""
    return ["#{:02x}{:02x}{:02x}".format(*_COLOURS[i % len(_COLOURS)]) for i in range(count)]
