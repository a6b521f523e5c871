"""CLIP's image encoder out of its files. Importing transformers costs seconds: only where needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from ..checks import choice, number, whole
from ..networks.text import ACTIVATIONS
from .files import Stored, check_finite, read_tensors
from .state import check_state

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

PREFIX = "vision_model."  # every key of a weight file carries it, if none of transformers >= 5.6 wrote it
# Each size with its default: transformers writes what differs from them, and in older configs all.
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

    One ValueError names every missing, unexpected and misshapen key; others, a bad config or vectors not finite.
    """
    model = _empty_model(config)
    own = PREFIX if next(iter(model.state_dict())).startswith(PREFIX) else ""
    shapes = {PREFIX + key.removeprefix(own): value.shape for key, value in model.state_dict().items()}
    found = {PREFIX + k.removeprefix(PREFIX): v for k, v in tensors.items() if not k.endswith("position_ids")}
    check_state("image encoder", shapes, found)
    state = read_tensors(found, shapes, dtype, device)
    check_finite(state)
    model.load_state_dict({own + key.removeprefix(PREFIX): value for key, value in state.items()}, assign=True)
    embeddings, count = (
        model.get_submodule(f"{own}embeddings"),
        len(state[f"{PREFIX}embeddings.position_embedding.weight"]),
    )
    positions = torch.arange(count, device=device)[None]
    embeddings.register_buffer("position_ids", positions, persistent=False)  # was on the meta device
    model.eval()  # type: ignore[no-untyped-call, unused-ignore]
    return model.requires_grad_(False)


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
