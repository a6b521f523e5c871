"""Frozen descriptions of the networks, read from the config.json of a model folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

# What a config.json may say besides the keys read below. Any other value asks for a network that Stable Diffusion 1.x
# does not have.
_UNET_FIXED: dict[str, object] = {
    "act_fn": "silu",
    "addition_embed_type_num_heads": 64,
    "attention_type": "default",
    "center_input_sample": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "dropout": 0.0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "resnet_out_scale_factor": 1.0,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "transformer_layers_per_block": 1,
}
_VAE_FIXED: dict[str, object] = {
    "act_fn": "silu",
    "force_upcast": True,  # says how diffusers casts in half precision; minidiff detects an overflow instead
    "mid_block_add_attention": True,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}


@dataclass(frozen=True)
class UNetConfig:
    """The UNet's shape. The defaults are Stable Diffusion 1.5.

    `down_attention` and `up_attention` say which blocks hold transformers, in the order in which they run.
    `num_heads` has one value per level, from the outermost in; the folder format calls it `attention_head_dim`,
    although it counts heads.
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    down_attention: tuple[bool, ...] = (True, True, True, False)
    up_attention: tuple[bool, ...] = (False, True, True, True)
    layers_per_block: tuple[int, ...] = (2, 2, 2, 2)
    num_heads: tuple[int, ...] = (8, 8, 8, 8)
    cross_attention_dim: int = 768
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    use_linear_projection: bool = False
    sample_size: int = 64

    @classmethod
    def from_dict(cls, config: Mapping[str, object]) -> "UNetConfig":
        """Read unet/config.json. ValueError where it describes something other than an SD 1.x UNet."""
        read = _Reader("unet/config.json", config)
        widths = read.ints("block_out_channels", cls.block_out_channels)
        levels = len(widths)
        if read.plain("num_attention_heads", None) is not None:
            raise ValueError(
                "unet/config.json: num_attention_heads is set, which the folder format does not define; "
                "expected the number of heads in attention_head_dim"
            )
        found = cls(
            in_channels=read.whole("in_channels", cls.in_channels),
            out_channels=read.whole("out_channels", cls.out_channels),
            block_out_channels=widths,
            down_attention=read.blocks(
                "down_block_types", "DownBlock2D", "CrossAttnDownBlock2D", cls.down_attention, levels
            ),
            up_attention=read.blocks("up_block_types", "UpBlock2D", "CrossAttnUpBlock2D", cls.up_attention, levels),
            layers_per_block=read.per_level("layers_per_block", 2, levels),
            num_heads=read.per_level("attention_head_dim", 8, levels),
            # diffusers' own default when the key is missing
            cross_attention_dim=read.whole("cross_attention_dim", 1280),
            norm_num_groups=read.whole("norm_num_groups", cls.norm_num_groups),
            norm_eps=read.number("norm_eps", cls.norm_eps),
            flip_sin_to_cos=bool(read.plain("flip_sin_to_cos", True)),
            freq_shift=read.number("freq_shift", cls.freq_shift),
            use_linear_projection=bool(read.plain("use_linear_projection", False)),
            # null in some folders: the size of the image then comes from the call, or from SD 1.5's 64
            sample_size=cls.sample_size
            if config.get("sample_size") is None
            else read.whole("sample_size", cls.sample_size),
        )
        read.refuse_the_rest(_UNET_FIXED, known=("sample_size",))
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
            in_channels=read.whole("in_channels", cls.in_channels),
            out_channels=read.whole("out_channels", cls.out_channels),
            latent_channels=read.whole("latent_channels", cls.latent_channels),
            block_out_channels=widths,
            layers_per_block=read.whole("layers_per_block", 1),
            norm_num_groups=read.whole("norm_num_groups", cls.norm_num_groups),
            scaling_factor=read.number("scaling_factor", cls.scaling_factor),
        )
        # sample_size: the size it was trained at, which nothing depends on
        read.refuse_the_rest({**_VAE_FIXED, "force_upcast": config.get("force_upcast")}, known=("sample_size",))
        _check_groups("vae/config.json", found.norm_num_groups, widths)
        return found


