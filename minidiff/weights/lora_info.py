"""What a LoRA changes in a model of Stable Diffusion 1.5's sizes, for `minidiff info`: from its header and alphas."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..networks.config import UNetConfig
from ..networks.text import text_encoder_shapes
from ..networks.unet import UNet
from .files import Stored, read_tensors
from .lora import Change, read_changes, shapes_of
from .lora_names import TEXT, UNET
from .recognise import text_config

_MODEL = "Stable Diffusion 1.5"
_LAYERS = {f"text_model.encoder.layers.{n}.": (1,) for n in range(12)}


@dataclass(frozen=True)
class Changed:
    """What a file does to one network. `summary`: layers, format, rank, alpha in words."""

    network: str
    summary: dict[str, object]
    tensors: tuple[Stored, ...]


def lora_changes(path: Path) -> tuple[Changed, ...]:
    """What a file does to each network of Stable Diffusion 1.5. ValueError where it is not for that."""
    config = UNetConfig()
    with torch.device("meta"):
        unet = shapes_of(UNet(config))
    shapes = {UNET: unet, TEXT: text_encoder_shapes(text_config(_LAYERS))}
    changes = read_changes(path, shapes, config, model=_MODEL)
    return tuple(_changed(name, own) for name in shapes if (own := [c for c in changes if c.place[0] == name]))


def _changed(network: str, changes: list[Change]) -> Changed:
    formats = Counter(change.kind for change in changes)
    summary = {
        "layers": len({change.place[1].rpartition(".")[0] for change in changes}),
        "format": ", ".join(name if len(formats) == 1 else f"{count} {name}" for name, count in formats.items()),
        "rank": _range(change.rank for change in changes if change.rank is not None) or "none",
        "alpha": _range(alpha for change in changes if (alpha := _alpha(change)) is not None) or "as the rank",
        "fits": _MODEL,
    }
    return Changed(network, summary, tuple(stored for change in changes for stored in change.parts.values()))


def _alpha(change: Change) -> float | None:
    if change.rank is None or "alpha" not in change.parts:
        return None if change.alpha is None else round(change.alpha, 4)
    read = read_tensors({"": change.parts["alpha"]}, {"": torch.Size([])}, torch.float32, torch.device("cpu"))
    return read[""].item()


def _range(values: Iterable[float]) -> str:
    """Such as "4" or "4 to 64"; empty for none."""
    found = sorted(values)
    return "" if not found else " to ".join(f"{value:g}" for value in dict.fromkeys((found[0], found[-1])))
