"""Fixtures for all tests: no network, few threads, and a tiny Stable Diffusion 1.x model."""

import os

# Set before the imports: huggingface_hub and torch read the environment when imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# Thread pools of several processes slow each other down on two cores: one thread each under pytest-xdist.
# Not setdefault, since workers inherit the value set here for the main process.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
else:
    os.environ.setdefault("OMP_NUM_THREADS", "2")

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import minidiff
from minidiff.networks.config import UNetConfig, VAEConfig
from minidiff.networks.text import text_encoder_shapes
from minidiff.networks.unet import UNet
from minidiff.networks.vae import VAE
from minidiff.shapes.folder import INDEX

TOKENIZER = Path(__file__).parent / "golden" / "tokenizer"
# A single file does not store numbers of heads and groups; it implies 8, 32 and CLIP heads of width 64.
UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.42.1",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [32, 64, 96],
    "center_input_sample": False,
    "cross_attention_dim": 64,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 8,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
}
VAE_CONFIG = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.42.1",
    "act_fn": "silu",
    "block_out_channels": [32, 64, 96],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}
TEXT = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 64,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 256,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 1,
    "num_hidden_layers": 3,
    "pad_token_id": 1,
    "projection_dim": 64,
    "torch_dtype": "float32",
    "vocab_size": 49408,
}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _on_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests compare with float32 on the CPU, on machines with a card too, but for those marked `card`."""
    if torch.cuda.is_available() and request.node.get_closest_marker("card") is None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for processes that a test starts


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run with one thread, for tests that compare small networks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion folder with small random float32 weights in the hub's layout: 32x32 pixels, latents 8x8.

    Read-only; tests that change something copy it first.
    """
    folder = tmp_path_factory.mktemp("models") / "tiny"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        _write(folder / "unet", UNET, "diffusion_pytorch_model", _weights(UNet(UNetConfig.from_dict(UNET))))
        _write(folder / "vae", VAE_CONFIG, "diffusion_pytorch_model", _weights(VAE(VAEConfig.from_dict(VAE_CONFIG))))
        _write(folder / "text_encoder", TEXT, "model", _text_weights())
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (folder / "model_index.json").write_text(json.dumps(dict(INDEX)))
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Path) -> minidiff.Model:
    """`tiny_folder`, loaded in float32 on the CPU."""
    return minidiff.load(tiny_folder, dtype="float32", device="cpu")


def _write(folder: Path, config: dict, base: str, weights: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / f"{base}.safetensors", metadata={"format": "pt"})


def _weights(network: nn.Module) -> dict[str, Tensor]:
    """torch's own initialisation, with norms that are not the identity, so that swapped names have an effect."""
    weights = {}
    for key, value in network.state_dict().items():
        norm = "norm" in key.split(".")[-2]
        weights[key] = value + 0.1 * torch.randn(value.shape) if norm else value
    return weights


def _text_weights() -> dict[str, Tensor]:
    weights = {}
    for key, shape in text_encoder_shapes(TEXT).items():
        if "norm" in key:
            weights[key] = float(key.endswith("weight")) + 0.1 * torch.randn(shape)
        else:
            weights[key] = torch.randn(shape) * (0.5 if "embedding" in key else 0.1)
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return weights
