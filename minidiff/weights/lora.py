"""LoRAs and their kin: files that say how some layers' weights change, merged into a model.

Adding a format is one row of FORMATS, with a function that makes a layer's change from its tensors, and their names in
lora_names.PARTS. Sources: LoRA, Hu et al. 2021; LoCon, LoHa and LoKr, Yeh et al. 2023 (LyCORIS); DoRA, Liu et al. 2024.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ..checks import not_finite, number, shown, warn
from ..model import Adapter, Model
from ..networks.config import UNetConfig
from ..networks.text import PREFIX
from ..speed.replace import adapted
from ..vocabulary import own_keywords
from .files import Stored, file_metadata, read_tensors, sha256, stored_tensors
from .lora_names import TEXT, UNET, WORDS, PeftAlpha, Place, alphas, layer_names, numbered_names, split
from .recognise import CONTEXTS, TEXT_WIDTHS, lora_problem

Parts = Mapping[str, Tensor]
Term: TypeAlias = "tuple[float, Change, Parts]"
Shapes = Mapping[str, Sequence[int]]


@own_keywords
@dataclass(frozen=True)
class LoRA:
    """A LoRA file and how strongly it counts: LoRA("style.safetensors", 0.8).

    weight: 1 is as it was trained, 0 leaves it out; any number. text_weight: the same for the text encoder's part;
    default: weight.
    """

    file: str | Path
    weight: float = 1.0
    text_weight: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.file, str | Path) or not str(self.file):
            raise ValueError(f"file is {shown(self.file)}; expected the path of a .safetensors file")
        object.__setattr__(self, "weight", number("weight", self.weight))
        if self.text_weight is not None:
            object.__setattr__(self, "text_weight", number("text_weight", self.text_weight))

    @property
    def path(self) -> Path:
        """Where the file is."""
        return Path(self.file).expanduser()

    def of(self, network: str) -> float:
        """The weight for UNET or TEXT."""
        return self.weight if network == UNET or self.text_weight is None else self.text_weight


def read_loras(loras: object) -> tuple[LoRA, ...]:
    """What load(loras=...) and with_loras take, LoRAs or files, as LoRAs. ValueError for others and for files that are
    not there or cannot be read."""
    if isinstance(loras, str | Path | LoRA) or not isinstance(loras, Sequence):
        raise ValueError(f"loras is {shown(loras)}; expected a list of files or LoRA(file, weight)")
    for lora in loras:
        if not isinstance(lora, str | Path | LoRA):
            raise ValueError(f"loras holds {shown(lora)}; expected files or LoRA(file, weight)")
    found = tuple(lora if isinstance(lora, LoRA) else LoRA(lora) for lora in loras)
    for lora in found:
        stored_tensors(lora.path)
    return found


@own_keywords
def with_loras(model: Model, *loras: LoRA | str | Path, strict: bool = True) -> Model:
    """The model with LoRAs merged into the weights that they touch; it shares all others with the given one, which does
    not change: with_loras(model, LoRA("style.safetensors", 0.8), "lcm.safetensors").

    Reads LoRA, LoCon, LoHa, LoKr, DoRA and full differences (`diff`), in the names of Kohya, diffusers (old and PEFT)
    and cloneofsimo. The changes of all, each computed in float32 from the given model's weights, are added up before
    they are rounded to the model's dtype. A DoRA below weight 1 goes that part of the way to its weights at 1, as in
    A1111 and ComfyUI.
    strict: False leaves keys that fit nowhere out, with a warning.
    ValueError for a file of another kind or for another model (Stable Diffusion 2, XL, Flux, by name), a damaged one,
    NaN or infinity, tensors that do not fit together or to the model, keys that fit nowhere (listed).
    """
    if not isinstance(model, Model):
        raise ValueError(f"model is {shown(model)}; expected one from minidiff.load")
    shapes = {UNET: shapes_of(model.unet), TEXT: shapes_of(model.text.model)}
    terms: dict[str, dict[str, list[Term]]] = {UNET: defaultdict(list), TEXT: defaultdict(list)}
    adapters = []
    for lora in read_loras(loras):
        changes = read_changes(lora.path, shapes, model.unet.config, strict)
        tensors = _read(lora.path, changes, model.device)
        for change in changes:
            network, name = change.place
            if lora.of(network) != 0:
                parts = {part: tensors[stored.key] for part, stored in change.parts.items()}
                terms[network][name].append((lora.of(network), change, parts))
        adapters.append(_adapter(lora))
    text = adapted(model.text.model, _Merged(model.text.model, terms[TEXT]))
    return replace(
        model,
        unet=adapted(model.unet, _Merged(model.unet, terms[UNET])),
        text=replace(model.text, model=text),
        adapters=(*model.adapters, *adapters),
    )


def _adapter(lora: LoRA) -> Adapter:
    weights = {"weight": lora.weight} | ({} if lora.text_weight is None else {"text_weight": lora.text_weight})
    # A1111's own hash of the file: Kohya's, of its tensors alone, in the header or computed.
    short = file_metadata(lora.path).get("sshs_model_hash", "")
    if not re.fullmatch("[0-9a-f]{12,64}", short):
        short = sha256(lora.path, header=False)
    return Adapter("lora", lora.path.stem, lora.path.name, sha256(lora.path), weights, short[:12])


class _Merged(Mapping[str, Tensor]):
    """Merged weights by their names in a network, made one by one when they are asked for."""

    def __init__(self, network: nn.Module, terms: Mapping[str, Sequence[Term]]) -> None:
        self.weights = dict(network.named_parameters(remove_duplicate=False))
        own = {PREFIX + name.removeprefix(PREFIX): name for name in self.weights}  # transformers < 5.6 has the prefix
        self.terms = {name if name in self.weights else own[name]: found for name, found in terms.items()}

    def __getitem__(self, name: str) -> Tensor:
        stored = self.weights[name].detach()
        total = weight = (stored.to_dense() if stored.is_mkldnn else stored).float()
        for factor, change, parts in self.terms[name]:
            total = change.added(total, weight, factor, parts)
        return total

    def __iter__(self) -> Iterator[str]:
        return iter(self.terms)

    def __len__(self) -> int:
        return len(self.terms)


# ---- formats


def _low_rank(p: Parts) -> Tensor:
    up, down = p["up"].flatten(1), p["down"].flatten(1)
    if "mid" in p:  # LoCon's Tucker decomposition: down, a small convolution, up
        return torch.einsum("mn...,om,ni->oi...", p["mid"], up, down)
    return up @ down


def _hadamard(p: Parts) -> Tensor:
    first, second = (_product(p, f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}") for n in (1, 2))
    return first * second


def _kronecker(p: Parts) -> Tensor:
    first = p["lokr_w1"] if "lokr_w1" in p else _product(p, "lokr_w1_a", "lokr_w1_b")
    second = p["lokr_w2"] if "lokr_w2" in p else _product(p, "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    return torch.kron(first, second.flatten(1))


def _product(p: Parts, left: str, right: str, core: str = "") -> Tensor:
    """left [O,r] @ right [r,I...], or with a core [r,r,...] left [r,O] and right [r,I]."""
    if core in p:
        return torch.einsum("mn...,mo,ni->oi...", p[core], p[left], p[right])
    return p[left] @ p[right].flatten(1)


def _difference(p: Parts) -> Tensor:
    return p["diff"]


@dataclass(frozen=True)
class Format:
    """A kind of change, with its parts. ranks: those whose first edge is the rank, where there is one."""

    name: str
    delta: Callable[[Parts], Tensor]
    parts: str
    ranks: str = ""


FORMATS = (
    Format("LoRA", _low_rank, "down up mid", "down"),
    Format("LoHa", _hadamard, "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2", "hada_w1_b"),
    Format(
        "LoKr", _kronecker, "lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2", "lokr_w1_b lokr_w2_b"
    ),
    Format("full", _difference, "diff"),
)


@dataclass(frozen=True)
class Change:
    """What a file does to one weight. alpha: where no tensor says it, the header; None: the rank."""

    place: Place
    format: Format
    parts: Mapping[str, Stored]
    alpha: float | None = None

    @property
    def rank(self) -> int | None:
        """None for a format without one."""
        return next((self.parts[part].shape[0] for part in self.format.ranks.split() if part in self.parts), None)

    @property
    def kind(self) -> str:
        """The format's name, as its users say it."""
        decomposed = self.parts.keys() & {"dora_scale", "magnitude"}
        convolution = self.format.name == "LoRA" and any(max(p.shape[2:], default=1) > 1 for p in self.parts.values())
        return f"{'DoRA, ' if decomposed else ''}{'LoCon' if convolution else self.format.name}"

    def added(self, total: Tensor, weight: Tensor, factor: float, parts: Parts) -> Tensor:
        """A new tensor: total + factor * what is added to the weight at 1."""
        if self.format is FORMATS[0] and parts.keys() <= {"up", "down", "alpha"}:  # one pass, no memory for the product
            up, down = parts["up"].flatten(1), parts["down"].flatten(1)
            alpha = self.alpha if self.alpha is not None else float(parts.get("alpha", len(down)))
            return torch.addmm(total.flatten(1), up, down, alpha=factor * alpha / len(down)).view_as(total)
        return torch.add(total, self.delta(parts, weight), alpha=factor)

    def delta(self, parts: Parts, weight: Tensor) -> Tensor:
        """What is added to the weight, of its shape, in float32. RuntimeError or KeyError where parts do not fit."""
        found = self.format.delta(parts)
        if self.rank == 0:
            raise RuntimeError("they have no rank")
        if self.rank is not None and ("alpha" in parts or self.alpha is not None):
            alpha = self.alpha if self.alpha is not None else parts["alpha"].reshape(())
            found = found * (alpha / self.rank)
        if found.shape[:1] != weight.shape[:1]:
            raise RuntimeError(f"they make {list(found.shape)}")
        found = found.reshape(weight.shape)
        if "dora_scale" in parts:
            scale = parts["dora_scale"]
            rows = scale.ndim < 2 or scale.shape[0] == scale.numel()
            return _decomposed(weight + found, scale, 0 if rows else 1) - weight
        if "magnitude" in parts:  # PEFT's, always one number a row
            return _decomposed(weight + found, parts["magnitude"], 0) - weight
        return found