class _Reader:
    """Typed access to a config dict that remembers which keys were read, so that the rest can be refused."""

    def __init__(self, file: str, config: Mapping[str, object]) -> None:
        self.file, self.config, self.seen = file, config, set[str]()

    def plain(self, key: str, default: object) -> object:
        self.seen.add(key)
        return self.config.get(key, default)

    def whole(self, key: str, default: int) -> int:
        value = self.plain(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{self.file}: {key} is {value!r}; expected a whole number of at least 1")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.plain(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{self.file}: {key} is {value!r}; expected a number")
        return value

    def ints(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        value = self.plain(key, default)
        if not isinstance(value, list | tuple) or not value or not all(isinstance(v, int) and v > 0 for v in value):
            raise ValueError(f"{self.file}: {key} is {value!r}; expected a list of whole numbers, one per level")
        return tuple(value)

    def per_level(self, key: str, default: int, levels: int) -> tuple[int, ...]:
        value = self.config.get(key, default)
        if isinstance(value, list | tuple):
            if len(value) != levels:
                raise ValueError(
                    f"{self.file}: {key} has {len(value)} values; "
                    f"expected {levels}, one per level of block_out_channels"
                )
            return self.ints(key, ())
        return (self.whole(key, default),) * levels

    def blocks(
        self, key: str, plain: str, cross: str | None, default: tuple[bool, ...], levels: int
    ) -> tuple[bool, ...]:
        value = self.plain(key, None)
        if value is None:
            value = [cross if has else plain for has in default]
        if not isinstance(value, list | tuple) or any(kind not in (plain, cross) for kind in value):
            kinds = plain if cross is None else f"{plain} or {cross}"
            raise ValueError(
                f"{self.file}: {key} is {value!r}; expected a list of {kinds}, the blocks of Stable Diffusion 1.x"
            )
        if len(value) != levels:
            raise ValueError(
                f"{self.file}: {key} names {len(value)} blocks; expected {levels}, one per level of block_out_channels"
            )
        return tuple(kind == cross for kind in value)

    def refuse_the_rest(self, fixed: Mapping[str, object], known: tuple[str, ...]) -> None:
        """Keys that were not read must hold their one supported value; keys unknown here must be off."""
        for key, value in self.config.items():
            if key.startswith("_") or key in self.seen or key in known:
                continue
            if key in fixed and value == fixed[key]:
                continue
            if key not in fixed and (value is None or value is False):
                continue
            expected = fixed.get(key, "null or false")
            raise ValueError(
                f"{self.file}: {key} is {value!r}; Stable Diffusion 1.x needs {expected!r}. "
                "This is another kind of model"
            )


def _check_groups(file: str, groups: int, widths: tuple[int, ...]) -> None:
    if any(width % groups for width in widths):
        raise ValueError(
            f"{file}: norm_num_groups is {groups}, which does not divide block_out_channels {list(widths)}"
        )


class HasShape(Protocol):
    """A tensor, or what a file's header says of one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> object: ...


@dataclass(frozen=True)
class StateProblems:
    """What keeps weights from fitting a network: keys; for `wrong` ones a line that says what is and what should be."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    wrong: tuple[str, ...]


def state_problems(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, HasShape]) -> StateProblems:
    """Compare the tensors of a file with the shapes that a network needs.

    Edges of length 1 at the end do not count: a 1x1 convolution and a linear layer hold the same numbers. Integers are
    refused: what they stand for is told elsewhere, if anywhere.
    """
    both = [(key, shape, found[key]) for key, shape in expected.items() if key in found]
    shapes = [
        f"{key} has shape {list(tensor.shape)}, expected {list(shape)}"
        for key, shape, tensor in both
        if _trimmed(tensor.shape) != _trimmed(shape)
    ]
    dtypes = [
        f"{key} has dtype {tensor.dtype}, expected floating-point numbers; quantised weights are not read"
        for key, _, tensor in both
        if not _floating(tensor.dtype)
    ]
    return StateProblems(
        missing=tuple(key for key in expected if key not in found),
        unexpected=tuple(key for key in found if key not in expected),
        wrong=(*shapes, *dtypes),
    )


def check_state(name: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, HasShape]) -> None:
    """One ValueError that names every missing, unexpected and misshapen key of a network's weights."""
    problems = state_problems(expected, found)
    lines = [f"missing {key}" for key in problems.missing] + [f"unexpected {key}" for key in problems.unexpected]
    lines += problems.wrong
    if lines:
        raise ValueError(f"the weights do not fit the {name} that its config describes:\n  " + "\n  ".join(lines))


def _floating(dtype: object) -> bool:
    """By its name, torch's ("torch.bfloat16") or that in a file ("BF16")."""
    return str(dtype).removeprefix("torch.").upper().startswith(("F", "BF"))


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    end = len(shape)
    while end > 1 and shape[end - 1] == 1:
        end -= 1
    return tuple(shape[:end])
