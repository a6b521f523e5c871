"""What a model source holds and whether it would load, from configs and headers alone: 4 GB answer at once."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from ..model import Defaults
from ..networks.config import UNetConfig, VAEConfig
from ..networks.text import text_encoder_shapes
from ..networks.unet import UNet
from ..networks.vae import VAE
from ..sampling import NoiseSchedule, choose_sampler
from .files import Stored, not_finite, stored_tensors
from .image_prompt import image_adapter_summary
from .lora_info import lora_changes
from .names import IGNORED, LDM_PREFIX, TEXT_IGNORED, unwrap
from .open import open_source
from .recognise import (
    AUTOENCODER,
    CHECKPOINT,
    EMBEDDING,
    IMAGE_ADAPTER,
    TEXT_ENCODER,
    TEXT_WIDTHS,
    UNET,
    WITHOUT_VAE,
    Kind,
    is_lora,
    recognise,
    text_config,
    unet_config,
)
from .sources import (
    CLIP_TOKENIZER,
    TOKENIZER_FILES,
    Source,
    VAESource,
    check_fit,
    file_scheduler,
    file_source,
    folder_refusal,
    folder_source,
    folder_tensors,
    folder_unet_config,
    hub_text_tensors,
    network_tensors,
    read_json,
    text_encoder_config,
    vae_from_file,
    vae_from_folder,
)
from .state import state_problems
from .text import check_vocabulary, load_tokenizer
from .words import find_embedding

Tensors = Mapping[str, Stored]
Shapes = Mapping[str, tuple[int, ...]]

FOLDER = "Stable Diffusion 1.x folder"
_NAMES = {"unet": "UNet", "vae": "autoencoder", "text_encoder": "text encoder"}
_KNOWN = (*LDM_PREFIX.values(), *IGNORED)
_AVERAGED = ("model_ema.decay", "model_ema.num_updates")  # the averaging's own state, also where there are no averages


@dataclass(frozen=True)
class Problem:
    """Why a source does not load: a sentence, or what is wrong with each of `items`, keys and their shapes."""

    what: str
    items: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.items:
            return self.what
        more = f" and {len(self.items) - 5} more" if len(self.items) > 5 else ""
        return f"{len(self.items)} {self.what}: {', '.join(self.items[:5])}{more}"


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
    """A model folder or a weight file. `loads`: minidiff.load would take it; otherwise some problem says why not.

    problems: of the whole; each part has its own. ignored: how many tensors of which kind are left out knowingly.
    foreign: keys that belong to no network of Stable Diffusion 1.x, which are left out with a warning.
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
    path, name = open_source(source, variant, revision)
    found = _describe_folder(path, name, variant) if path.is_dir() else _describe_file(path)
    bad = not_finite(network_tensors(path, variant), every=check)
    if not bad:
        return found
    return replace(found, loads=False, problems=(*found.problems, Problem("tensors hold NaN or infinity", tuple(bad))))


# ---- a single file


def _describe_file(path: Path) -> Description:
    tensors = unwrap(stored_tensors(path))
    kind = recognise(_shapes(tensors))
    if kind.name in (CHECKPOINT, WITHOUT_VAE):
        # Of foreign keys the loader warns; here they are listed. A missing autoencoder must not hide the other parts.
        mine = {key: tensor for key, tensor in tensors.items() if key.startswith(_KNOWN)}
        try:
            vae = None if kind.problem is None else VAESource(VAEConfig(), {})
            source = file_source(path, mine, Path(), vae, file_scheduler(path, tensors))
        except ValueError as error:
            return _counted(path, tensors, kind, _problem(error))
        return _checkpoint(path, tensors, kind, source)
    return _counted(path, tensors, kind)


def _checkpoint(path: Path, tensors: Tensors, kind: Kind, source: Source) -> Description:
    unet, text = _unet(None, source.unet, source.unet_tensors), _text(None, source.text, source.text_tensors)
    parts = (unet, text) if kind.name == WITHOUT_VAE else (unet, _vae(None, source.vae), text)
    problems = _refusal(kind) or _fit(source, _int(source.text, "max_position_embeddings"))
    return Description(
        name=path.name,
        kind=_called(kind, source.unet.inpaints),
        loads=not problems and not any(part.problems for part in parts),
        content=_content(tensors.values()),
        parts=parts,
        problems=problems,
        scheduler=_scheduler(source.scheduler),
        tokenizer={"from": f"{CLIP_TOKENIZER} in the hub's cache, or the folder given: a single file has none"},
        ignored=_ignored(tensors),
        foreign=tuple(key for key in tensors if not key.startswith(_KNOWN)),
    )