def _decomposed(weight: Tensor, scale: Tensor, axis: int) -> Tensor:
    """The weight with each row (axis 0) or column (axis 1) as long as the scale says."""
    length = torch.linalg.vector_norm(weight, dim=[n for n in range(weight.ndim) if n != axis], keepdim=True)
    return weight * (scale.reshape(length.shape) / length.clamp_min(torch.finfo(torch.float32).eps))


# ---- files


def read_changes(
    path: Path, networks: Mapping[str, Shapes], config: UNetConfig, strict: bool = True, model: str = "the model"
) -> list[Change]:
    """What a file changes in networks with weights of these shapes (names as in the folder format), from its header
    alone. ValueError as with_loras, but for NaN. model: its name in messages."""
    tensors = stored_tensors(path)
    problem = lora_problem({key: stored.shape for key, stored in tensors.items()})
    if problem is not None:
        raise ValueError(f"{path} cannot be put on {model}: {problem}")
    layers, left = _layers(path, tensors, networks, config)
    words, unknown = [key for key in left if WORDS.match(key)], [key for key in left if not WORDS.match(key)]
    changes = _changes(path, layers, list(alphas(path, file_metadata(path))))
    _check_fit(path, changes, networks, model)
    if unknown and (strict or not changes):
        raise ValueError(
            f"{path} has {len(unknown)} of {len(tensors)} keys that fit nowhere in the model: {_list(unknown)}. It is "
            "for another model, or of a format that minidiff does not read; strict=False of with_loras leaves them out"
        )
    if words:
        warn(f"{path.name} also holds the words {_list(words)}, which are left out")
    if unknown:
        warn(f"{path.name}: {len(unknown)} of {len(tensors)} keys that fit nowhere are left out: {_list(unknown)}")
    return changes


