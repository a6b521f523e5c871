"""Models for benchmarks: small and full-size configs, random weights, and folders that both implementations load."""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from minidiff.networks.config import UNetConfig, VAEConfig
from minidiff.networks.text import text_encoder_shapes
from minidiff.networks.unet import UNet
from minidiff.networks.vae import VAE
from minidiff.sampling import SD15_SCHEDULER_CONFIG
from minidiff.shapes.folder import INDEX

Config = Mapping[str, object]
Shapes = Mapping[str, torch.Size]
TOKENIZER = Path(__file__).parents[1] / "tests" / "golden" / "tokenizer"
CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")


@dataclass(frozen=True)
class Size:
    """The configs of a model's three networks, as in its folder."""

    unet: Config
    vae: Config
    text: Config


def unet_dict(
    widths: list[int],
    attention: list[bool],
    *,
    heads: int | list[int] = 8,
    context: int = 64,
    groups: int = 32,
    layers: int | list[int] = 2,
    linear: bool = False,
    sample_size: int = 16,
) -> Config:
    """A unet/config.json. attention: which levels have transformers, outermost first."""
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.42.1",
        "act_fn": "silu",
        "attention_head_dim": heads,
        "block_out_channels": widths,
        "center_input_sample": False,
        "cross_attention_dim": context,
        "down_block_types": [CROSS[0] if has else PLAIN[0] for has in attention],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": layers,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": groups,
        "out_channels": 4,
        "sample_size": sample_size,
        "up_block_types": [CROSS[1] if has else PLAIN[1] for has in reversed(attention)],
        "use_linear_projection": linear,
    }


def vae_dict(widths: list[int], *, layers: int = 2, groups: int = 32) -> Config:
    """A vae/config.json."""
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.42.1",
        "act_fn": "silu",
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": layers,
        "norm_num_groups": groups,
        "out_channels": 3,
        "sample_size": 512,
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    }


def text_dict(width: int, inner: int, layers: int, heads: int) -> Config:
    """A text_encoder/config.json, with the hub file's unusual token ids."""
    return {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": width,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": inner,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "pad_token_id": 1,
        "projection_dim": width,
        "torch_dtype": "float32",
        "vocab_size": 49408,
    }


TINY = Size(
    unet_dict([32, 64, 96], [True, True, False]),
    vae_dict([32, 64, 96]),
    text_dict(64, 256, 3, 4),
)
SD15 = Size(
    unet_dict([320, 640, 1280, 1280], [True, True, True, False], context=768, sample_size=64),
    vae_dict([128, 256, 512, 512]),
    text_dict(768, 3072, 12, 12),
)


def unet_shapes(config: Config) -> Shapes:
    """Shapes of the UNet's weights by their names in the folder format."""
    with torch.device("meta"):
        return {key: value.shape for key, value in UNet(UNetConfig.from_dict(config)).state_dict().items()}


def vae_shapes(config: Config) -> Shapes:
    """Shapes of the autoencoder's weights by their names in the folder format."""
    with torch.device("meta"):
        return {key: value.shape for key, value in VAE(VAEConfig.from_dict(config)).state_dict().items()}


def random_weights(
    shapes: Shapes, seed: int = 0, dtype: torch.dtype = torch.float32, gains: Mapping[str, float] | None = None
) -> dict[str, Tensor]:
    """torch's default initialisation, uniform within 1 / sqrt(inputs), from one generator (860 M numbers take 4 s).

    Norms are close to 1 and 0 but not equal, so that swapped names have an effect. gains: part of a key -> factor, to
    increase the influence of those weights.
    """
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for key, shape in shapes.items():
        norm, weight = "norm" in key.split(".")[-2], key.endswith("weight")
        reach = 0.1 if norm or not weight else 1 / math.sqrt(shape[1:].numel())
        reach *= math.prod(gain for part, gain in (gains or {}).items() if part in key)
        value = torch.empty(shape).uniform_(-reach, reach, generator=generator)
        weights[key] = (value + 1 if norm and weight else value).to(dtype)
    return weights


def write_folder(folder: Path, size: Size, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """Write a Stable Diffusion folder with random weights in the hub's layout, and return its path.

    Cross-attention weights are scaled up: with default initialisation the text has no effect on the pixels.
    """
    loud = {"attn2.to_k.weight": 3.0, "attn2.to_v.weight": 6.0, "attn2.to_q.weight": 3.0}
    _write(folder / "unet", size.unet, "diffusion_pytorch_model", unet_shapes(size.unet), dtype, seed, loud)
    _write(folder / "vae", size.vae, "diffusion_pytorch_model", vae_shapes(size.vae), dtype, seed + 1)
    _write(folder / "text_encoder", size.text, "model", text_encoder_shapes(size.text), dtype, seed + 2)
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(dict(SD15_SCHEDULER_CONFIG), indent=1))
    (folder / "model_index.json").write_text(json.dumps(dict(INDEX), indent=1))
    return folder


def _write(
    folder: Path,
    config: Config,
    base: str,
    shapes: Shapes,
    dtype: torch.dtype,
    seed: int,
    gains: Mapping[str, float] | None = None,
) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=1))
    weights = random_weights(shapes, seed, dtype, gains)
    if base == "model":
        weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]  # as in the hub's file
    save_file(weights, folder / f"{base}.safetensors", metadata={"format": "pt"})
