"""Key tables: the names in weight files, mapped to those of our modules, which are the folder format's.

Each table maps a module path in the file, or a prefix of one, to ours; the longest match applies, and the rest of the
key is kept, so an inverted table maps back. LDM names number the layers through a whole side of the network; see
weights.md.
"""

from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")

LDM_PREFIX = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}
"""The prefix of each network in a single file with LDM names. A stand-alone VAE file has no prefix."""

IGNORED = (
    "alphas_cumprod",
    "betas",
    "global_step",
    "log_one_minus_alphas_cumprod",
    "logvar",
    "loss.",
    "model_ema.",
    "posterior_",
    "sqrt_",
    "lvlb_weights",
    "scale_factor",
    "v_pred",
    "ztsnr",
)
"""Prefixes of keys that are no weights of a network: the schedule (recomputed exactly) and its markers, the trainer's
state, and a second, averaged (EMA) copy of the UNet."""

TEXT_IGNORED = ("position_ids", "text_projection.weight", "logit_scale")
"""Suffixes of keys that a text encoder does not need: position ids 0, 1, ... (corrupted in some merged files), and what
CLIP uses to compare texts with images."""

_BARE_UNET = ("diffusion_model.", "input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "out.")

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}

VAE_OLD_ATTENTION = {
    f"{side}.mid_block.attentions.0.{old}": f"{side}.mid_block.attentions.0.{new}"
    for side in ("encoder", "decoder")
    for old, new in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items()
}
"""Folders written before 2023 (SD 1.5's fp32 VAE is one) name the linear layers of the VAE's attention differently."""


def unet_ldm(levels: int = 4, layers: int = 2) -> dict[str, str]:
    """LDM names of the UNet -> ours, for `levels` resolutions with `layers` resnets each on the way down.

    `input_blocks` (from 1) and `output_blocks` (from 0) count the layers across all levels; a change of resolution has
    its own number on the way down, and shares the number of its level's last layer on the way up.
    """
    table = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "middle_block.1": "mid_block.attentions.0",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    resnets = {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}
    for level in range(levels):
        for layer in range(layers):
            n = 1 + level * (layers + 1) + layer
            resnets[f"input_blocks.{n}.0"] = f"down_blocks.{level}.resnets.{layer}"
            table[f"input_blocks.{n}.1"] = f"down_blocks.{level}.attentions.{layer}"
        if level < levels - 1:
            table[f"input_blocks.{(level + 1) * (layers + 1)}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        for layer in range(layers + 1):
            n = level * (layers + 1) + layer
            resnets[f"output_blocks.{n}.0"] = f"up_blocks.{level}.resnets.{layer}"
            table[f"output_blocks.{n}.1"] = f"up_blocks.{level}.attentions.{layer}"
        if level < levels - 1:
            n = level * (layers + 1) + layers
            # After the transformer if the level has one, else in its place.
            table[f"output_blocks.{n}.1.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
            table[f"output_blocks.{n}.2.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return table | _within(resnets, _RESNET)


def vae_ldm(levels: int = 4, layers: int = 2) -> dict[str, str]:
    """LDM names of the VAE -> ours. The decoder's levels are numbered backwards."""
    table: dict[str, str] = {}
    resnets: dict[str, str] = {}
    for side in ("encoder", "decoder"):
        table[f"{side}.norm_out"] = f"{side}.conv_norm_out"
        resnets[f"{side}.mid.block_1"] = f"{side}.mid_block.resnets.0"
        resnets[f"{side}.mid.block_2"] = f"{side}.mid_block.resnets.1"
        table |= _within({f"{side}.mid.attn_1": f"{side}.mid_block.attentions.0"}, _VAE_ATTENTION)
    for level in range(levels):
        for layer in range(layers):
            resnets[f"encoder.down.{level}.block.{layer}"] = f"encoder.down_blocks.{level}.resnets.{layer}"
        table[f"encoder.down.{level}.downsample.conv"] = f"encoder.down_blocks.{level}.downsamplers.0.conv"
        ours = levels - 1 - level
        for layer in range(layers + 1):
            resnets[f"decoder.up.{level}.block.{layer}"] = f"decoder.up_blocks.{ours}.resnets.{layer}"
        table[f"decoder.up.{level}.upsample.conv"] = f"decoder.up_blocks.{ours}.upsamplers.0.conv"
    return table | resnets | _within(resnets, {"nin_shortcut": "conv_shortcut"})


def unwrap(tensors: Mapping[str, T]) -> dict[str, T]:
    """A single file's tensors under the original Stable Diffusion names, undoing other programs' changes.

    Prefixes that training frameworks add to every key are removed; a UNet or text encoder that merging programs saved
    under a shorter or longer prefix gets the usual one.
    """
    found = dict(tensors)
    for wrapper in ("state_dict.", "module.", "model.") * 2:
        if any(key.startswith(wrapper) and LDM_PREFIX["unet"] in key[len(wrapper) :] for key in found):
            found = {key.removeprefix(wrapper): tensor for key, tensor in found.items()}
    if _any(found, ("first_stage_model.", "cond_stage_model.")) and not _any(found, LDM_PREFIX["unet"]):
        found = {
            LDM_PREFIX["unet"] + key.removeprefix("diffusion_model.") if key.startswith(_BARE_UNET) else key: tensor
            for key, tensor in found.items()
        }
    return {
        key.replace("cond_stage_model.clip_l.transformer.", LDM_PREFIX["text_encoder"]): tensor
        for key, tensor in found.items()
    }


def _any(keys: Iterable[str], front: str | tuple[str, ...]) -> bool:
    return any(key.startswith(front) for key in keys)


def rename(key: str, table: Mapping[str, str]) -> str:
    """The key with its longest prefix in the table replaced; unchanged if there is none."""
    parts = key.split(".")
    for n in range(len(parts) - 1, 0, -1):
        front = ".".join(parts[:n])
        if front in table:
            return ".".join([table[front], *parts[n:]])
    return key


def renamed(tensors: Mapping[str, T], table: Mapping[str, str]) -> dict[str, T]:
    """All tensors, with keys renamed by the table."""
    return {rename(key, table): tensor for key, tensor in tensors.items()}


def invert(table: Mapping[str, str], keys: Iterable[str]) -> dict[str, str]:
    """The table from our names to the file's, for the network with these keys (our names).

    The keys resolve the one ambiguity, the number of an upsampler in LDM names: 2 after a transformer, else 1.
    """
    keys = set(keys)
    inverse: dict[str, str] = {}
    for theirs, ours in table.items():
        if ours not in inverse:
            inverse[ours] = theirs
            continue
        block = ours.removesuffix("upsamplers.0.conv")
        if any(key.startswith(f"{block}attentions.") for key in keys):
            inverse[ours] = max(theirs, inverse[ours])
    return inverse


def _within(modules: Mapping[str, str], inner: Mapping[str, str]) -> dict[str, str]:
    return {f"{theirs}.{a}": f"{ours}.{b}" for theirs, ours in modules.items() for a, b in inner.items()}
