"""Load CLIP's image encoder. Importing transformers takes seconds, so it is imported only when needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..checks import choice, number, numbers, shown, whole
from ..image_adapter import ImageEncoder
from ..networks.text import ACTIVATIONS
from ..pictures import CLIP_MEAN, CLIP_STD
from .files import Stored, read_tensors, read_weights
from .hub import fetch_image_encoder
from .open import local_path
from .sources import folder_tensors, read_json
from .state import check_state

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

PREFIX = "vision_model."  # of every key of a weight file, unless transformers >= 5.6 wrote it
# Each size with its default: transformers writes only those that differ, older versions all.
_SIZES = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}


def load_vision(
    config: Mapping[str, object], tensors: Mapping[str, Stored], dtype: torch.dtype, device: torch.device
) -> CLIPVisionModel:
    """A frozen CLIPVisionModel from its config (a CLIP's `vision_config`) and its tensors, with or without the prefix
    "vision_model."; position_ids are ignored.

    One ValueError names all missing, unexpected and misshapen keys; others report a bad config or NaN and infinity.
    """
    model = _empty_model(config)
    own = PREFIX if next(iter(model.state_dict())).startswith(PREFIX) else ""
    shapes = {PREFIX + key.removeprefix(own): value.shape for key, value in model.state_dict().items()}
    found = {PREFIX + k.removeprefix(PREFIX): v for k, v in tensors.items() if not k.endswith("position_ids")}
    check_state("image encoder", shapes, found)
    state = read_weights(found, shapes, dtype, device)
    model.load_state_dict({own + key.removeprefix(PREFIX): value for key, value in state.items()}, assign=True)
    embeddings, count = (
        model.get_submodule(f"{own}embeddings"),
        len(state[f"{PREFIX}embeddings.position_embedding.weight"]),
    )
    positions = torch.arange(count, device=device)[None]
    embeddings.register_buffer("position_ids", positions, persistent=False)  # was on the meta device
    model.eval()  # type: ignore[no-untyped-call, unused-ignore]
    return model.requires_grad_(False)


def load_image_encoder(source: str | Path, dtype: torch.dtype, device: torch.device) -> ImageEncoder:
    """An ImageEncoder from a folder or a hub id. ValueError if something does not fit."""
    if not isinstance(source, str | Path) or source == "":
        raise ValueError(f"image_encoder is {shown(source)}; expected the folder of a CLIP vision model, or a hub id")
    folder = local_path(source) or fetch_image_encoder(str(source))
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{path} is not there; expected the folder of a CLIP vision model, such as h94/IP-Adapter/models/"
            "image_encoder"
        )
    config = read_json(path)
    config = config.get("vision_config", config)  # type: ignore[assignment]  # of a whole CLIP
    if not isinstance(config, dict) or config.get("model_type") != "clip_vision_model":
        raise ValueError(f"{path}: model_type is not 'clip_vision_model'; expected the config of a CLIP vision model")
    tensors = folder_tensors(folder, "model", None)
    vision = load_vision(config, {k: v for k, v in tensors.items() if k.startswith(PREFIX)}, dtype, device)
    key = "visual_projection.weight"
    last = {name: tensor for name, tensor in tensors.items() if name == key}
    rows = last[key].shape[0] if key in last and last[key].shape else 1024
    shapes = {key: torch.Size((rows, vision.config.hidden_size))}
    check_state("image encoder", shapes, last)
    edge = int(vision.config.image_size)  # type: ignore[arg-type, unused-ignore]
    there = (folder / "preprocessor_config.json").is_file()  # h94/IP-Adapter has none
    reading = read_preprocessor(folder) if there else (edge, CLIP_MEAN, CLIP_STD)
    if reading[0] != edge:
        raise ValueError(
            f"{folder}/preprocessor_config.json gives {reading[0]} pixels, the image encoder reads {edge}: they are "
            "from different models"
        )
    return ImageEncoder(vision, read_tensors(last, shapes, dtype, device)[key], *reading, str(source))


def read_preprocessor(folder: Path) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """(edge, mean, std) from preprocessor_config.json. ValueError unless it resizes, crops and scales as CLIP does."""
    path = folder / "preprocessor_config.json"
    config = read_json(path)
    size, crop = config.get("size", 224), config.get("crop_size", 224)
    edge = size.get("shortest_edge") if isinstance(size, dict) else size
    same = crop in (edge, {"height": edge, "width": edge})
    steps = ("do_resize", "do_center_crop", "do_normalize", "do_rescale")
    if not same or config.get("resample", 3) != 3 or not all(config.get(step, True) for step in steps):
        raise ValueError(
            f"{path}: size {shown(size)}, crop_size {shown(crop)}, resample {shown(config.get('resample', 3))}; "
            "expected CLIP's: the shorter edge resized (bicubic, 3), centre-cropped and normalised"
        )
    edge = whole(f"{path}: size", edge, 1, 2**14)
    mean, std = (
        numbers(f"{path}: {key}", config.get(key, default))
        for key, default in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD))
    )
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"{path}: image_mean {mean}, image_std {std}; expected three numbers each, image_std above 0")
    return edge, mean, std


def _empty_model(config: Mapping[str, object]) -> CLIPVisionModel:
    """The network without weights, on the meta device."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    where = "image encoder config"
    width, inner, layers, heads, edge, patch = (
        whole(f"{where}: {key}", config.get(key, default), 1, 200 if key == "num_hidden_layers" else 2**14)
        for key, default in _SIZES.items()
    )
    if width % heads or edge % patch:
        raise ValueError(
            f"{where}: hidden_size {width} must be a multiple of {heads} (heads), image_size {edge} of {patch} (patch)"
        )
    with torch.device("meta"):
        return CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=width,
                intermediate_size=inner,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                image_size=edge,
                patch_size=patch,
                hidden_act=choice(f"{where}: hidden_act", config.get("hidden_act", ACTIVATIONS[0]), ACTIVATIONS),
                layer_norm_eps=number(f"{where}: layer_norm_eps", config.get("layer_norm_eps", 1e-5), 0, 1),
            )
        )
