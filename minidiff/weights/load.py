"""load(): a model from the hub, a folder or a single file. On the meta device first, then every weight assigned, none left over."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..accelerate import compile_unet
from ..model import Defaults, Model
from ..networks.config import check_state
from ..networks.text import load_text_encoder, text_encoder_shapes
from ..networks.unet import UNet
from ..networks.vae import VAE
from ..sampling.schedule import NoiseSchedule
from .files import PICKLES, Stored, read_tensors, stored_tensors
from .hub import fetch_model, fetch_tokenizer, fetch_vae
from .sources import Source, VAESource, file_source, folder_source, vae_from_file, vae_from_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Network = TypeVar("Network", bound=nn.Module)
Config = TypeVar("Config")


def load(
    source: str | Path,
    *,
    tokenizer: str | Path | None = None,
    vae: str | Path | None = None,
    prediction_type: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    compile: bool = False,
) -> Model:
    """Load a Stable Diffusion 1.x model from safetensors; pickles are refused.

    source: a hub id ("stable-diffusion-v1-5/stable-diffusion-v1-5"), a folder in that format, or a single .safetensors file in LDM names.
    tokenizer: a folder with CLIP's tokenizer; a single file carries none, and without this argument it comes from the hub's cache.
    vae: another autoencoder: a hub id, a folder or a .safetensors file.
    prediction_type: "epsilon" or "v_prediction", where the source's scheduler config is silent or wrong (a single file always means epsilon).
    dtype: what the networks compute in: a torch dtype or "float32", "bfloat16", "float16". None chooses bfloat16 on a CPU with
        instructions for it, float16 on CUDA, else float32.
    device: None is CUDA where there is one, else the CPU.
    variant: of a folder's or the hub's files, such as "fp16" for model.fp16.safetensors. revision: of the hub's repository.
    compile: run the UNet through torch.compile; the first step of each kind then takes up to minutes.

    Raises ValueError that says what is wrong with the source: missing, unexpected and misshapen keys by name, another kind of model,
    a damaged file, an unknown hub id, a model that is neither here nor reachable.
    """
    device = _device(device)
    dtype = _dtype(dtype, device)
    found = _find(source, tokenizer, None if vae is None else _vae(vae, variant), variant, revision)
    # StableDiffusionPipeline takes 1 whatever the file says, since SD 1 was trained so; the same images need the same.
    noise = replace(NoiseSchedule.from_config(found.scheduler), steps_offset=1)
    if prediction_type is not None:
        noise = replace(noise, prediction_type=prediction_type)
    text_shapes = text_encoder_shapes(found.text)
    unet = _network(UNet, found.unet, "UNet", found.unet_tensors, dtype, device)
    autoencoder = _network(VAE, found.vae.config, "autoencoder", found.vae.tensors, dtype, device)
    text_tensors = _read("text encoder", found.text_tensors, text_shapes, dtype, device)
    text = load_text_encoder(found.text, text_tensors, found.tokenizer)
    _check_fit(found, text.length, text.width)
    given = {
        "vae": vae,
        "tokenizer": tokenizer,
        "prediction_type": prediction_type,
        "variant": variant,
        "revision": revision,
    }
    return Model(
        name=found.name,
        origin=found.path,
        unet=compile_unet(unet) if compile else unet,
        vae=autoencoder,
        text=text,
        noise=noise,
        defaults=Defaults.from_config(found.scheduler),
        # A path on this machine means nothing elsewhere: its last part is kept.
        options={
            key: Path(value).name if Path(value).exists() else str(value)
            for key, value in given.items()
            if value is not None
        },
    )


def _find(
    source: str | Path, tokenizer: str | Path | None, vae: VAESource | None, variant: str | None, revision: str | None
) -> Source:
    path, folder = Path(source), None if tokenizer is None else Path(tokenizer)
    if path.is_dir():
        return folder_source(path, path.resolve().name, variant, folder, vae)
    if path.is_file() or path.suffix.lower() in (".safetensors", *PICKLES):
        tensors = stored_tensors(path)  # a bad file is named before the tokenizer is looked for
        return file_source(path, tensors, folder or fetch_tokenizer, vae)
    if isinstance(source, Path):
        raise ValueError(f"{source} is not there; expected a model folder or a .safetensors file")
    return folder_source(fetch_model(source, revision, variant), source, variant, folder, vae)


def _vae(source: str | Path, variant: str | None) -> VAESource:
    path = Path(source)
    if path.is_dir():
        return vae_from_folder(path / "vae" if (path / "vae").is_dir() else path, variant)
    if path.is_file() or path.suffix.lower() in (".safetensors", *PICKLES):
        return vae_from_file(path)
    return vae_from_folder(fetch_vae(str(source), variant), variant)


def _network(
    kind: Callable[[Config], Network],
    config: Config,
    name: str,
    tensors: Mapping[str, Stored],
    dtype: torch.dtype,
    device: torch.device,
) -> Network:
    with torch.device("meta"):
        network = kind(config)
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    network.load_state_dict(_read(name, tensors, shapes, dtype, device), strict=True, assign=True)
    return network.eval().requires_grad_(False)


def _read(
    name: str, tensors: Mapping[str, Stored], shapes: Mapping[str, torch.Size], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    check_state(name, shapes, tensors)
    return read_tensors(tensors, shapes, dtype, device)


def _check_fit(found: Source, length: int, width: int) -> None:
    """The parts of a model must fit each other, also where one was exchanged."""
    if found.unet.cross_attention_dim != width:
        raise ValueError(
            f"the UNet reads text {found.unet.cross_attention_dim} wide, the text encoder gives {width}: they are of different models"
        )
    if found.unet.in_channels != found.vae.config.latent_channels:
        raise ValueError(
            f"the UNet works on {found.unet.in_channels} channels, the autoencoder on {found.vae.config.latent_channels}: they are of different models"
        )
    if length < 3:
        raise ValueError(
            f"the tokenizer allows {length} tokens, which leaves no room for a word; see model_max_length in tokenizer_config.json"
        )


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # torch raises either, by the kind of device
        raise ValueError(
            f'device {str(device)!r} cannot be used: {str(error).splitlines()[0]}. Expected such as "cpu" or "cuda"'
        ) from error
    return chosen


def _dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    fast_bf16 = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    if dtype is None:
        return torch.bfloat16 if fast_bf16 else torch.float16 if device.type == "cuda" else torch.float32
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r} is unknown; expected one of {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    if dtype not in DTYPES.values():
        raise ValueError(
            f"dtype {dtype} is not supported; expected one of {', '.join(sorted(set(map(str, DTYPES.values()))))}"
        )
    if dtype == torch.float16 and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        instead = torch.bfloat16 if fast_bf16 else torch.float32
        # Without kernels a float16 matrix product runs a thousand times slower than a float32 one.
        warnings.warn(
            f"this CPU has no float16 kernels; computing in {str(instead).removeprefix('torch.')}", stacklevel=3
        )
        return instead
    return dtype
