"""weights/names.py: the tables against diffusers' own converters, and round trips."""

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from ldm import unet_names, vae_names

from minidiff.networks.config import UNetConfig, VAEConfig
from minidiff.weights.names import LDM_PREFIX, VAE_OLD_ATTENTION, invert, rename, unet_ldm, vae_ldm

UNETS = {
    "SD 1.5": UNetConfig(),
    "one level": UNetConfig(
        block_out_channels=(32,), down_attention=(True,), up_attention=(True,), layers_per_block=(2,), num_heads=(8,)
    ),
    "two levels, one layer, no attention outside": UNetConfig(
        block_out_channels=(32, 64),
        down_attention=(False, True),
        up_attention=(True, False),
        layers_per_block=(1, 1),
        num_heads=(8, 8),
    ),
    "five levels, three layers": UNetConfig(
        block_out_channels=(32, 32, 64, 64, 96),
        down_attention=(True, False, True, False, False),
        up_attention=(False, False, True, False, True),
        layers_per_block=(3,) * 5,
        num_heads=(8,) * 5,
    ),
}
VAES = {
    "SD 1.5": VAEConfig(),
    "one level": VAEConfig(block_out_channels=(32,), layers_per_block=1),
    "three levels, three layers": VAEConfig(block_out_channels=(32, 64, 96), layers_per_block=3),
}


@pytest.mark.parametrize("config", UNETS.values(), ids=UNETS)
def test_unet_there_and_back(config: UNetConfig) -> None:
    names = unet_names(config)
    table = unet_ldm(len(config.block_out_channels), config.layers_per_block[0])
    assert len(set(names.values())) == len(names)
    assert {rename(theirs.removeprefix(LDM_PREFIX["unet"]), table): theirs for theirs in names.values()} == names


@pytest.mark.parametrize("config", VAES.values(), ids=VAES)
def test_vae_there_and_back(config: VAEConfig) -> None:
    names = vae_names(config)
    table = vae_ldm(len(config.block_out_channels), config.layers_per_block)
    assert len(set(names.values())) == len(names)
    assert {rename(theirs.removeprefix(LDM_PREFIX["vae"]), table): theirs for theirs in names.values()} == names


@pytest.mark.parametrize("config", UNETS.values(), ids=UNETS)
def test_diffusers_converts_the_unet_names_to_the_same(config: UNetConfig) -> None:
    names = unet_names(config)
    file = {theirs: torch.tensor(i) for i, theirs in enumerate(names.values())}
    layers = {"layers_per_block": config.layers_per_block[0]}
    assert convert_ldm_unet_checkpoint(dict(file), layers) == {ours: file[theirs] for ours, theirs in names.items()}


@pytest.mark.parametrize("config", VAES.values(), ids=VAES)
def test_diffusers_converts_the_vae_names_to_the_same(config: VAEConfig) -> None:
    names = vae_names(config)
    file = {theirs: torch.tensor(i) for i, theirs in enumerate(names.values())}
    levels = {key: [""] * len(config.block_out_channels) for key in ("down_block_types", "up_block_types")}
    assert convert_ldm_vae_checkpoint(dict(file), levels) == {ours: file[theirs] for ours, theirs in names.items()}


def test_number_of_keys() -> None:
    assert len(unet_names(UNetConfig())) == 686
    assert len(vae_names(VAEConfig())) == 248


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("input_blocks.0.0.weight", "conv_in.weight"),
        ("time_embed.2.bias", "time_embedding.linear_2.bias"),
        ("input_blocks.9.0.op.weight", "down_blocks.2.downsamplers.0.conv.weight"),
        ("input_blocks.8.1.proj_in.weight", "down_blocks.2.attentions.1.proj_in.weight"),
        ("input_blocks.11.0.emb_layers.1.weight", "down_blocks.3.resnets.1.time_emb_proj.weight"),
        ("middle_block.1.norm.weight", "mid_block.attentions.0.norm.weight"),
        ("middle_block.2.out_layers.3.weight", "mid_block.resnets.1.conv2.weight"),
        ("output_blocks.2.1.conv.weight", "up_blocks.0.upsamplers.0.conv.weight"),
        ("output_blocks.5.2.conv.bias", "up_blocks.1.upsamplers.0.conv.bias"),
        ("output_blocks.8.2.conv.weight", "up_blocks.2.upsamplers.0.conv.weight"),
        ("output_blocks.11.0.skip_connection.weight", "up_blocks.3.resnets.2.conv_shortcut.weight"),
        (
            "output_blocks.11.1.transformer_blocks.0.attn2.to_out.0.weight",
            "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_out.0.weight",
        ),
        ("out.2.weight", "conv_out.weight"),
    ],
)
def test_unet_names_of_the_facts(theirs: str, ours: str) -> None:
    assert rename(theirs, unet_ldm()) == ours
    assert unet_names(UNetConfig())[ours] == LDM_PREFIX["unet"] + theirs


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("encoder.down.0.block.1.norm1.weight", "encoder.down_blocks.0.resnets.1.norm1.weight"),
        ("encoder.down.2.downsample.conv.weight", "encoder.down_blocks.2.downsamplers.0.conv.weight"),
        ("decoder.up.3.block.2.conv1.weight", "decoder.up_blocks.0.resnets.2.conv1.weight"),
        ("decoder.up.1.upsample.conv.bias", "decoder.up_blocks.2.upsamplers.0.conv.bias"),
        ("decoder.up.0.block.0.nin_shortcut.weight", "decoder.up_blocks.3.resnets.0.conv_shortcut.weight"),
        ("decoder.mid.block_2.conv2.bias", "decoder.mid_block.resnets.1.conv2.bias"),
        ("encoder.mid.attn_1.norm.weight", "encoder.mid_block.attentions.0.group_norm.weight"),
        ("decoder.mid.attn_1.q.weight", "decoder.mid_block.attentions.0.to_q.weight"),
        ("decoder.mid.attn_1.proj_out.bias", "decoder.mid_block.attentions.0.to_out.0.bias"),
        ("decoder.norm_out.weight", "decoder.conv_norm_out.weight"),
        ("quant_conv.weight", "quant_conv.weight"),
    ],
)
def test_vae_names_of_the_facts(theirs: str, ours: str) -> None:
    assert rename(theirs, vae_ldm()) == ours
    assert vae_names(VAEConfig())[ours] == LDM_PREFIX["vae"] + theirs


def test_old_vae_attention_names() -> None:
    keys = [key for key in vae_names(VAEConfig()) if ".attentions." in key]
    old = {key: rename(key, invert(VAE_OLD_ATTENTION, keys)) for key in keys}
    assert old["encoder.mid_block.attentions.0.to_q.weight"] == "encoder.mid_block.attentions.0.query.weight"
    assert old["decoder.mid_block.attentions.0.to_out.0.bias"] == "decoder.mid_block.attentions.0.proj_attn.bias"
    assert {rename(name, VAE_OLD_ATTENTION): name for name in old.values()} == old


def test_a_longer_match_wins_and_other_keys_stay() -> None:
    table = {"a.1": "x", "a.1.conv": "y"}
    assert rename("a.1.conv.weight", table) == "y.weight"
    assert rename("a.1.convolution.weight", table) == "x.convolution.weight"
    assert rename("b.1.weight", table) == "b.1.weight"
    assert rename("a.10.weight", table) == "a.10.weight"
