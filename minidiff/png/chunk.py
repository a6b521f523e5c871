"""Our chunk of a PNG: generate()'s arguments for this one image as JSON, written and read.

{"format": 1, "arguments": {...}, "info": {facts about the run that are not arguments}, "reproducible": bool}
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from enum import Enum
from pathlib import Path, PurePath
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..checks import shown
from ..vocabulary import modernised

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"

FORMAT = 1  # readers refuse any other
_DEEPEST = 50  # levels of nesting; guidance takes six
_TOO_DEEP = f"the chunk is nested too deeply; expected at most {_DEEPEST} levels"
_LONGEST = 1_000_000  # characters; a layout of 256 boxes takes 20,000


def to_chunk(arguments: Mapping[str, Plain], info: Mapping[str, Plain]) -> str:
    """The chunk's text. ValueError for values that JSON cannot represent."""
    chunk = {"format": FORMAT, "arguments": arguments, "info": info, "reproducible": reproducible(arguments, info)}
    return json.dumps(_strict(chunk), ensure_ascii=False, allow_nan=False)


def parse_chunk(text: str) -> tuple[dict[str, Plain], dict[str, Plain]]:
    """(arguments, info). ValueError for what to_chunk() did not write."""
    if len(text) > _LONGEST:
        raise ValueError(f"the chunk has {len(text):,} characters; expected at most {_LONGEST:,}")

    def revive(entry: dict[str, Plain]) -> Plain:
        number = entry.get("float")
        return float(number) if len(entry) == 1 and number in ("nan", "inf", "-inf") else entry

    def refuse(constant: str) -> Plain:
        raise ValueError(f"{constant} is not JSON")

    def finite(digits: str) -> float:
        if not math.isfinite(float(digits)):
            raise ValueError(f"{digits[:80]} is too large")
        return float(digits)

    try:
        chunk = json.loads(text, object_hook=revive, parse_constant=refuse, parse_float=finite)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check_depth(chunk)
    known = isinstance(chunk, dict) and chunk.get("format") == FORMAT
    if not (known and isinstance(chunk.get("arguments"), dict) and isinstance(chunk.get("info"), dict)):
        raise ValueError(
            f"the chunk 'minidiff' should be an object with 'format' {FORMAT} and objects 'arguments' and 'info', "
            f"got {shown(text)}; a newer minidiff may read it"
        )
    return modernised(chunk["arguments"]), chunk["info"]


def _check_depth(value: Plain, left: int = _DEEPEST) -> None:
    if left == 0:
        raise ValueError(_TOO_DEEP)
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(item, left - 1)


def plain(value: object) -> Plain:
    """`value` in a form that JSON can represent.

    Numbers, strings, lists and mappings are kept; a dtype or device becomes its name; a path, or a string that is an
    existing absolute path, loses its folders. Tensors, arrays and images become {"tensor": {"shape", "dtype",
    "sha256"}}, functions and other objects {"object": "module.qualname"}, dataclasses {"object": ..., "fields": {...}}:
    see reproducible().
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
        fields = {entry.name: plain(getattr(value, entry.name)) for entry in dataclasses.fields(value) if entry.init}
        return {"object": _qualname(value), "fields": fields}
    return {"object": _qualname(value)}


def reproducible(parameters: Mapping[str, Plain], info: Mapping[str, Plain] | None = None) -> bool:
    """False if a value stands for a tensor or an object that the file does not contain, or if `info` says that the run
    was stopped early or its model's weights were changed.
    """
    odd = not info or not info.keys() & {"stopped_after", "changed_weights"}
    return odd and not any(_marked(value) for value in parameters.values())


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
    """A fingerprint: equal for equal shape, dtype and bytes, for tensors and arrays alike."""
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


def _strict(value: object) -> object:
    """Write nan and inf, which JSON lacks, as {"float": "nan"}."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    return [_strict(item) for item in value] if isinstance(value, list) else value
