"""Stable Diffusion's original names: the inverse of the tables in minidiff/weights/names.py. Writes a model folder as
one file with these names, plus the other tensors that files of 2022 contain."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minidiff.networks.config import UNetConfig, VAEConfig
from minidiff.networks.text import text_encoder_shapes
from minidiff.networks.unet import UNet
from minidiff.networks.vae import VAE
from minidiff.weights.names import LDM_PREFIX, VAE_OLD_ATTENTION, invert, rename, unet_ldm, vae_ldm

SD15_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
SCHEDULE = (
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "betas",
    "log_one_minus_alphas_cumprod",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "posterior_variance",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
)


def unet_names(config: UNetConfig) -> dict[str, str]:
    """The keys of a UNet -> those in a single file."""
    with torch.device("meta"):
        keys = list(UNet(config).state_dict())
    table = invert(unet_ldm(len(config.block_out_channels), config.layers_per_block[0]), keys)
    return {key: LDM_PREFIX["unet"] + rename(key, table) for key in keys}


def vae_names(config: VAEConfig) -> dict[str, str]:
    """The keys of a VAE -> those in a single file."""
    with torch.device("meta"):
        keys = list(VAE(config).state_dict())
    table = invert(vae_ldm(len(config.block_out_channels), config.layers_per_block), keys)
    return {key: LDM_PREFIX["vae"] + rename(key, table) for key in keys}


def sd15_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes in v1-5-pruned-emaonly.safetensors by its keys, position_ids included: 686 + 248 + 197."""
    with torch.device("meta"):
        unet, vae = UNet(UNetConfig()), VAE(VAEConfig())
    names = unet_names(unet.config) | vae_names(vae.config)
    shapes = {names[key]: tuple(value.shape) for key, value in (unet.state_dict() | vae.state_dict()).items()}
    for key, shape in shapes.items():
        if ".mid.attn_1." in key and len(shape) == 2:
            shapes[key] = (*shape, 1, 1)
    text = {key: tuple(shape) for key, shape in text_encoder_shapes(SD15_TEXT).items()}
    text["text_model.embeddings.position_ids"] = (1, 77)
    return shapes | {LDM_PREFIX["text_encoder"] + key: shape for key, shape in text.items()}


def write_single_file(
    folder: Path,
    target: Path,
    *,
    vae: bool = True,
    text_prefix: str = "text_model.",
    flat_vae_attention: bool = False,
    dtype: torch.dtype | None = None,
    more: dict[str, Tensor] | None = None,
) -> Path:
    """Write `target` from `folder` (whose text file has the hub's keys) and return it.

    vae: False omits the autoencoder. text_prefix: "" as in some merged files. flat_vae_attention: [C,C] instead of the
    original code's convolutions [C,C,1,1]. dtype: of the networks' weights. more: additional tensors.
    """
    tensors = ldm_tensors(folder, flat_vae_attention)
    tensors = {key: value.to(dtype).contiguous() for key, value in tensors.items()}
    old, new = (LDM_PREFIX["text_encoder"] + prefix for prefix in ("text_model.", text_prefix))
    tensors = {key.replace(old, new): value for key, value in tensors.items()}
    tensors[f"{new}embeddings.position_ids"] = torch.arange(77)[None]
    if not vae:
        tensors = {key: value for key, value in tensors.items() if not key.startswith(LDM_PREFIX["vae"])}
    tensors |= {name: torch.zeros(1000) for name in SCHEDULE}
    tensors |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(470000)}
    save_file(tensors | (more or {}), target, metadata={"format": "pt"})
    return target


def ldm_tensors(folder: Path, flat_vae_attention: bool = False) -> dict[str, Tensor]:
    """The weights of the folder's three networks by their names in a single file."""
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    names = unet_names(UNetConfig.from_dict(_json(folder / "unet" / "config.json")))
    tensors = {names[key]: value for key, value in unet.items()}
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    names = vae_names(VAEConfig.from_dict(_json(folder / "vae" / "config.json")))
    for key, value in vae.items():
        key = rename(key, VAE_OLD_ATTENTION)
        convolution = ".mid_block.attentions." in key and value.ndim == 2 and not flat_vae_attention
        tensors[names[key]] = value[:, :, None, None] if convolution else value
    text = load_file(folder / "text_encoder" / "model.safetensors")
    return tensors | {
        LDM_PREFIX["text_encoder"] + key: value for key, value in text.items() if not key.endswith("position_ids")
    }


def _json(path: Path) -> dict:
    return json.loads(path.read_text())