def _counted(path: Path, tensors: Tensors, kind: Kind, problems: tuple[Problem, ...] = ()) -> Description:
    """A file that is no model of ours, or not one that can be taken apart."""
    try:
        parts = _alone(path, tensors, kind)
    except ValueError as error:
        parts, problems = (), problems + _problem(error)
    return Description(path.name, kind.name, False, _content(tensors.values()), parts, problems + _refusal(kind))


def _alone(path: Path, tensors: Tensors, kind: Kind) -> tuple[Part, ...]:
    """A network in a file of its own, checked as in a model; of anything else, what its keys tell."""
    if kind.name == UNET:
        return (_unet(None, unet_config(_shapes(tensors)), tensors),)
    if kind.name == AUTOENCODER:
        return (_vae(None, vae_from_file(path)),)
    if kind.name.startswith(IMAGE_ADAPTER):
        return (Part("adapter", None, image_adapter_summary(path), _content(tensors.values())),)
    if is_lora(tensors):
        found = lora_changes(path)
        return tuple(Part(one.network, None, one.summary, _content(one.tensors)) for one in found)
    if kind.name.startswith(EMBEDDING):
        return (_vectors(find_embedding(path)),)
    if kind.name == TEXT_ENCODER:
        text = hub_text_tensors(tensors)
        return (_text(None, text_config(_shapes(text)), text),)
    parts = {
        _NAMES[part]: [tensor for key, tensor in tensors.items() if key.startswith(prefix)]
        for part, prefix in LDM_PREFIX.items()
    }
    parts["other tensors"] = [tensor for key, tensor in tensors.items() if not key.startswith(_KNOWN)]
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


# ---- a folder


def _describe_folder(folder: Path, name: str, variant: str | None) -> Description:
    if not (folder / "unet").is_dir():
        folder_unet_config(folder)  # raises, in the loader's words
    kind, parts = _folder_kind(folder), tuple(_folder_part(folder, part, variant) for part in _NAMES)
    scheduler, no_scheduler = _attempt(lambda: _scheduler(read_json(folder / "scheduler" / "scheduler_config.json")))
    tokenizer, no_tokenizer = _attempt(lambda: _tokenizer(folder / "tokenizer", parts[2].config))
    problems = _refusal(kind) + no_scheduler + no_tokenizer
    if not problems and not any(part.problems for part in parts):
        problems = _fit(folder_source(folder, name, variant, None, None), _int(tokenizer, "length"))
    return Description(
        name=name,
        kind=_called(kind, parts[0].config.get("in_channels") == 9),
        loads=not problems and not any(part.problems for part in parts),
        content=_sum(part.content for part in parts),
        parts=parts,
        problems=problems,
        scheduler=scheduler,
        tokenizer=tokenizer,
    )


def _folder_part(folder: Path, part: str, variant: str | None) -> Part:
    try:
        if part == "vae":
            return _vae(folder, vae_from_folder(folder / "vae", variant))
        if part == "unet":
            made = UNetConfig.from_dict(
                read_json(folder / part / "config.json")
            )  # before the weights: a model of another kind needs no recipe for them
            return _unet(folder, made, folder_tensors(folder / part, "diffusion_pytorch_model", variant))
        return _text(
            folder, text_encoder_config(folder), hub_text_tensors(folder_tensors(folder / part, "model", variant))
        )
    except ValueError as error:
        return Part(_NAMES[part], None, {}, _content(()), _problem(error))


def _folder_kind(folder: Path) -> Kind:
    try:
        return folder_refusal(folder) or Kind(FOLDER)
    except ValueError:  # a problem of the UNet, named there
        return Kind(FOLDER)