def shapes_of(network: nn.Module) -> dict[str, torch.Size]:
    """Shapes of a network's weights, a text encoder's by their names in the hub's files."""
    text = not hasattr(network, "conv_in")
    return {
        (PREFIX + name.removeprefix(PREFIX) if text else name): value.shape
        for name, value in network.named_parameters(remove_duplicate=False)
    }


def _layers(
    path: Path, tensors: Mapping[str, Stored], networks: Mapping[str, Shapes], config: UNetConfig
) -> tuple[dict[Place, dict[str, Stored]], list[str]]:
    """The parts of each layer's change, and the keys that fit nowhere."""
    unet, text = (
        [name.removesuffix(".weight") for name in networks[network] if name.endswith(".weight")]
        for network in (UNET, TEXT)
    )
    table = layer_names(unet, text, len(config.block_out_channels), config.layers_per_block[0])
    table |= numbered_names(tensors, unet, text)
    layers: dict[Place, dict[str, Stored]] = defaultdict(dict)
    left = []
    for key, stored in tensors.items():
        name, part = split(key)
        if part is None or name not in table:
            left.append(key)
        elif part in (there := layers[table[name]]):
            raise ValueError(f"{path} changes one layer twice, as {there[part].key} and {key}; expected it once")
        else:
            there[part] = stored
    return layers, left


