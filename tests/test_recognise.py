"""weights/recognise.py: SD 1.x is recognised by its tensors, other models are named."""

import random
import re
from collections.abc import Callable

import pytest
import torch
from ldm import SD15_TEXT, sd15_shapes
from safetensors.torch import save_file

from minidiff.networks.config import UNetConfig, VAEConfig
from minidiff.networks.text import TextConfig
from minidiff.networks.unet import UNet
from minidiff.networks.vae import VAE
from minidiff.weights.files import Stored
from minidiff.weights.names import LDM_PREFIX, unwrap
from minidiff.weights.open import Source, read_file
from minidiff.weights.recognise import CHECKPOINT, Kind, recognise, unet_config, vae_config

Shapes = dict[str, tuple[int, ...]]
Opened = Callable[[Shapes], Source]
UNET = LDM_PREFIX["unet"]
CONV_IN = f"{UNET}input_blocks.0.0.weight"
WIDE_TEXT = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
CLIP = "text_model.embeddings.token_embedding.weight"


@pytest.fixture(scope="module")
def sd15() -> Shapes:
    return sd15_shapes()


def shapes_of(network: torch.nn.Module) -> Shapes:
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """Opens a file that claims to hold tensors of these shapes; no values are read."""
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    return lambda shapes: read_file(path, {key: Stored(path, key, shape, "F16") for key, shape in shapes.items()})


# ---- Stable Diffusion 1.x


def test_sd15_is_recognised_with_its_configs(sd15: Shapes, opened: Opened) -> None:
    assert recognise(sd15) == Kind(CHECKPOINT)
    source = opened(sd15)
    assert configs(source) == (UNetConfig(), VAEConfig())
    assert source.text.made == TextConfig.from_dict(SD15_TEXT)
    assert [len(network.tensors) for network in source.networks] == [686, 248, 196]
    source.refuse()


def configs(source: Source) -> tuple[UNetConfig, VAEConfig]:
    assert source.unet.made is not None and source.vae.made is not None
    return source.unet.made.config, source.vae.made.config


@pytest.mark.parametrize(
    "config",
    [
        UNetConfig(use_linear_projection=True),
        UNetConfig(block_out_channels=(64, 32, 96, 32), cross_attention_dim=512, in_channels=3, out_channels=6),
        UNetConfig(down_attention=(False, True, False, False), up_attention=(False, False, True, False)),
        UNetConfig(
            block_out_channels=(32, 64),
            down_attention=(False, True),
            up_attention=(True, False),
            layers_per_block=(1, 3),
            num_heads=(8, 8),
        ),
    ],
    ids=["linear", "widths", "attention", "layers"],
)
def test_the_config_of_any_unet(config: UNetConfig) -> None:
    with torch.device("meta"):
        assert unet_config(shapes_of(UNet(config))) == config


def test_the_config_of_any_vae() -> None:
    config = VAEConfig(block_out_channels=(32, 96, 64), layers_per_block=3, latent_channels=3, in_channels=1)
    with torch.device("meta"):
        assert vae_config(shapes_of(VAE(config))) == config


@pytest.mark.parametrize("most", [6, pytest.param(100, marks=pytest.mark.slow)])
def test_one_missing_tensor_does_not_change_the_config(sd15: Shapes, opened: Opened, most: int) -> None:
    """So that the strict check names only this tensor. Of 100, all keys from which the config is derived are tried."""
    rng = random.Random(0)
    telling = [key for key in sd15 if ".op." in key or ".0.in_layers" in key or ".down." in key]
    for missing in [CONV_IN, *rng.sample(telling, min(most, len(telling))), *rng.sample(list(sd15), min(most, 30))]:
        source = opened({key: shape for key, shape in sd15.items() if key != missing})
        assert configs(source) == (UNetConfig(), VAEConfig()), missing
        assert sum(len(problem.items) for network in source.networks for problem in network.problems) <= 1


@pytest.mark.parametrize("shape", [(320, 0, 3, 3), (320, 2**40, 3, 3), (320,), ()])
def test_a_senseless_shape_does_not_change_the_config(sd15: Shapes, opened: Opened, shape: tuple[int, ...]) -> None:
    source = opened(sd15 | {CONV_IN: shape})
    assert configs(source)[0] == UNetConfig()
    with pytest.raises(ValueError, match=r"conv_in.weight has shape .*, expected \[320, 4, 3, 3\]"):
        source.refuse()


# ---- everything else


def inpainting(sd15: Shapes) -> Shapes:
    return sd15 | {CONV_IN: (320, 9, 3, 3)}


