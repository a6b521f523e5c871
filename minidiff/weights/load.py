"""load(): a model from the hub, a folder or a single file. Built on the meta device, then filled strictly: every weight
assigned, none left over."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from ..model import Defaults, Model
from ..networks.text import text_encoder_shapes
from ..networks.unet import UNet
from ..networks.vae import VAE
from ..request import BUNDLED
from ..sampling import NoiseSchedule
from ..speed.accelerate import compile_unet, prepare
from ..speed.device import choose_device, choose_dtype, dtype_choice, is_int8
from ..speed.int8 import to_int8
from .files import Stored, check_finite, read_tensors, stored_tensors
from .hub import fetch_tokenizer, fetch_vae
from .lora import LoRA, read_loras, with_loras
from .names import unwrap
from .open import local_path, open_source
from .safety import find_safety, load_safety
from .sources import (
    Source,
    VAESource,
    check_fit,
    file_scheduler,
    file_source,
    folder_source,
    vae_from_file,
    vae_from_folder,
    weight_file,
)
from .state import check_state
from .text import load_text_encoder
from .words import find_embedding, with_words

Network = TypeVar("Network", bound=nn.Module)
Config = TypeVar("Config")


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
    device: None means CUDA if available, else the CPU.
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
    for file in (words or {}).values():
        find_embedding(file)  # a wrong file is reported before the model is read
    read_loras(loras)  # a wrong one need not wait for the model
    device = choose_device(device)
    int8 = is_int8(dtype, device)
    why, dtype = dtype_choice(dtype, device), choose_dtype(dtype, device)
    found = _find(source, tokenizer, None if vae is None else _vae(vae, variant), variant, revision)
    checker = find_safety(safety, source, found.path, variant, revision)
    # StableDiffusionPipeline always uses 1, as in SD 1's training, whatever the file says; equal images need the same.
    noise = replace(NoiseSchedule.from_config(found.scheduler), steps_offset=1)
    if prediction_type is not None:
        noise = replace(noise, prediction_type=prediction_type)
    unet, autoencoder = _empty(UNet, found.unet), _empty(VAE, found.vae.config)
    text_shapes = text_encoder_shapes(found.text)
    _check_states(
        ("UNet", _shapes(unet), found.unet_tensors),
        ("autoencoder", _shapes(autoencoder), found.vae.tensors),
        ("text encoder", text_shapes, found.text_tensors),
    )
    text_tensors = read_tensors(found.text_tensors, text_shapes, dtype, device)
    check_finite(text_tensors)
    text = load_text_encoder(found.text, text_tensors, found.tokenizer)
    check_fit(found, text.length, text.width)
    _fill(unet, found.unet_tensors, dtype, device)
    _fill(autoencoder, found.vae.tensors, dtype, device)
    if int8:
        to_int8(unet)
    given = {
        "vae": vae,
        "tokenizer": tokenizer,
        "prediction_type": prediction_type,
        "variant": variant,
        "revision": revision,
    }
    model = Model(
        name=found.name,
        origin=found.path,
        unet=compile_unet(unet) if compile else prepare(unet),
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


def _find(
    source: str | Path, tokenizer: str | Path | None, vae: VAESource | None, variant: str | None, revision: str | None
) -> Source:
    folder = None if tokenizer is None else Path(tokenizer).expanduser()
    path, name = open_source(source, variant, revision, vae=vae is None, tokenizer=folder is None)
    if path.is_dir():
        return folder_source(path, name, variant, folder, vae)
    tensors = unwrap(stored_tensors(path))  # report a bad file before looking for the tokenizer
    return file_source(path, tensors, folder or fetch_tokenizer, vae, file_scheduler(path, tensors))


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


def _empty(kind: Callable[[Config], Network], config: Config) -> Network:
    """The network on the meta device, without memory for its weights."""
    try:
        with torch.device("meta"):
            return kind(config)
    except RuntimeError as error:  # torch's error for sizes beyond any memory
        raise ValueError(f"a network of these sizes cannot be built: {config}: {error}") from error


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in network.state_dict().items()}


def _check_states(*networks: tuple[str, Mapping[str, torch.Size], Mapping[str, Stored]]) -> None:
    """One error for all networks, before any weight is read."""
    problems = []
    for name, shapes, tensors in networks:
        try:
            check_state(name, shapes, tensors)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))


def _fill(network: nn.Module, tensors: Mapping[str, Stored], dtype: torch.dtype, device: torch.device) -> None:
    state = read_tensors(tensors, _shapes(network), dtype, device)
    check_finite(state)
    network.load_state_dict(state, strict=True, assign=True)
    network.eval().requires_grad_(False)
