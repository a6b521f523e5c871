"""The autoencoder against diffusers' on the same weights."""

import pytest
import torch
from compare import relative_error
from diffusers import AutoencoderKL

from minidiff.networks.config import VAEConfig
from minidiff.networks.vae import VAE

CONFIGS = {
    "two levels": {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8},
    "three levels": {"block_out_channels": (16, 32, 32), "layers_per_block": 2, "norm_num_groups": 4},
    "one level": {"block_out_channels": (16,), "layers_per_block": 1, "norm_num_groups": 8, "latent_channels": 3},
}


def both(options: dict[str, object]) -> tuple[VAE, AutoencoderKL]:
    torch.manual_seed(0)
    levels = len(options["block_out_channels"])
    reference = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels, **options
    ).eval()
    network = VAE(VAEConfig.from_dict(dict(reference.config))).eval()
    network.load_state_dict(reference.state_dict(), strict=True)
    return network, reference


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [(32, 32), (24, 40)], ids=str)
def test_equals_diffusers(name: str, size: tuple[int, int]) -> None:
    network, reference = both(CONFIGS[name])
    images = torch.rand(2, 3, *size) * 2 - 1
    with torch.no_grad():
        expected = reference.encode(images).latent_dist
        mean, logvar = network.moments(images)
        assert relative_error(mean, expected.mean) <= 1e-5
        assert relative_error(logvar, expected.logvar) <= 1e-5
        assert relative_error(network.encode(images), expected.mode()) <= 1e-5
        sampled = expected.sample(torch.Generator().manual_seed(1))
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
        assert relative_error(network.encode(images, noise), sampled) <= 1e-5
        latents = torch.randn(mean.shape)
        assert relative_error(network.decode(latents), reference.decode(latents).sample) <= 1e-5


def test_log_variance_is_clamped() -> None:
    network, reference = both(CONFIGS["two levels"])
    for vae in (network, reference):
        vae.quant_conv.bias.data[4:] = torch.tensor([100.0, -100.0, 0.0, 0.0])
    images = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        _, logvar = network.moments(images)
        assert relative_error(logvar, reference.encode(images).latent_dist.logvar) <= 1e-5
    assert logvar.max() == 20
    assert logvar.min() == -30


def test_sd15_has_the_published_size() -> None:
    with torch.device("meta"):
        network = VAE(VAEConfig())
    assert len(network.state_dict()) == 248
    assert sum(p.numel() for p in network.parameters()) == 83_653_863
    assert network.config.factor == 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents_mean": [0.5]}, "latents_mean is"),
        ({"use_quant_conv": False}, "use_quant_conv is False"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "expected a list of DownEncoderBlock2D"),
        ({"norm_num_groups": 5}, "norm_num_groups is 5"),
        ({"scaling_factor": None}, "scaling_factor is None; expected a number"),
    ],
)
def test_config_refuses_by_name(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VAEConfig.from_dict({"block_out_channels": [16, 32], "norm_num_groups": 8} | change)


def test_wrong_shapes_are_named() -> None:
    network, _ = both(CONFIGS["two levels"])
    with pytest.raises(ValueError, match=r"images have shape \[1, 3, 9, 8\]; expected .* multiples of 2"):
        network.encode(torch.zeros(1, 3, 9, 8))
    with pytest.raises(ValueError, match=r"latents have shape \[1, 3, 8, 8\]; expected \[B, 4, h, w\]"):
        network.decode(torch.zeros(1, 3, 8, 8))