def _changes(path: Path, layers: Mapping[Place, Mapping[str, Stored]], configs: Sequence[PeftAlpha]) -> list[Change]:
    changes, problems = [], []
    for (network, layer), there in layers.items():
        parts = dict(there)
        if "diff_b" in parts:
            changes.append(Change((network, f"{layer}.bias"), FORMATS[-1], {"diff": parts.pop("diff_b")}))
            if not parts:
                continue
        kinds = [format for format in FORMATS if parts.keys() & set(format.parts.split())]
        if len(kinds) != 1:
            names = ", ".join(stored.key for stored in parts.values())
            problems.append(f"{names}: {'parts of several formats' if kinds else f'nothing that changes {layer}'}")
            continue
        change = Change((network, f"{layer}.weight"), kinds[0], parts)
        alpha = next((one.of(layer, change.rank) for one in configs if one.network == network), None)
        changes.append(change if alpha is None or "alpha" in parts else replace(change, alpha=alpha))
    _refuse(path, problems)
    return changes


_TELLING = (
    (UNET, ("attn2.to_k.weight", "attn2.to_v.weight"), {768: TEXT_WIDTHS[768], **CONTEXTS}),
    (TEXT, ("q_proj.weight", "k_proj.weight", "v_proj.weight", "fc1.weight"), TEXT_WIDTHS),
)
"""Weights of a network that read texts, by how their names end, and whose models the width of these texts tells."""


def _check_fit(path: Path, changes: Sequence[Change], networks: Mapping[str, Shapes], model: str) -> None:
    """Makes each change without numbers."""
    problems = []
    for change in changes:
        network, name = change.place
        shape = networks[network].get(name)
        parts = {part: torch.empty(stored.shape, device="meta") for part, stored in change.parts.items()}
        listed = ", ".join(f"{stored.key} {list(stored.shape)}" for stored in change.parts.values())
        if shape is None:
            problems.append(f"{listed}: {name} is no weight of the {network}")
            continue
        try:
            known = next((known for one, ends, known in _TELLING if one == network and name.endswith(ends)), {})
            width = change.format.delta(parts)[0].numel() if known else shape[-1]
            if width != shape[-1] and width in known:
                raise ValueError(
                    f"{path} cannot be put on {model}: it is a LoRA for {known[width]} (its text is {width} wide, "
                    f"{model}'s {shape[-1]})"
                )
            change.delta(parts, torch.empty(shape, device="meta"))
        except KeyError as error:
            problems.append(f"{listed}: its {error.args[0]} is missing")
        except (RuntimeError, IndexError):
            problems.append(f"{listed}: they do not make a change of {name} {list(shape)}")
    _refuse(path, problems, model)


def _refuse(path: Path, problems: Sequence[str], model: str = "the model") -> None:
    if problems:
        more = [f"and {len(problems) - 5} more"] if len(problems) > 5 else []
        raise ValueError("\n  ".join([f"{path} does not fit {model}:", *problems[:5], *more]))


def _read(path: Path, changes: Sequence[Change], device: torch.device) -> dict[str, Tensor]:
    """The tensors of the changes by key in float32; ValueError for NaN and infinity."""
    wanted = {stored.key: stored for change in changes for stored in change.parts.values()}
    shapes = {key: torch.Size(stored.shape) for key, stored in wanted.items()}
    tensors = read_tensors(wanted, shapes, torch.float32, device)
    bad = not_finite(tensors)
    if bad:
        raise ValueError(
            f"{path} holds values that are not finite (NaN or infinity), in {len(bad)} of {len(tensors)} tensors: "
            f"{_list(bad)}. Its training failed, or it was damaged; take another file of it"
        )
    return tensors


def _list(keys: Sequence[str]) -> str:
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
