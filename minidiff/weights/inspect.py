"""What a model source holds and whether it would load, from configs and headers alone: 4 GB answer at once."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..model import Defaults
from ..networks.text import TextConfig
from ..networks.unet import UNet
from ..networks.vae import VAE
from ..sampling import NoiseSchedule, choose_sampler
from .files import Stored, stored_not_finite
from .image_prompt import image_adapter_summary
from .lora_info import lora_changes
from .names import IGNORED, LDM_PREFIX, TEXT_IGNORED
from .open import Config, Network, Source, Tensors, open_source, text_by_shape, text_network, unet_network, vae_network
from .recognise import AUTOENCODER, EMBEDDING, IMAGE_ADAPTER, TEXT_ENCODER, TEXT_WIDTHS, UNET, is_lora, unet_config
from .sources import CLIP_TOKENIZER, TOKENIZER_FILES, check_fit, shapes_of, vae_from_file
from .state import Problem
from .text import check_vocabulary, load_tokenizer
from .words import find_embedding

Read = TypeVar("Read")

_NAMES = {"unet": "UNet", "vae": "autoencoder", "text_encoder": "text encoder"}
# What is told of a network -> its name in the config
_UNET_SIZES = {
    "in_channels": "in_channels",
    "widths": "block_out_channels",
    "layers": "layers_per_block",
    "heads": "num_heads",
    "context_width": "cross_attention_dim",
    "sample_size": "sample_size",
}
_VAE_SIZES = {
    "widths": "block_out_channels",
    "layers": "layers_per_block",
    "latent_channels": "latent_channels",
    "scaling_factor": "scaling_factor",
}
_TEXT_SIZES = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "positions": "max_position_embeddings",
    "vocabulary": "vocab_size",
    "activation": "hidden_act",
}
_AVERAGED = ("model_ema.decay", "model_ema.num_updates")  # the averaging's own state, also where there are no averages


@dataclass(frozen=True)
class Content:
    """Counts over some tensors; `dtypes` counts tensors by the dtype's name in the file ("F16")."""

    tensors: int
    parameters: int
    nbytes: int
    dtypes: Mapping[str, int]


@dataclass(frozen=True)
class Part:
    """One network of a source, or the tensors that are of none. `file` lies below a folder; None in a single file."""

    name: str
    file: str | None
    config: Mapping[str, object]
    content: Content
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class Description:
    """A model folder or a weight file. `loads`: minidiff.load would take it; otherwise some problem says why not, or it
    is put on a model, and `use` says how.

    problems: of the whole; each part has its own. ignored: how many tensors of which kind are left out knowingly.
    foreign: keys that belong to no network of Stable Diffusion 1.x, which are left out with a warning.
    finite: whether every weight is; None where they were not read.
    """

    name: str
    kind: str
    loads: bool
    content: Content
    parts: tuple[Part, ...]
    problems: tuple[Problem, ...] = ()
    scheduler: Mapping[str, object] = field(default_factory=dict)
    tokenizer: Mapping[str, object] = field(default_factory=dict)
    ignored: Mapping[str, int] = field(default_factory=dict)
    foreign: tuple[str, ...] = ()
    use: str | None = None
    finite: bool | None = None

    def all_problems(self) -> list[str]:
        """In words, the first one first, each with the name of its part."""
        return [str(p) for p in self.problems] + [f"{part.name}: {p}" for part in self.parts for p in part.problems]


def describe(
    source: str | Path, *, variant: str | None = None, revision: str | None = None, check: bool = False
) -> Description:
    """Describe a folder, a .safetensors file or a hub id, each as `minidiff.load` would read it, from headers alone.

    A hub id is fetched first where the cache has it not. check: read every weight too, and name those that hold NaN or
    infinity; without it vectors (norms and biases) alone are looked at, as load does.
    ValueError where there is nothing to describe: no such source, a pickle, a damaged file, a folder of another kind.
    What is whole but cannot be loaded is described, with its problems.
    """
    found = open_source(source, variant, revision)
    folder = found.path if found.path.is_dir() else None
    problems: list[Problem] = []
    parts = tuple(_part(network, folder) for network in found.networks)
    tensors = [tensor for network in found.networks for tensor in network.tensors.values()]
    tokenizer: Config = {"from": f"{CLIP_TOKENIZER} in the hub's cache, or the folder given: a single file has none"}
    scheduler: Config = {}
    model = bool(parts)
    if not model:  # another file
        tensors = list(found.tensors.values())
        parts = _attempt(lambda: _alone(found), (), problems)
        problems += [] if found.kind.use else found.problems
    else:
        problems += found.problems
        scheduler = _attempt(lambda: _scheduler(found.scheduler) if found.scheduler else {}, {}, problems)
        if folder is not None:
            tokenizer = _attempt(lambda: _tokenizer(folder / "tokenizer", found.text.made), {}, problems)
        if not problems and not any(part.problems for part in parts):
            _attempt(lambda: _fit(found, tokenizer), None, problems)
    bad = stored_not_finite(tensors, every=check)
    if bad:
        problems.append(Problem("tensors hold NaN or infinity", tuple(bad)))
    return Description(
        name=found.name if folder is not None else found.path.name,
        kind=found.kind.name.replace("1.x", "1.x inpainting") if _inpaints(found) else found.kind.name,
        loads=model and not problems and not any(part.problems for part in parts),
        content=_content(found.tensors.values() or tensors),
        parts=parts,
        problems=tuple(problems),
        scheduler=scheduler,
        tokenizer=tokenizer if model else {},
        ignored=_ignored(found.tensors) if model else {},
        foreign=found.foreign if model else (),
        use=found.kind.use,
        finite=not bad if check else None,
    )


