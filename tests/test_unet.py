"""The UNet against diffusers' on the same weights, and its config."""

from dataclasses import replace

import pytest
import torch
from compare import relative_error
from diffusers import UNet2DConditionModel

from minidiff.networks.attention import ALL, Record
from minidiff.networks.config import UNetConfig
from minidiff.networks.unet import Begun, ResBlock, UNet, sinusoids

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"
SMALL = {
    "sample_size": 16,
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
    "block_out_channels": (32, 64),
    "down_block_types": (CROSS, PLAIN),
    "up_block_types": (PLAIN_UP, CROSS_UP),
    "layers_per_block": 1,
    "attention_head_dim": 4,
}
CONFIGS = {
    "two levels": SMALL,
    "three levels, heads and layers by level": SMALL
    | {
        "block_out_channels": (32, 64, 96),
        "down_block_types": (PLAIN, CROSS, CROSS),
        "up_block_types": (CROSS_UP, CROSS_UP, PLAIN_UP),
        "layers_per_block": (1, 2, 1),
        "attention_head_dim": (2, 4, 8),
        "norm_num_groups": 16,
    },
    "no attention but in the middle": SMALL
    | {"down_block_types": (PLAIN, PLAIN), "up_block_types": (PLAIN_UP, PLAIN_UP)},
    "no middle block": SMALL | {"mid_block_type": None},
    "linear projections, sin first": SMALL | {"use_linear_projection": True, "flip_sin_to_cos": False, "freq_shift": 1},
    "one level": SMALL | {"block_out_channels": (32,), "down_block_types": (CROSS,), "up_block_types": (CROSS_UP,)},
}


def both(options: dict[str, object]) -> tuple[UNet, UNet2DConditionModel]:
    torch.manual_seed(0)
    reference = UNet2DConditionModel(**options).eval()
    network = UNet(UNetConfig.from_dict(dict(reference.config))).eval()
    network.load_state_dict(reference.state_dict(), strict=True)
    return network, reference


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("grid", [(16, 16), (9, 13), (12, 20)], ids=str)
def test_equals_diffusers(name: str, grid: tuple[int, int]) -> None:
    network, reference = both(CONFIGS[name])
    x, context = torch.randn(2, 4, *grid), torch.randn(2, 7, 24)
    with torch.no_grad():
        for t in (1, 499.5, torch.tensor([999, 0])):
            eps, maps = network(x, t, context)
            assert relative_error(eps, reference(x, t, context).sample) <= 1e-5
            assert maps == {}


def test_sd15_has_the_published_size() -> None:
    with torch.device("meta"):
        network = UNet(UNetConfig())
    assert len(network.state_dict()) == 686
    assert sum(p.numel() for p in network.parameters()) == 859_520_964
    assert len(network.sites) == 32
    assert [site.name for site in network.sites[:3]] == ["down.0.0.self", "down.0.0.cross", "down.0.1.self"]


def test_sites_name_their_modules() -> None:
    network, _ = both(SMALL)
    for site in network.sites:
        assert network.get_submodule(site.key).site == site


def test_config_reads_what_the_hub_says() -> None:
    hub = {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False,
        "cross_attention_dim": 768,
        "down_block_types": [CROSS, CROSS, CROSS, PLAIN],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": [PLAIN_UP, CROSS_UP, CROSS_UP, CROSS_UP],
    }
    assert UNetConfig.from_dict(hub) == UNetConfig()
    assert UNetConfig.from_dict(hub | {"sample_size": None}) == UNetConfig()
    assert (
        UNetConfig.from_dict(hub | {"sample_size": 32, "_diffusers_version": "0.4.0"}) == UNetConfig()
    )  # as diffusers
    assert UNetConfig.from_dict(hub | {"sample_size": 32, "_diffusers_version": "0.11.1"}).sample_size == 32
    assert UNetConfig.from_dict(hub | {"sample_size": 96}) == replace(UNetConfig(), sample_size=96)


