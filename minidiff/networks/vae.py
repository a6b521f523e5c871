"""The autoencoder of Stable Diffusion 1.x: images in [-1,1] to latents and back.

Rombach et al. 2022, appendix G. Module names are those of the folder format. The latents here are unscaled; the UNet's
are `scaling_factor` times as large.
"""

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import resample
from .attention import attention
from .config import VAEConfig
from .norm import GroupNorm, GroupNormSiLU

LARGE = 2**24
"""Grids of more elements are computed by `strips`, where a layer has such a function (speed/strips.py)."""
Strips: TypeAlias = Callable[..., Tensor] | None


def norm_silu_conv(norm: GroupNorm, conv: nn.Module, x: Tensor, strips: Strips = None) -> Tensor:
    """conv(silu(norm(x))): [B,C,h,w] -> [B,C',h,w]. The norm includes the activation."""
    return conv(norm(x)) if strips is None or x.numel() <= LARGE else strips(norm, conv, x)


def grow_conv(conv: nn.Module, x: Tensor, strips: Strips = None) -> Tensor:
    """Double the grid by nearest neighbours, then convolve: [B,C,h,w] -> [B,C',2h,2w]."""
    return resample.grow_conv(conv, x) if strips is None or 4 * x.numel() <= LARGE else strips(conv, x)


_EPS = 1e-6  # for every norm, regardless of the config


class VAE(nn.Module):
    """`latents = vae.encode(images)`, `images = vae.decode(latents)`."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        latent = config.latent_channels
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images [B,3,H,W] in [-1,1] -> mean and log variance of the latents' Gaussian, each [B,4,h,w].

        ValueError if H or W is not a multiple of `config.factor`, since the edge of the image would be lost.
        """
        config = self.config
        if (
            images.ndim != 4
            or images.shape[1] != config.in_channels
            or any(n % config.factor for n in images.shape[-2:])
        ):
            raise ValueError(
                f"images have shape {list(images.shape)}; expected [B, {config.in_channels}, H, W] "
                f"with H and W multiples of {config.factor}"
            )
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """images [B,3,H,W] in [-1,1] -> latents [B,4,h,w]: the mean, or a sample if unit `noise` [B,4,h,w] is given."""
        mean, logvar = self.moments(images)
        return mean if noise is None else sampled(mean, logvar, noise)

    def decode(self, latents: Tensor) -> Tensor:
        """latents [B,4,h,w] -> images [B,3,H,W], roughly in [-1,1], not clamped."""
        if latents.ndim != 4 or latents.shape[1] != self.config.latent_channels:
            raise ValueError(
                f"latents have shape {list(latents.shape)}; expected [B, {self.config.latent_channels}, h, w]"
            )
        return self.decoder(self.post_quant_conv(latents))


def sampled(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """A sample of a Gaussian by unit noise; all of one shape."""
    return mean + torch.exp(0.5 * logvar) * noise


class Encoder(nn.Module):
    """Image to moments: levels of resnets, each but the last halving the grid, then the mid block."""

    norm_silu_conv_strips: Strips = None

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        channels = widths[0]
        for i, width in enumerate(widths):
            down = Downsample(width) if i < len(widths) - 1 else None
            self.down_blocks.append(Level(groups, channels, width, config.layers_per_block, downsample=down))
            channels = width
        self.mid_block = MidBlock(groups, channels)
        self.conv_norm_out = GroupNormSiLU(groups, channels, _EPS)
        self.conv_out = nn.Conv2d(channels, 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B,3,H,W] -> [B,8,h,w]."""
        x = self.mid_block(_run(self.down_blocks, self.conv_in(x)))
        return norm_silu_conv(self.conv_norm_out, self.conv_out, x, self.norm_silu_conv_strips)


class Decoder(nn.Module):
    """Latents to image: the mid block, then levels of resnets, each but the last doubling the grid."""

    norm_silu_conv_strips: Strips = None

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(groups, widths[0])
        self.up_blocks = nn.ModuleList()
        channels = widths[0]
        for i, width in enumerate(widths):
            up = Upsample(width) if i < len(widths) - 1 else None
            self.up_blocks.append(Level(groups, channels, width, config.layers_per_block + 1, upsample=up))
            channels = width
        self.conv_norm_out = GroupNormSiLU(groups, channels, _EPS)
        self.conv_out = nn.Conv2d(channels, config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B,4,h,w] -> [B,3,H,W]."""
        x = _run(self.up_blocks, self.mid_block(self.conv_in(x)))
        return norm_silu_conv(self.conv_norm_out, self.conv_out, x, self.norm_silu_conv_strips)


class Level(nn.Module):
    """Resnets at one resolution, then an optional change of resolution."""

    def __init__(
        self,
        groups: int,
        channels: int,
        out: int,
        layers: int,
        downsample: "Downsample | None" = None,
        upsample: "Upsample | None" = None,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(groups, channels if i == 0 else out, out) for i in range(layers))
        self.downsamplers = None if downsample is None else nn.ModuleList([downsample])
        self.upsamplers = None if upsample is None else nn.ModuleList([upsample])

    def layers(self) -> Iterator[nn.Module]:
        """The layers in execution order."""
        for layers in (self.resnets, self.downsamplers, self.upsamplers):
            yield from layers or ()


def _run(levels: nn.ModuleList, x: Tensor) -> Tensor:
    """Run layer by layer: a `forward` of the level would keep its input in memory until it ends."""
    for level in levels:
        assert isinstance(level, Level)
        for layer in level.layers():
            x = layer(x)
    return x


class ResBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    norm_silu_conv_strips: Strips = None

    def __init__(self, groups: int, channels: int, out: int) -> None:
        super().__init__()
        self.norm1 = GroupNormSiLU(groups, channels, _EPS)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.norm2 = GroupNormSiLU(groups, out, _EPS)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, out, 1) if channels != out else None

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,h,w] -> [B,C',h,w]."""
        y = norm_silu_conv(self.norm1, self.conv1, x, self.norm_silu_conv_strips)
        y = norm_silu_conv(self.norm2, self.conv2, y, self.norm_silu_conv_strips)
        y += x if self.conv_shortcut is None else self.conv_shortcut(x)  # in place: these are the largest grids of all
        return y


class MidBlock(nn.Module):
    """Resnet, attention, resnet at the coarsest resolution."""

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([SpatialAttention(groups, channels)])
        self.resnets = nn.ModuleList(ResBlock(groups, channels, channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,h,w] -> [B,C,h,w]."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class SpatialAttention(nn.Module):
    """Self-attention among the pixels with one head and a residual connection."""

    def __init__(self, groups: int, channels: int) -> None:
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, _EPS)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,h,w] -> [B,C,h,w]."""
        y = self.group_norm(x).flatten(2).transpose(1, 2)  # [B,C,h,w] -> [B,N,C]
        y = attention(self.to_q(y)[:, None], self.to_k(y)[:, None], self.to_v(y)[:, None])  # one head: [B,1,N,C]
        y = self.to_out[0](y[:, 0]).transpose(1, 2)  # [B,N,C] -> [B,C,N]
        return x + y.unflatten(2, x.shape[-2:])


class Downsample(nn.Module):
    """Halve the grid. Pads right and bottom only, as in training."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,h,w] -> [B,C,h/2,w/2]."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the grid by nearest neighbours, then convolve."""

    grow_conv_strips: Strips = None

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,h,w] -> [B,C,2h,2w]."""
        return grow_conv(self.conv, x, self.grow_conv_strips)
