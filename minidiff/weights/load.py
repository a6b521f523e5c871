"""load(): a model from the hub, a folder or a single file. Built on the meta device, then filled strictly: every weight
assigned, none left over."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from ..checks import Check, checked, choice, instance, switch, warn
from ..model import Defaults, Model
from ..networks.text import TextEncoder
from ..networks.unet import UNet
from ..networks.vae import VAE
from ..sampling import NoiseSchedule
from ..speed.accelerate import compile_unet, prepare, prepare_unet
from ..speed.device import choose_device, choose_dtype, dtype_choice, is_int8
from ..speed.int8 import to_int8
from ..vocabulary import BUNDLED, PREDICTION_TYPES, own_keywords
from .files import read_weights
from .hub import fetch_tokenizer, fetch_vae
from .lora import LoRA, read_loras, with_loras
from .open import Network, Source, local_path, open_source
from .safety import find_safety, load_safety
from .sources import VAESource, check_fit, some, vae_from_file, vae_from_folder, weight_file
from .text import load_text_encoder
from .words import find_embedding, with_words

_PATH: tuple[type, ...] = (str, Path)
_CHECKS: Mapping[str, Check] = MappingProxyType(
    {
        "tokenizer": partial(instance, of=_PATH, expected="the folder of a tokenizer"),
        "vae": partial(instance, of=_PATH, expected="a hub id, a folder or a .safetensors file"),
        "prediction_type": partial(choice, choices=PREDICTION_TYPES),
        "variant": partial(instance, of=str, expected='a text such as "fp16"'),
        "revision": partial(instance, of=str, expected="a text: a branch, tag or commit"),
        "compile": switch,
        "words": partial(instance, of=Mapping, expected="a mapping from words to files"),
    }
)
"""The options that are checked each by itself; what they lead to checks the others."""


@own_keywords
def load(
    source: str | Path = BUNDLED,
    *,
    tokenizer: str | Path | None = None,
    vae: str | Path | None = None,
    prediction_type: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    compile: bool = False,
    safety: bool | str | Path = False,
    words: Mapping[str, str | Path] | None = None,
    loras: Sequence[LoRA | str | Path] = (),
) -> Model:
    """Load a Stable Diffusion 1.x model from safetensors; pickles are refused.

    source: a hub id ("stable-diffusion-v1-5/stable-diffusion-v1-5"), a folder in that format, or a single .safetensors
        file with LDM names. Local paths take precedence over the hub. Default: the bundled model of coloured shapes,
        "minidiff/shapes".
    tokenizer: a folder with CLIP's tokenizer; single files have none, and without this argument it comes from the
        hub's cache.
    vae: another autoencoder: a hub id, a folder or a .safetensors file.
    prediction_type: "epsilon" or "v_prediction", if the source does not say or is wrong. A folder says it in its
        scheduler config; a single file in its tensors, its metadata or a .yaml next to it, else it is epsilon.
    dtype: the dtype of the networks: a torch dtype or "float32", "bfloat16", "float16". None chooses the fastest:
        float16 on CUDA, bfloat16 on a CPU where it is measured to be faster, else float32. "int8", on CPUs with VNNI
        instructions: the UNet's convolutions and linear layers compute in int8 (see speed/int8.py), all else in
        float32. Faster and less exact; adapters and compile=True work.
    device: None means CUDA if available, else the CPU. On CUDA, calls that come again are captured as graphs, so your
        own edits, keeps and objectives run twice and are then replayed: what they need must come through `inputs`.
    variant: variant of the files in a folder or on the hub, such as "fp16" for model.fp16.safetensors.
    revision: a branch, tag or commit of the hub's repository.
    compile: run the UNet and the guided objective through torch.compile. The first step of each kind (plain, recorded,
        guided; each batch and size) then waits for the compiler, for one to two minutes at SD 1.5's size; its cache
        reduces that to seconds in later processes.
    safety: True checks each finished picture with the safety checker in the folder or the hub's repository
        (safety_checker/, feature_extractor/); or a folder or hub id that has one. `Result.flagged` has the result; the
        pictures are not changed.
    words: {word: file} of textual inversion embeddings; see with_words.
    loras: files, or LoRA(file, weight), to merge into the model; see with_loras.

    Raises ValueError if the source cannot be loaded: missing, unexpected and misshapen keys (by name), another kind of
    model, a damaged file, an unknown hub id, a model that is neither local nor reachable.
    """
    given = {
        "vae": vae,
        "tokenizer": tokenizer,
        "prediction_type": prediction_type,
        "variant": variant,
        "revision": revision,
    }
    alone = {**given, "compile": compile, "words": words}
    checked({name: value for name, value in alone.items() if value is not None}, _CHECKS)
    for file in (words or {}).values():
        find_embedding(file)  # a wrong file is reported before the model is read
    read_loras(loras)  # a wrong one need not wait for the model
    device = choose_device(device)
    int8 = is_int8(dtype, device)
    why, dtype = dtype_choice(dtype, device), choose_dtype(dtype, device)
    own_tokenizer = None if tokenizer is None else Path(tokenizer).expanduser()
    own_vae = None if vae is None else _vae(vae, variant)
    found = open_source(source, variant, revision, vae=own_vae, tokenizer=own_tokenizer is None)
    found.refuse()
    if found.foreign:
        count = f"{len(found.foreign)} tensors that are not part of Stable Diffusion 1.x"
        warn(f"{found.path.name} holds {count}: {some(found.foreign)}")
    checker = find_safety(safety, source, found.path, variant, revision)
    # StableDiffusionPipeline always uses 1, as in SD 1's training, whatever the file says; equal images need the same.
    noise = NoiseSchedule.from_config({**found.scheduler, "steps_offset": 1})
    if prediction_type is not None:
        noise = replace(noise, prediction_type=prediction_type)
    unet, autoencoder, text = _networks(found, own_tokenizer, dtype, device)
    if int8:
        to_int8(unet)
    model = Model(
        name=found.name,
        origin=found.path,
        unet=compile_unet(unet) if compile else prepare_unet(unet),
        vae=prepare(autoencoder),
        text=text,
        noise=noise,
        defaults=Defaults.from_config(found.scheduler),
        # A local path means nothing on another machine: keep its last part.
        options={
            key: Path(value).absolute().name if Path(value).exists() else str(value)
            for key, value in given.items()
            if value is not None
        },
        dtype_choice=why,
        int8=int8,
        safety=None if checker is None else load_safety(checker, dtype, device),
    )
    model = with_loras(model, *loras) if loras else model
    return with_words(model, words) if words else model


def _vae(source: str | Path, variant: str | None) -> VAESource:
    """The autoencoder passed as vae=. `variant` is the model's; this one may lack it."""
    path = local_path(source)
    if path is None:
        folder = fetch_vae(str(source), variant)
    elif path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
    elif path.is_file() or path.suffix:
        return vae_from_file(path)
    else:
        raise ValueError(f"vae {source} is not there; expected an autoencoder's folder or .safetensors file")
    has = variant is not None and (folder / weight_file("diffusion_pytorch_model", variant)).is_file()
    return vae_from_folder(folder, variant if has else None)


def _networks(
    found: Source, tokenizer: Path | None, dtype: torch.dtype, device: torch.device
) -> tuple[UNet, VAE, TextEncoder]:
    """The networks of a source that was not refused, with their weights. ValueError if they do not fit each other."""
    unet, autoencoder, config = found.unet.made, found.vae.made, found.text.made
    assert unet is not None and autoencoder is not None and config is not None  # refused otherwise
    text_tensors = read_weights(found.text.tensors, found.text.shapes, dtype, device)
    # A bad file is reported before a tokenizer is looked for.
    folder = tokenizer or (found.path / "tokenizer" if found.path.is_dir() else fetch_tokenizer())
    text = load_text_encoder(config, text_tensors, folder)
    check_fit(unet.config, autoencoder.config, text.length, text.width)
    _fill(unet, found.unet, dtype, device)
    _fill(autoencoder, found.vae, dtype, device)
    return unet, autoencoder, text


def _fill(network: nn.Module, found: Network[Any], dtype: torch.dtype, device: torch.device) -> None:
    state = read_weights(found.tensors, found.shapes, dtype, device)
    network.load_state_dict(state, strict=True, assign=True)
    network.eval().requires_grad_(False)