def _tokenizer(folder: Path, text: Mapping[str, object]) -> dict[str, object]:
    reader = load_tokenizer(folder)
    vocabulary = text.get("vocabulary")
    if isinstance(vocabulary, int):
        check_vocabulary(reader, folder, vocabulary)
    files = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    positions = text.get("positions")  # a tokenizer without a limit claims 1e30
    length = int(reader.model_max_length)
    return {
        "files": files,
        "tokens": len(reader),
        "length": min(length, positions) if isinstance(positions, int) else length,
    }


def _scheduler(config: Mapping[str, object]) -> dict[str, object]:
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


# ---- networks


def _unet(folder: Path | None, config: UNetConfig, tensors: Tensors) -> Part:
    summary = {
        "in_channels": config.in_channels,
        "widths": config.block_out_channels,
        "layers": config.layers_per_block,
        "heads": config.num_heads,
        "context_width": config.cross_attention_dim,
        "sample_size": config.sample_size,
    }
    return _part("UNet", folder, summary, tensors, lambda: _empty(lambda: UNet(config)))


def _vae(folder: Path | None, source: VAESource) -> Part:
    config = source.config
    summary = {
        "widths": config.block_out_channels,
        "layers": config.layers_per_block,
        "latent_channels": config.latent_channels,
        "scaling_factor": config.scaling_factor,
    }
    return _part("autoencoder", folder, summary, source.tensors, lambda: _empty(lambda: VAE(config)))


def _text(folder: Path | None, config: Mapping[str, object], tensors: Tensors) -> Part:
    names = {
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "positions": "max_position_embeddings",
        "vocabulary": "vocab_size",
        "activation": "hidden_act",
    }
    summary = {ours: config.get(theirs) for ours, theirs in names.items()}
    return _part("text encoder", folder, summary, tensors, lambda: text_encoder_shapes(config))


def _part(
    name: str, folder: Path | None, config: Mapping[str, object], tensors: Tensors, expected: Callable[[], Shapes]
) -> Part:
    path = next((tensor.path for tensor in tensors.values()), None)
    file = None if folder is None or path is None else path.relative_to(folder).as_posix()
    try:
        problems = _state(expected(), tensors)
    except ValueError as error:
        problems = _problem(error)
    return Part(name, file, config, _content(tensors.values()), problems)


def _empty(build: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """The shapes of a network that has no memory."""
    with torch.device("meta"):
        network = build()
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


def _state(expected: Shapes, tensors: Tensors) -> tuple[Problem, ...]:
    found = state_problems(expected, tensors)
    groups = {
        "missing keys": found.missing,
        "unexpected keys": found.unexpected,
        "keys of another shape or dtype": found.wrong,
    }
    return tuple(Problem(what, items) for what, items in groups.items() if items)


def _problem(error: ValueError) -> tuple[Problem, ...]:
    return (Problem(str(error)),)


def _called(kind: Kind, inpaints: bool) -> str:
    return kind.name.replace("1.x", "1.x inpainting") if inpaints else kind.name


def _refusal(kind: Kind) -> tuple[Problem, ...]:
    return () if kind.problem is None else (Problem(kind.problem),)


def _attempt(read: Callable[[], dict[str, object]]) -> tuple[dict[str, object], tuple[Problem, ...]]:
    try:
        return read(), ()
    except ValueError as error:
        return {}, _problem(error)


def _fit(source: Source, length: int) -> tuple[Problem, ...]:
    try:
        check_fit(source, length, _int(source.text, "hidden_size"))
    except ValueError as error:
        return _problem(error)
    return ()


def _content(tensors: Iterable[Stored]) -> Content:
    tensors = list(tensors)
    sizes, nbytes = sum(tensor.size for tensor in tensors), sum(tensor.nbytes for tensor in tensors)
    return Content(len(tensors), sizes, nbytes, dict(Counter(tensor.dtype for tensor in tensors).most_common()))


def _sum(contents: Iterable[Content]) -> Content:
    contents = list(contents)
    return Content(
        tensors=sum(content.tensors for content in contents),
        parameters=sum(content.parameters for content in contents),
        nbytes=sum(content.nbytes for content in contents),
        dtypes=dict(sum((Counter(content.dtypes) for content in contents), Counter[str]())),
    )


def _shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {key: tensor.shape for key, tensor in tensors.items()}


def _int(values: Mapping[str, object], key: str) -> int:
    value = values[key]
    assert isinstance(value, int)  # written here, or checked by the network that it sizes
    return value
