"""Frozen descriptions of the networks, read from the config.json of a model folder."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..checks import Check, checked, number, shown, whole, wholes

_MID_BLOCK = "UNetMidBlock2DCrossAttn"

# Keys that change what diffusers computes, with their value in Stable Diffusion 1.x; a list repeats it for each level.
# All other keys (notes, a trainer's own, dropout) change nothing and may have any value.
_UNET_OFF = """addition_embed_type center_input_sample class_embed_type cross_attention_norm dual_cross_attention
encoder_hid_dim encoder_hid_dim_type mid_block_only_cross_attention num_class_embeds only_cross_attention
resnet_skip_time_act time_cond_proj_dim time_embedding_act_fn time_embedding_dim timestep_post_act"""
_UNET_FIXED: dict[str, object] = {
    **dict.fromkeys(_UNET_OFF.split()),
    "act_fn": "silu",
    "attention_type": "default",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "resnet_out_scale_factor": 1,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "transformer_layers_per_block": 1,
}
_VAE_FIXED: dict[str, object] = {
    "act_fn": "silu",
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
_VAE_COUNTS = ("in_channels", "out_channels", "latent_channels", "norm_num_groups")
# Upper limits for a config: above any Stable Diffusion's, yet low enough to build the network without delay.
MOST_LEVELS, MOST_LAYERS, MOST_CHANNELS, MOST_EDGE = 8, 32, 2**16, 2**13
_COUNT: Check = partial(whole, least=1, most=MOST_CHANNELS)


@dataclass(frozen=True)
class UNetConfig:
    """The UNet's shape. The defaults are Stable Diffusion 1.5.

    `down_attention` and `up_attention` say which blocks have transformers, in execution order.
    `num_heads` has one value per level, outermost first; the folder format calls it `attention_head_dim`,
    although it counts heads. `mid_block` is False in distilled models that leave it out (BK-SDM small).
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_attention: tuple[bool, ...] = (True, True, True, False)
    up_attention: tuple[bool, ...] = (False, True, True, True)
    mid_block: bool = True
    layers_per_block: tuple[int, ...] = (2, 2, 2, 2)
    num_heads: tuple[int, ...] = (8, 8, 8, 8)
    cross_attention_dim: int = 768
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    use_linear_projection: bool = False
    sample_size: int = 64

    @property
    def inpaints(self) -> bool:
        """Whether its input is latents, a mask and the latents of the masked image: 9 channels instead of 4."""
        return self.in_channels == 2 * self.out_channels + 1

    @property
    def latent_channels(self) -> int:
        """Channels of the latents among those of its input."""
        return self.out_channels if self.inpaints else self.in_channels

    @classmethod
    def from_dict(cls, config: Mapping[str, object]) -> "UNetConfig":
        """Read unet/config.json. ValueError where it describes something other than an SD 1.x UNet."""
        read = _Reader("unet/config.json", config)
        widths = read.ints("block_out_channels", cls.block_out_channels)
        levels = len(widths)
        if config.get("num_attention_heads") is not None:
            raise ValueError(
                "unet/config.json: num_attention_heads is set, which the folder format does not define; "
                "expected the number of heads in attention_head_dim"
            )
        found = cls(
            block_out_channels=widths,
            down_attention=read.blocks(
                "down_block_types", "DownBlock2D", "CrossAttnDownBlock2D", cls.down_attention, levels
            ),
            up_attention=read.blocks("up_block_types", "UpBlock2D", "CrossAttnUpBlock2D", cls.up_attention, levels),
            mid_block=read.mid_block(),
            layers_per_block=read.per_level("layers_per_block", 2, levels, MOST_LAYERS),
            num_heads=read.per_level("attention_head_dim", 8, levels),
            flip_sin_to_cos=bool(read.plain("flip_sin_to_cos", True)),
            use_linear_projection=bool(read.plain("use_linear_projection", False)),
            sample_size=read.sample_size(cls.sample_size),
            **read.checked(
                {
                    "in_channels": (cls.in_channels, _COUNT),
                    "out_channels": (cls.out_channels, _COUNT),
                    "cross_attention_dim": (1280, _COUNT),  # diffusers' own default when the key is missing
                    "norm_num_groups": (cls.norm_num_groups, _COUNT),
                    "norm_eps": (cls.norm_eps, partial(number, least=0, most=1)),
                    "freq_shift": (cls.freq_shift, partial(number, least=0, most=max(widths[0] // 2 - 1, 0))),
                }
            ),
        )
        read.refuse_other_kinds(_UNET_FIXED)
        _check_groups("unet/config.json", found.norm_num_groups, widths)
        if any(width % heads for width, heads in zip(widths, found.num_heads, strict=True)):
            raise ValueError(
                f"unet/config.json: attention_head_dim gives {list(found.num_heads)} heads, "
                f"which do not divide block_out_channels {list(widths)}"
            )
        return found


@dataclass(frozen=True)
class VAEConfig:
    """The autoencoder's shape. The defaults are Stable Diffusion 1.5.

    `scaling_factor` multiplies latents on their way from the encoder to the UNet, so that they have about unit
    variance.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215

    @property
    def factor(self) -> int:
        """Pixels per latent cell along one edge."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @classmethod
    def from_dict(cls, config: Mapping[str, object]) -> "VAEConfig":
        """Read vae/config.json. ValueError where it describes something other than an SD 1.x autoencoder."""
        read = _Reader("vae/config.json", config)
        widths = read.ints("block_out_channels", (64,))
        read.blocks("down_block_types", "DownEncoderBlock2D", None, (False,) * len(widths), len(widths))
        read.blocks("up_block_types", "UpDecoderBlock2D", None, (False,) * len(widths), len(widths))
        found = cls(
            block_out_channels=widths,
            **read.checked(
                {
                    **{key: (getattr(cls, key), _COUNT) for key in _VAE_COUNTS},
                    "layers_per_block": (1, partial(whole, least=1, most=MOST_LAYERS)),
                    "scaling_factor": (cls.scaling_factor, partial(number, least=1e-4, most=1e4)),
                }
            ),
        )
        read.refuse_other_kinds(_VAE_FIXED)
        _check_groups("vae/config.json", found.norm_num_groups, widths)
        return found


class _Reader:
    """Typed access to a config dict; its messages name the file and the key."""

    def __init__(self, file: str, config: Mapping[str, object]) -> None:
        self.file, self.config = file, config

    def plain(self, key: str, default: object) -> object:
        """The value; for a list that repeats one value for each level, that value."""
        value = self.config.get(key, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            return value[0]
        return value

    def whole(self, key: str, default: int, most: int = MOST_CHANNELS) -> int:
        return whole(f"{self.file}: {key}", self.plain(key, default), 1, most)

    def checked(self, keys: Mapping[str, tuple[object, Check]]) -> dict[str, Any]:
        """Values by their keys, each with its default and its check."""
        given = {key: self.plain(key, default) for key, (default, _) in keys.items()}
        return checked(given, {key: check for key, (_, check) in keys.items()}, f"{self.file}: ")

    def ints(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        value = self.config.get(key, default)
        if not isinstance(value, list | tuple) or not 1 <= len(value) <= MOST_LEVELS:
            raise ValueError(
                f"{self.file}: {key} is {shown(value)}; expected a list of 1 to {MOST_LEVELS} whole numbers, one per "
                "level"
            )
        return wholes(f"{self.file}: {key}", value, 1, MOST_CHANNELS)

    def per_level(self, key: str, default: int, levels: int, most: int = MOST_CHANNELS) -> tuple[int, ...]:
        value = self.config.get(key, default)
        if not isinstance(value, list | tuple):
            return (self.whole(key, default, most),) * levels
        if len(value) != levels:
            raise ValueError(
                f"{self.file}: {key} has {len(value)} values; expected {levels}, one per level of block_out_channels"
            )
        return wholes(f"{self.file}: {key}", value, 1, most)

    def blocks(
        self, key: str, plain: str, cross: str | None, default: tuple[bool, ...], levels: int
    ) -> tuple[bool, ...]:
        value = self.config.get(key)
        if value is None:
            value = [cross if has else plain for has in default]
        if not isinstance(value, list | tuple) or any(kind not in (plain, cross) for kind in value):
            kinds = plain if cross is None else f"{plain} or {cross}"
            raise ValueError(
                f"{self.file}: {key} is {shown(value)}; expected a list of {kinds}, the blocks of Stable Diffusion 1.x"
            )
        if len(value) != levels:
            raise ValueError(
                f"{self.file}: {key} names {len(value)} blocks; expected {levels}, one per level of block_out_channels"
            )
        return tuple(kind == cross for kind in value)

    def mid_block(self) -> bool:
        kind = self.config.get("mid_block_type", _MID_BLOCK)
        if kind not in (_MID_BLOCK, None):
            raise self._other_kind("mid_block_type", kind, f"{_MID_BLOCK!r} or null")
        return kind is not None

    def sample_size(self, default: int) -> int:
        """The edge of the latents in training; null in some folders, where the size comes from the call."""
        if self.config.get("sample_size") is None:
            return default
        size, version = self.whole("sample_size", default, MOST_EDGE), str(self.config.get("_diffusers_version"))
        numbers = re.match(r"0\.(\d+)\.", version)
        # Before diffusers 0.9 fine-tuning scripts wrote 32 by mistake; StableDiffusionPipeline reads 64 instead.
        return max(size, default) if numbers is not None and int(numbers[1]) < 9 else size

    def refuse_other_kinds(self, fixed: Mapping[str, object]) -> None:
        """ValueError if a key that changes the computation differs from Stable Diffusion 1.x."""
        for key, needed in fixed.items():
            value = self.plain(key, needed)
            if value != needed and (needed is not None or value):
                raise self._other_kind(key, self.config[key], repr("null or false" if needed is None else needed))

    def _other_kind(self, key: str, value: object, needed: str) -> ValueError:
        return ValueError(
            f"{self.file}: {key} is {shown(value)}; Stable Diffusion 1.x needs {needed}. This is another kind of model"
        )


def _check_groups(file: str, groups: int, widths: tuple[int, ...]) -> None:
    if any(width % groups for width in widths):
        raise ValueError(
            f"{file}: norm_num_groups is {groups}, which does not divide block_out_channels {list(widths)}"
        )
