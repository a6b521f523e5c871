"""with_image_prompt(): add an IP-Adapter to a model, to prompt it with pictures as well as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import nn

from ..checks import not_finite, shown
from ..image_adapter import ImageAdapter, ImageEncoder
from ..model import Adapter, Model
from ..networks.image_prompt import AnyProjection, Shapes, image_projection
from ..networks.sites import Site
from ..networks.unet import UNet
from ..speed.replace import with_modules
from ..vocabulary import own_keywords
from .files import Stored, read_tensors, sha256, stored_tensors
from .recognise import recognise
from .state import check_state
from .vision import load_image_encoder

_PARTS = ("image_proj.", "ip_adapter.")
_FACES = ("perceiver_resampler.", "to_k_lora.", "to_q_lora.")
"""Parts of tensor names that only FaceID adapters have."""


@own_keywords
def with_image_prompt(model: Model, file: str | Path, image_encoder: str | Path) -> Model:
    """The model with an IP-Adapter; it shares everything else with the old model, which does not change.

    generate's `image_prompt` then takes a picture. Call again to add another adapter; adapters count from 0.

    file: a .safetensors file as published for SD 1.5: the plain one, "plus" and "plus face" (with a resampler), "full
        face" or "light". image_encoder: the CLIP vision model that it was trained with, a folder with config.json and
        model.safetensors (and preprocessor_config.json, if it is not CLIP's usual one), or a hub id, optionally with
        a folder in it: "h94/IP-Adapter/models/image_encoder".
    Source: Ye et al. 2023, IP-Adapter. ValueError if the file is another kind of adapter, or one of the two does not
    fit.
    """
    if not isinstance(model, Model):
        raise ValueError(f"model is {shown(model)}; expected a Model from minidiff.load")
    path, stored = find_image_adapter(file)
    try:
        adapter = _empty(model.unet, stored)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    projection = cast("AnyProjection", adapter["image_proj"])
    encoder = _encoder(model, image_encoder, path, projection)
    _fill(adapter, path, stored, model)
    return replace(
        model,
        unet=_grown(model.unet, cast("nn.ModuleDict", adapter["ip_adapter"])),
        image_adapters=(*model.image_adapters, ImageAdapter(projection, encoder)),
        adapters=(*model.adapters, Adapter("image prompt", path.stem, path.name, sha256(path))),
    )


def find_image_adapter(file: str | Path) -> tuple[Path, dict[str, Stored]]:
    """An IP-Adapter's file and its tensors, from the header alone. ValueError for another kind of file."""
    if not isinstance(file, str | Path):
        raise ValueError(f"file is {shown(file)}; expected the path of an IP-Adapter's .safetensors file")
    path = Path(file).expanduser()
    stored = stored_tensors(path)
    own = {key.removeprefix(_PARTS[0]) for key in stored if key.startswith(_PARTS[0])}
    if not any(key.startswith(_PARTS) for key in stored):
        kind = recognise({key: tensor.shape for key, tensor in stored.items()}).name
        raise ValueError(f"{path} is not an IP-Adapter; by its tensors, it is: {kind}")
    if any(mark in key for key in stored for mark in _FACES) or {"proj.0.weight", "norm.weight"} <= own:
        raise ValueError(
            f"{path} is a FaceID adapter, which reads a face recogniser's features; expected one that reads pictures, "
            "such as ip-adapter-plus-face_sd15.safetensors"
        )
    return path, stored


def image_adapter_summary(path: Path) -> dict[str, object]:
    """What `minidiff info` says of a file, from its header alone. ValueError as from with_image_prompt."""
    _, stored = find_image_adapter(path)
    shapes = {key: tensor.shape for key, tensor in stored.items()}
    width = _width(shapes, 768)
    with torch.device("meta"):
        projection = _projection(_own(shapes), width)
    read = "a picture's embedding" if projection.reads == "embedding" else "a picture's patches"
    return {
        "projection": projection.kind,
        "reads": f"{read}, {projection.inputs} wide",
        "tokens": projection.tokens or "one per patch",
        "width": width,
        "layers": sum(key.endswith(".to_k_ip.weight") for key in shapes),
    }


def _own(shapes: Shapes) -> Shapes:
    """Those of the projection, without their prefix."""
    return {key.removeprefix(_PARTS[0]): shape for key, shape in shapes.items() if key.startswith(_PARTS[0])}


def _width(shapes: Shapes, default: int) -> int:
    """Of the tokens, which the keys and values read."""
    widths = (shape[1] for key, shape in shapes.items() if key.endswith(".to_k_ip.weight") and len(shape) == 2)
    return next(widths, default)


def _encoder(model: Model, source: str | Path, path: Path, projection: AnyProjection) -> ImageEncoder:
    """The vision model, shared with an earlier adapter if it is the same."""
    there = (one.encoder for one in model.image_adapters if one.encoder.origin == str(source))
    encoder = next(there, None) or load_image_encoder(source, model.dtype, model.device)
    kind, axis = ("projection_dim", 0) if projection.reads == "embedding" else ("hidden_size", 1)
    width = encoder.projection.shape[axis]
    if width != projection.inputs:
        raise ValueError(
            f"{path} was trained with a vision model whose {kind} is {projection.inputs}, that of {source} is {width}; "
            "expected the one it was trained with (h94/IP-Adapter/models/image_encoder, except for vit-G files)"
        )
    return encoder


def _fill(adapter: nn.ModuleDict, path: Path, stored: Mapping[str, Stored], model: Model) -> None:
    shapes = {key: value.shape for key, value in adapter.state_dict().items()}
    state = read_tensors(stored, shapes, model.dtype, model.device)
    bad = not_finite(state)
    if bad:
        raise ValueError(
            f"{path}: weights are not finite (NaN or infinity) in {str(model.dtype)[6:]}: {', '.join(bad[:5])}"
            f"{' ...' if len(bad) > 5 else ''}; take another file of it"
        )
    adapter.load_state_dict(state, strict=True, assign=True)
    adapter.eval().requires_grad_(False)


def _grown(unet: UNet, layers: nn.ModuleDict) -> UNet:
    """The UNet with another pair of layers in each cross-attention."""
    modules: dict[str, nn.Module] = {}
    for site, pair in zip(_sites(unet), layers.values(), strict=True):
        for name, layer in cast("nn.ModuleDict", pair).items():
            path = f"{site.key}.{name}"
            modules[path] = nn.ModuleList([*cast("nn.ModuleList", unet.get_submodule(path)), layer])
    return with_modules(unet, modules)


def _empty(unet: UNet, stored: Mapping[str, Stored]) -> nn.ModuleDict:
    """An IP-Adapter on the meta device, named as in the file, after checking that all names and shapes fit."""
    shapes = {key: tensor.shape for key, tensor in stored.items()}
    width = unet.config.cross_attention_dim
    theirs = _width(shapes, width)
    if theirs != width:
        of = {2048: " of Stable Diffusion XL", 1024: " of Stable Diffusion 2"}.get(theirs, "")
        raise ValueError(
            f"this adapter{of} makes tokens {theirs} wide, and the model's are {width}; expected one of SD 1.5"
        )
    with torch.device("meta"):
        adapter = nn.ModuleDict({"image_proj": _projection(_own(shapes), width), "ip_adapter": key_value_layers(unet)})
    check_state("adapter", {key: tuple(value.shape) for key, value in adapter.state_dict().items()}, stored)
    return adapter


def _projection(shapes: Shapes, width: int) -> AnyProjection:
    try:
        found = image_projection(shapes, width)
    except KeyError as error:
        raise ValueError(f"image_proj.{error.args[0]} is missing; download the file again") from error
    except (ValueError, IndexError) as error:
        raise ValueError(f"the sizes of image_proj make no sense: {error}") from error
    if found is None:
        raise ValueError(
            f"image_proj holds {', '.join(list(shapes)[:3]) or 'nothing'}; expected proj.weight (plain), latents "
            "(plus) or proj.3.weight (full)"
        )
    return found


def _sites(unet: UNet) -> list[Site]:
    """The cross-attention layers in the file's order: the mid block's comes last."""
    last = [site for site in unet.sites if site.place == "mid"]
    return [site for site in [*(site for site in unet.sites if site.place != "mid"), *last] if site.kind == "cross"]


def key_value_layers(unet: UNet) -> nn.ModuleDict:
    """Keys and values of each cross-attention, by the file's number: 1, 3, 5, ..., as it counts self-attention too."""
    width = unet.config.cross_attention_dim
    found = nn.ModuleDict()
    for i, site in enumerate(_sites(unet)):
        channels = len(unet.get_parameter(f"{site.key}.to_out.0.bias"))
        found[str(2 * i + 1)] = nn.ModuleDict(
            {name: nn.Linear(width, channels, bias=False) for name in ("to_k_ip", "to_v_ip")}
        )
    return found
