"""The names that LoRA files use: of the layers that they change, and of the tensors that they keep for each."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..networks.text import PREFIX
from .names import invert, rename, unet_ldm

UNET, TEXT = "UNet", "text encoder"
Place = tuple[str, str]
"""UNET or TEXT, and the path of a layer in it, as the folder format names it."""

PARTS = {
    "lora_down.weight": "down",  # Kohya
    "lora_up.weight": "up",
    "lora_mid.weight": "mid",
    "lora_A.weight": "down",  # PEFT
    "lora_B.weight": "up",
    "down.weight": "down",  # diffusers before PEFT
    "up.weight": "up",
    "down": "down",  # cloneofsimo
    "up": "up",
    "alpha": "alpha",
    "dora_scale": "dora_scale",
    "lora_magnitude_vector": "magnitude",  # PEFT's name of the same
    "lora_magnitude_vector.weight": "magnitude",
    "diff": "diff",
    "diff_b": "diff_b",
    "w_norm": "diff",  # LyCORIS, for norms
    "b_norm": "diff_b",
} | {
    name: name
    for name in (
        *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),  # LyCORIS: LoHa, LoKr
        *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    )
}
"""The end of a key in the file -> the part that the tensor has in its layer's change."""

WORDS = re.compile(r"<[^>]+>$|bundle_emb\.|(emb_params|clip_[lg])$")
"""Words learned with a LoRA and kept in its file."""

_NUMBERED = re.compile(r"(unet|text_encoder):\d+$")
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_LINEAR_OF_BLOCK = (*(f"attn1.{x}" for x in _ATTENTION), "ff.net.0.proj", *(f"attn2.{x}" for x in _ATTENTION))
_LINEAR_OF_TEXT = ("k_proj", "v_proj", "q_proj", "out_proj")


def split(key: str) -> tuple[str, str | None]:
    """A key as (layer's name, part); part None where the end is not in the table."""
    for dots in (2, 1):
        front, *ends = key.replace(":up", ".up").replace(":down", ".down").rsplit(".", dots)
        if ".".join(ends) in PARTS and len(ends) == dots:
            return front, PARTS[".".join(ends)]
    return key, None


def layer_names(unet: Iterable[str], text: Iterable[str], levels: int, layers: int) -> dict[str, Place]:
    """Every name that a file may have for a layer -> its place.

    unet, text: paths of the layers in the folder format's names. levels, layers: of the UNet, see names.unet_ldm.
    """
    unet, text = list(unet), list(text)
    ldm = invert(unet_ldm(levels, layers), [f"{path}.weight" for path in unet])
    table: dict[str, Place] = {}
    for path in unet:
        place, old = (UNET, path), rename(f"{path}.weight", ldm).removesuffix(".weight")
        for spelled in (path, old):
            table |= dict.fromkeys(
                (f"{front}{spelled.replace('.', '_')}" for front in ("lora_unet_", "lycoris_")), place
            )
        for name in _dotted(path, re.sub(r"\.to_(q|k|v|out)(\.0)?$", r".processor.to_\1_lora", path)):
            table |= {name: place, f"unet.{name}": place}
    for path in text:
        place = (TEXT, path)
        for front in ("lora_te_", "lora_te1_"):
            table[f"{front}{path.replace('.', '_')}"] = place
        for name in _dotted(path, re.sub(r"\.(q|k|v|out)_proj$", r".to_\1_lora", path)):
            table |= {f"text_encoder.{name}": place, f"text_encoder.{name.removeprefix(PREFIX)}": place}
    return table


def _dotted(path: str, old: str) -> set[str]:
    return {path, f"{path}.lora", f"{path}.lora_linear_layer", old}


def numbered_names(keys: Iterable[str], unet: Iterable[str], text: Iterable[str]) -> dict[str, Place]:
    """The names of cloneofsimo's format, unet:N, for the layers that its trainer takes by default, in the order of
    diffusers' modules of that time. None where the file counts others: numbers do not tell which.
    """
    named = {split(key)[0] for key in keys}
    blocks = list(dict.fromkeys(match[0] for path in unet if (match := re.match(r".*transformer_blocks\.\d+\.", path))))
    blocks.sort(key=lambda block: ("down", "up", "mid").index(block.partition("_")[0]))  # mid_block was registered last
    layers = list(dict.fromkeys(match[0] for path in text if (match := re.match(r".*\.self_attn\.", path))))
    table: dict[str, Place] = {}
    for front, network, paths in (
        ("unet", UNET, [f"{block}{layer}" for block in blocks for layer in _LINEAR_OF_BLOCK]),
        ("text_encoder", TEXT, [f"{layer}{name}" for layer in layers for name in _LINEAR_OF_TEXT]),
    ):
        places = {f"{front}:{n}": (network, path) for n, path in enumerate(paths)}
        if {name for name in named if _NUMBERED.match(name) and name.startswith(front)} == places.keys():
            table |= places
    return table


@dataclass(frozen=True)
class PeftAlpha:
    """What PEFT's config says of alpha for one network. by_root: it is divided by the root of the rank."""

    network: str
    alpha: float
    by_root: bool
    patterns: Mapping[str, float]

    def of(self, layer: str, rank: int | None) -> float:
        """The alpha of a layer, as a multiple of 1 / rank."""
        found = next((a for name, a in self.patterns.items() if re.match(rf"(.*\.)?({name})$", layer)), self.alpha)
        return found * math.sqrt(rank) if self.by_root and rank is not None else found


def alphas(path: Path, metadata: Mapping[str, str]) -> Iterator[PeftAlpha]:
    """PEFT's configs, which diffusers writes into a file's header. ValueError where they are damaged."""
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        for network, front in ((UNET, "unet."), (TEXT, "text_encoder.")):
            if f"{front}lora_alpha" in config:
                patterns = {str(re.compile(k).pattern): float(v) for k, v in config[f"{front}alpha_pattern"].items()}
                yield PeftAlpha(
                    network, float(config[f"{front}lora_alpha"]), bool(config[f"{front}use_rslora"]), patterns
                )
    except (ValueError, TypeError, AttributeError, KeyError, re.error) as error:
        raise ValueError(f"{path}: the lora_adapter_metadata in its header cannot be read: {error!r}") from error
