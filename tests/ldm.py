"""Writes a model folder's weights as one file in the names of Stable Diffusion's original code: the inverse of the
tables in minidiff/weights/names.py, and what else a file of 2022 holds."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minidiff.weights.names import LDM_PREFIX, VAE_OLD_ATTENTION, invert, rename, unet_ldm, vae_ldm

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

    vae: False leaves the autoencoder out. text_prefix: "" as in some merged files. flat_vae_attention: its linear layers
    as [C,C], where the original code has convolutions [C,C,1,1]. dtype: of the networks' weights. more: other tensors.
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
    """The weights of the folder's three networks by the names of a single file."""
    layers = _json(folder / "unet" / "config.json")["layers_per_block"]
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    table = invert(unet_ldm(len(_json(folder / "unet" / "config.json")["block_out_channels"]), layers), unet)
    tensors = {LDM_PREFIX["unet"] + rename(key, table): value for key, value in unet.items()}
    tensors |= {LDM_PREFIX["vae"] + key: value for key, value in ldm_vae(folder / "vae", flat_vae_attention).items()}
    text = load_file(folder / "text_encoder" / "model.safetensors")
    return tensors | {
        LDM_PREFIX["text_encoder"] + key: value for key, value in text.items() if not key.endswith("position_ids")
    }


def ldm_vae(folder: Path, flat_attention: bool = False) -> dict[str, Tensor]:
    """The weights of an autoencoder's folder by the names of a file of its own."""
    config = _json(folder / "config.json")
    vae = load_file(folder / "diffusion_pytorch_model.safetensors")
    vae = {rename(key, VAE_OLD_ATTENTION): value for key, value in vae.items()}
    table = invert(vae_ldm(len(config["block_out_channels"]), config["layers_per_block"]), vae)
    renamed = {}
    for key, value in vae.items():
        convolution = ".mid_block.attentions." in key and value.ndim == 2 and not flat_attention
        renamed[rename(key, table)] = value[:, :, None, None] if convolution else value
    return renamed


def _json(path: Path) -> dict:
    return json.loads(path.read_text())