def _inpaints(source: Source) -> bool:
    return source.unet.made is not None and source.unet.made.config.inpaints


def _alone(source: Source) -> tuple[Part, ...]:
    """A network in a file of its own, checked as in a model; of anything else, what its keys tell."""
    path, tensors, kind = source.path, source.tensors, source.kind.name
    if kind == UNET:
        return (_part(unet_network(lambda: (unet_config(shapes_of(tensors)), tensors))),)
    if kind == AUTOENCODER:
        return (_part(vae_network(lambda: vae_from_file(path))),)
    if kind == TEXT_ENCODER:
        return (_part(text_network(lambda: text_by_shape(tensors))),)
    if kind.startswith(IMAGE_ADAPTER):
        return (Part("adapter", None, image_adapter_summary(path), _content(tensors.values())),)
    if is_lora(tensors):
        found = lora_changes(path)
        return tuple(Part(one.network, None, one.summary, _content(one.tensors)) for one in found)
    if kind.startswith(EMBEDDING):
        return (_vectors(find_embedding(path)),)
    parts = {
        name: [tensor for key, tensor in tensors.items() if key.startswith(LDM_PREFIX[part])]
        for part, name in _NAMES.items()
    }
    parts["other tensors"] = [tensors[key] for key in source.foreign]
    return tuple(Part(name, None, {}, _content(found)) for name, found in parts.items() if found)


def _vectors(stored: Stored) -> Part:
    *_, count, width = (1, *stored.shape)
    fits = TEXT_WIDTHS.get(width, "no Stable Diffusion")
    return Part(
        "embedding", None, {"key": stored.key, "vectors": count, "width": width, "fits": fits}, _content([stored])
    )


def _ignored(tensors: Tensors) -> dict[str, int]:
    """How many tensors the loader leaves out knowingly, by what they are."""

    def kind(key: str) -> str | None:
        if key.startswith("model_ema.") and key not in _AVERAGED:
            return "averaged copies (EMA) of the UNet"
        if key.endswith(TEXT_IGNORED):
            return "of CLIP, no weights of its text encoder"
        return "schedule and trainer state" if key.startswith(IGNORED) else None

    return dict(Counter(found for key in tensors if (found := kind(key)) is not None))


# ---- parts


def _tokenizer(folder: Path, text: TextConfig | None) -> Config:
    reader = load_tokenizer(folder)
    length = int(reader.model_max_length)  # one without a limit claims 1e30
    if text is not None:
        check_vocabulary(reader, folder, text.vocab_size)
        length = min(length, text.max_position_embeddings)
    files = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return {"files": files, "tokens": len(reader), "length": length}


def _scheduler(config: Config) -> Config:
    noise, defaults = NoiseSchedule.from_config(config), Defaults.from_config(config)
    try:
        sampler = str(choose_sampler(noise, defaults.sampler))  # as a run does
    except ValueError as refusal:
        sampler = f"none: {refusal}"
    return {
        "sampler": sampler,
        "prediction_type": noise.prediction_type,
        "spacing": noise.timestep_spacing or "each sampler's own",
        "steps": defaults.steps,
        "guidance_scale": defaults.guidance_scale,
    }


def _part(network: Network[Any], folder: Path | None = None) -> Part:
    """What there is of a network: its sizes, and counts. folder: the model's."""
    made, summary = network.made, {}
    if made is not None:
        sizes = _UNET_SIZES if isinstance(made, UNet) else _VAE_SIZES if isinstance(made, VAE) else _TEXT_SIZES
        config = made.config if isinstance(made, UNet | VAE) else made
        summary = {ours: getattr(config, theirs) for ours, theirs in sizes.items()}
    path = next((tensor.path for tensor in network.tensors.values()), None)
    file = None if folder is None or path is None else path.relative_to(folder).as_posix()
    return Part(network.name, file, summary, _content(network.tensors.values()), network.problems)


def _fit(found: Source, tokenizer: Config) -> None:
    assert found.unet.made is not None and found.vae.made is not None and found.text.made is not None
    text = found.text.made
    length = tokenizer.get("length", text.max_position_embeddings)
    assert isinstance(length, int)
    check_fit(found.unet.made.config, found.vae.made.config, length, text.hidden_size)


def _attempt(read: Callable[[], Read], otherwise: Read, problems: list[Problem]) -> Read:
    try:
        return read()
    except ValueError as error:
        problems.append(Problem(str(error)))
        return otherwise


def _content(tensors: Iterable[Stored]) -> Content:
    tensors = list(tensors)
    sizes, nbytes = sum(tensor.size for tensor in tensors), sum(tensor.nbytes for tensor in tensors)
    return Content(len(tensors), sizes, nbytes, dict(Counter(tensor.dtype for tensor in tensors).most_common()))