@pytest.mark.parametrize(
    "change",
    [
        {"upcast_attention": True, "dropout": 0.1, "my_note": "trained by me", "optimization_step": 5000},
        {"transformer_layers_per_block": [1, 1], "only_cross_attention": [False, False], "sample_size": [16, 16]},
        {"cross_attention_dim": [24, 24], "class_embed_type": None, "dual_cross_attention": False},
    ],
)
def test_config_keys_without_an_effect_are_taken(change: dict[str, object]) -> None:
    assert UNetConfig.from_dict(SMALL | change) == UNetConfig.from_dict(SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
        ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type is 'UNetMidBlock2D'"),
        ({"transformer_layers_per_block": [1, 2]}, "transformer_layers_per_block"),
        ({"down_block_types": ["AttnDownBlock2D", PLAIN]}, r"down_block_types is .* expected a list of DownBlock2D or"),
        ({"down_block_types": [PLAIN]}, "down_block_types names 1 blocks; expected 2"),
        ({"num_attention_heads": 8}, "num_attention_heads is set"),
        ({"attention_head_dim": [4]}, "attention_head_dim has 1 values; expected 2"),
        ({"attention_head_dim": 5}, r"gives \[5, 5\] heads"),
        ({"norm_num_groups": 7}, "norm_num_groups is 7"),
        ({"in_channels": "four"}, "in_channels is 'four'; expected a whole number"),
        ({"block_out_channels": 32}, "block_out_channels is 32; expected a list"),
        ({"layers_per_block": 10**8}, "layers_per_block is 100000000; expected a whole number from 1 to 32"),
        ({"block_out_channels": [32] * 20_000}, "expected a list of 1 to 8 whole numbers"),
        ({"sample_size": 20_000}, "sample_size is 20000; expected a whole number from 1 to 8192"),
        ({"freq_shift": 16}, "freq_shift is 16; expected a number from 0 to 15"),
        ({"norm_eps": float("nan")}, "norm_eps is nan"),
        ({"cross_attention_dim": [24, 32]}, r"cross_attention_dim is \[24, 32\]; expected a whole number"),
    ],
)
def test_config_refuses_by_name(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UNetConfig.from_dict(SMALL | change)


@pytest.mark.parametrize(
    ("x", "context", "message"),
    [
        ((2, 3, 16, 16), (2, 7, 24), r"latents have shape \[2, 3, 16, 16\]; expected \[B, 4, h, w\]"),
        ((4, 16, 16), (2, 7, 24), "latents have shape"),
        ((2, 4, 16, 16), (2, 7, 32), r"context has shape \[2, 7, 32\]; expected \[2, L, 24\]"),
        ((2, 4, 16, 16), (1, 7, 24), "context has shape"),
    ],
)
def test_wrong_shapes_are_named(x: tuple[int, ...], context: tuple[int, ...], message: str) -> None:
    network, _ = both(SMALL)
    with pytest.raises(ValueError, match=message):
        network(torch.zeros(x), 1, torch.zeros(context))


def test_sinusoids_of_odd_width_end_in_a_zero() -> None:
    waves = sinusoids(torch.tensor([3.0]), 7)
    assert waves.shape == (1, 7)
    assert waves[0, -1] == 0
    assert waves[0, 3] == torch.sin(torch.tensor(3.0))
    assert waves[0, 0] == torch.cos(torch.tensor(3.0))


def test_half_precision_runs_on_the_cpu() -> None:
    network, _ = both(SMALL)
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 24)
    with torch.no_grad():
        exact, _ = network(x, 500, context)
        for dtype, bound in ((torch.bfloat16, 5e-2), (torch.float16, 1e-2)):
            eps, _ = network.to(dtype)(x.to(dtype), 500, context.to(dtype))
            assert eps.dtype == dtype
            assert relative_error(eps, exact) <= bound
            network.float()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pass_that_its_record_ended_goes_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From each layer that a record can end it in, alone and beside another text for the same latents."""
    network, _ = both(CONFIGS[name])
    rows, plain = list[int](), ResBlock.plain
    monkeypatch.setattr(ResBlock, "plain", lambda own, x, emb: rows.append(len(x)) or plain(own, x, emb))
    count = sum(isinstance(module, ResBlock) for module in network.modules())
    x, context = torch.randn(3, 4, 9, 13), torch.randn(6, 7, 24)
    expected, _ = network(torch.cat([x, x]), 300.0, context)
    layers = []
    for site in network.sites:
        begun: list[Begun] = []
        looked = torch.randn_like(x).copy_(x).requires_grad_()
        record = Record(frozenset([site]), ALL, "all", stop=True)
        nothing, maps = network(looked, 300.0, context[3:], record, at_stop=begun.append)
        assert nothing is None and maps.keys() == {site}
        assert network(x, 300.0, context[3:], record)[1].keys() == {site}
        for one in begun:
            assert not any(kept.requires_grad for kept in one.kept)
            layers.append(one.layer)
            again = one.row(0).joined([one.row(1), one.row(2)])
            rows.clear()
            torch.testing.assert_close(network.finish(again, 300.0, context), expected)
            assert rows == [3] * one.layer + [6] * (count - 1 - one.layer)  # the first layer's is kept, too
            torch.testing.assert_close(network.finish(one, torch.tensor(300.0), context[3:]), expected[3:])
            swapped = one.row(2).joined([one.row(0)])
            torch.testing.assert_close(network.finish(swapped, 300.0, context[[5, 3]]), expected[[5, 3]])
    names = [site.name for site in network.sites]
    later = [name for name in names if not name.startswith("down.0.0")] if names[0].startswith("down.0.0") else []
    assert len(layers) == len(later)  # of the others there is nothing to go on with
    assert layers == sorted(layers)
