"""The bundled model's autoencoder: its loss, its reconstruction quality, and the scale of its latents."""

import numpy as np
import torch
from torch import Tensor

from ..networks.vae import VAE
from .world import BACKGROUNDS, COLOURS, SIZE, random_scene, render

CROP = 64  # pixels: a quarter of a picture costs a quarter, and training gains as much from it
PICTURES, CROPS = 8, 2  # pictures per step, crops per picture
L1, KL = 0.05, 1e-4  # weights, relative to 1 for the squared error
TEST_SEED = 2**40  # for pictures not used in training
JUDGED, SCALED = 64, 256  # number of pictures for `fidelity` and `normalise`


def pictures(seed: int, index: int, count: int) -> Tensor:
    """Batch `index` of random pictures, [count,3,128,128] in [-1,1]."""
    rng = np.random.default_rng([seed, index])
    return render([random_scene(rng) for _ in range(count)]).float() / 127.5 - 1


def autoencoder_loss(vae: VAE, seed: int, step: int) -> Tensor:
    """Reconstruction error plus KL divergence of the latents from a unit Gaussian (Kingma and Welling 2014)."""
    rng = np.random.default_rng([seed, step, 1])
    crops = []
    for picture in pictures(seed, step, PICTURES):
        for y, x in rng.integers(0, (SIZE - CROP) // vae.config.factor + 1, (CROPS, 2)) * vae.config.factor:
            crops.append(picture[:, y : y + CROP, x : x + CROP])
    images = torch.stack(crops)
    noise = torch.from_numpy(rng.standard_normal((len(images), vae.config.latent_channels, *[CROP // 4] * 2)))
    with torch.autocast("cpu", torch.bfloat16):
        mean, logvar = vae.moments(images)
        decoded = vae.decode(mean + (0.5 * logvar).exp() * noise.to(mean.dtype))
    error, mean, logvar = decoded.float() - images, mean.float(), logvar.float()
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error.square().mean() + L1 * error.abs().mean() + KL * divergence


@torch.no_grad()
def fidelity(vae: VAE, share: float = 1.0) -> tuple[float, float]:
    """PSNR in dB of reconstructed unseen pictures, and the fraction of flat pixels that keep their nearest colour.

    share: of the pictures, here and in `normalise`; at least eight are used.
    """
    palette = torch.tensor([*COLOURS.values(), *BACKGROUNDS.values()], dtype=torch.float32)
    errors, kept = [], []
    for index in range(max(1, int(share * JUDGED) // 8)):
        images = pictures(TEST_SEED, index, 8)
        decoded = vae.decode(vae.encode(images)).clamp(-1, 1)
        errors.append(((decoded - images) / 2).square().mean(dim=(1, 2, 3)))
        before, after = (torch.cdist((x.movedim(1, -1).flatten(0, 2) + 1) * 127.5, palette) for x in (images, decoded))
        flat = before.min(dim=1).values < 1
        kept.append((before.argmin(dim=1) == after.argmin(dim=1))[flat].float().mean())
    return float(-10 * torch.cat(errors).log10().mean()), float(torch.stack(kept).mean())


@torch.no_grad()
def normalise(vae: VAE, seed: int, share: float = 1.0) -> None:
    """Shift and scale each channel of the latents to mean 0 and variance 1 after multiplication by `scaling_factor`.

    This is folded into the 1x1 convolutions before and after the latents; the images stay the same.
    """
    batches = range(max(1, int(share * SCALED) // 8))
    latents = torch.cat([vae.encode(pictures(seed, index, 8)) for index in batches])
    mean, gain = latents.mean(dim=(0, 2, 3)), 1 / vae.config.scaling_factor / latents.std(dim=(0, 2, 3))
    channels = len(mean)
    into, out = vae.quant_conv, vae.post_quant_conv
    assert into.bias is not None and out.bias is not None
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight /= gain[:, None, None]
    into.weight[:channels] *= gain[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - mean) * gain
    into.bias[channels:] += 2 * gain.log()