def test_an_inpainting_checkpoint(sd15: Shapes, opened: Opened) -> None:
    assert recognise(inpainting(sd15)).problem is None
    source = opened(inpainting(sd15))
    unet, _ = configs(source)
    assert unet == UNetConfig(in_channels=9)
    assert unet.inpaints and unet.latent_channels == 4
    source.refuse()


REFUSED = {
    "SDXL": (lambda s: {"conditioner.embedders.0.transformer.x": (1,), CONV_IN: (320, 4, 3, 3)}, "Diffusion XL"),
    "SD 2": (lambda s: {"cond_stage_model.model.ln_final.bias": (1024,), CONV_IN: (320, 4, 3, 3)}, "Diffusion 2"),
    "SD 2 by width": (lambda s: s | {WIDE_TEXT: (320, 1024)}, "Diffusion 2 model .its text embedding is 1024 wide"),
    "SDXL by width": (lambda s: s | {WIDE_TEXT: (320, 2048)}, "Diffusion XL model .its text embedding is 2048 wide"),
    "SD 2 inpainting": (lambda s: inpainting(s) | {WIDE_TEXT: (320, 1024)}, "Stable Diffusion 2 model"),
    "pix2pix": (
        lambda s: s | {CONV_IN: (320, 8, 3, 3)},
        "InstructPix2Pix model or GeoWizard .its UNet takes 8 channels",
    ),
    "SD 3": (lambda s: {f"{UNET}joint_blocks.0.x_block.attn.proj.weight": (8, 8)}, "Stable Diffusion 3"),
    "Flux": (lambda s: {"double_blocks.0.img_attn.proj.weight": (8, 8)}, "Flux"),
    "ControlNet": (lambda s: s | {"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)}, "ControlNet"),
    "ControlNet in folder names": (
        lambda s: {
            "conv_in.weight": (320, 4, 3, 3),
            "time_embedding.linear_1.weight": (1280, 320),
            "controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3),
        },
        "ControlNet",
    ),
    "IP-Adapter": (lambda s: {"image_proj.norm.weight": (768,), "ip_adapter.1.to_k_ip.weight": (320, 768)}, "IP-Ad"),
    "LoRA, kohya": (lambda s: {"lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": (8, 4)}, "is a LoRA"),
    "LoRA, diffusers": (lambda s: {"unet.mid_block.attentions.0.to_q.lora_A.weight": (4, 8)}, "is a LoRA"),
    "LoRA, text only": (lambda s: {"text_encoder.text_model.x.q_proj.lora_linear_layer.up.weight": (8, 4)}, "LoRA"),
    "textual inversion": (lambda s: {"<cat>": (768,)}, "textual inversion"),
    "textual inversion, A1111": (lambda s: {"emb_params": (4, 768)}, "textual inversion"),
    "VAE alone": (
        lambda s: {k.removeprefix("first_stage_model."): v for k, v in s.items() if k.startswith("first")},
        "an autoencoder alone; load the model folder .* or pass it as vae=",
    ),
    "UNet alone": (
        lambda s: {"conv_in.weight": (320, 4, 3, 3), "time_embedding.linear_1.weight": (1280, 320)},
        "a UNet alone; load the model folder",
    ),
    "inpainting UNet alone": (
        lambda s: {"conv_in.weight": (320, 9, 3, 3), "time_embedding.linear_1.weight": (1280, 320)},
        "a UNet alone",
    ),
    "text encoder alone": (lambda s: {CLIP: (49408, 768)}, "a text encoder alone"),
    "text encoder of transformers 5.6": (lambda s: {CLIP.removeprefix("text_model."): (49408, 768)}, "a text encoder"),
    "no VAE": (
        lambda s: {k: v for k, v in s.items() if not k.startswith("first")},
        "no autoencoder; pass one",
    ),
    "no text encoder": (lambda s: {k: v for k, v in s.items() if not k.startswith("cond")}, "no text encoder"),
    "UNet only": (lambda s: {k: v for k, v in s.items() if k.startswith(UNET)}, "holds no text encoder"),
    "nothing": (lambda s: {}, "first keys: none"),
    "SVD": (lambda s: s | {f"{UNET}input_blocks.1.1.time_stack.0.x": (8,), "conditioner.x": (1,)}, "Stable Video"),
    "LCM": (lambda s: s | {f"{UNET}time_embed.cond_proj.weight": (320, 256)}, "latent consistency model"),
    "fp8 with scales": (lambda s: s | {"scaled_fp8": (0,)}, "scaled fp8 weights; use the float16"),
    "Control-LoRA": (lambda s: {"lora_controlnet": (0,), "input_blocks.0.0.weight": (320, 4, 3, 3)}, "Control-LoRA"),
    "AnimateDiff": (lambda s: {"down_blocks.0.motion_modules.0.temporal_transformer.x": (8,)}, "AnimateDiff motion"),
    "GLIGEN": (lambda s: s | {f"{UNET}input_blocks.1.1.transformer_blocks.0.fuser.linear.weight": (8, 8)}, "GLIGEN"),
    "T2I-Adapter": (lambda s: {"adapter.body.0.resnets.0.block1.weight": (8, 8)}, "T2I-Adapter"),
    "hypernetwork": (lambda s: {"768.0.linear.0.weight": (768, 768)}, "hypernetwork"),
    "TAESD": (lambda s: {"decoder.layers.0.weight": (64, 4, 3, 3)}, "tiny autoencoder"),
    "CLIP image encoder": (lambda s: {"vision_model.embeddings.class_embedding": (1024,)}, "CLIP image encoder"),
    "upscaler": (lambda s: {"body.0.rdb1.conv1.weight": (8, 8, 3, 3)}, "ESRGAN upscaler"),
    "LoRA, cloneofsimo": (lambda s: {"unet:0:up": (4, 8), "unet:0:down": (4, 8)}, "cloneofsimo"),
    "EMA alone": (
        lambda s: {"model_ema.diffusion_modelinput_blocks00weight": (320, 4, 3, 3)},
        "averaged weights .EMA. al",
    ),
    "folder in one file": (lambda s: {"unet.conv_in.weight": (320, 4, 3, 3)}, "model folder's networks in one file"),
    "UNet alone, LDM": (lambda s: {"input_blocks.0.0.weight": (320, 4, 3, 3)}, "a UNet in LDM names alone"),
    "another network": (lambda s: {"fc.weight": (3, 3), "fc.bias": (3,)}, "first keys: fc.weight, fc.bias"),
}


@pytest.mark.parametrize(("make", "problem"), REFUSED.values(), ids=REFUSED)
def test_other_kinds_are_refused_by_name(sd15: Shapes, make: Callable[[Shapes], Shapes], problem: str) -> None:
    found = recognise(make(sd15)).problem
    assert found is not None
    assert re.search(problem, found), found


@pytest.mark.parametrize(
    "wrap",
    [
        lambda key: f"state_dict.{key}",
        lambda key: f"module.{key}",
        lambda key: f"model.{key}",
        lambda key: f"state_dict.module.{key}",
        lambda key: key.removeprefix("model."),
        lambda key: key.removeprefix(UNET),
        lambda key: key.replace("cond_stage_model.transformer.", "cond_stage_model.clip_l.transformer."),
    ],
    ids=["state_dict", "module", "model", "two", "diffusion_model", "bare UNet", "clip_l"],
)
def test_wrapped_names_are_unwrapped(sd15: Shapes, wrap: Callable[[str], str]) -> None:
    assert unwrap({wrap(key): shape for key, shape in sd15.items()}) == sd15


@pytest.mark.parametrize("foreign", ["lora_unet_mid_block.lora_up.weight", "embeddings.cat", "model_ema.decay"])
def test_a_bundle_is_still_a_checkpoint(sd15: Shapes, foreign: str) -> None:
    assert recognise(sd15 | {foreign: (3,)}).name == CHECKPOINT


@pytest.mark.filterwarnings("ignore")
def test_any_other_tensors_raise_nothing_but_value_errors(sd15: Shapes, opened: Opened) -> None:
    """Parts of a checkpoint with some shapes and values changed, up to the strict check."""
    rng = random.Random(0)
    refused = 0
    for _ in range(20):
        shapes = {key: shape for key, shape in sd15.items() if rng.random() < rng.choice([0.02, 0.5, 0.99, 1])}
        for key in rng.sample(list(shapes), min(len(shapes), 20)):
            shapes[key] = tuple(rng.choices([0, 1, 3, 4, 32, 320, 768, 2**40], k=rng.randrange(5)))
        for key in rng.sample(list(shapes), min(len(shapes), 20)):
            number = str(rng.choice([0, 1, 7, 99, 10**9, "x", ""]))
            shapes[re.sub(r"\d+", number, key, count=1)] = shapes.pop(key)
        try:
            opened(shapes).refuse()
        except ValueError:
            refused += 1
    assert refused == 20
