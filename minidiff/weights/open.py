"""The one road of load() and describe(): from what the user wrote to a model's networks and their problems, read from
configs and headers alone."""

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import nn

from ..checks import shown
from ..networks.config import UNetConfig
from ..networks.text import TextConfig, text_encoder_shapes
from ..networks.unet import UNet
from ..networks.vae import VAE
from ..vocabulary import BUNDLED
from .files import PICKLES, Stored, stored_tensors
from .hub import fetch_model
from .names import IGNORED, LDM_PREFIX, renamed, unet_ldm, unwrap
from .recognise import CHECKPOINT, WITHOUT_VAE, Kind, ldm_levels, recognise, text_config, unet_config
from .sources import (
    BASES,
    BUNDLED_FOLDER,
    VAESource,
    file_scheduler,
    folder_refusal,
    folder_tensors,
    folder_unet_config,
    hub_text_tensors,
    read_json,
    shapes_of,
    text_encoder_config,
    under,
    vae_by_shape,
    vae_from_folder,
)
from .state import Problem, refusal, state_problems

Made = TypeVar("Made")
Sizes = TypeVar("Sizes")
Net = TypeVar("Net", bound=nn.Module)
Tensors = Mapping[str, Stored]
Shapes = Mapping[str, tuple[int, ...]]
Config = Mapping[str, object]

FOLDER = "Stable Diffusion 1.x folder"
KNOWN = (*LDM_PREFIX.values(), *IGNORED)
"""How the keys of a single file begin that are a network's, or are left out knowingly."""


@dataclass(frozen=True)
class Network(Generic[Made]):
    """One network of a source.

    made: the network on the meta device, without memory for its weights; of the text encoder, its sizes. None where
        it cannot be made, and a problem says why. tensors: under our names (the text encoder's under the hub's).
    shapes: those that it needs.
    """

    name: str
    made: Made | None = None
    tensors: Tensors = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    shapes: Shapes = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """A model folder or a weight file as its networks with their problems; what is no model has empty ones.

    problems: of the whole. scheduler: the contents of its config. tensors: all of a single file.
    """

    name: str
    path: Path
    kind: Kind
    problems: tuple[Problem, ...]
    unet: Network[UNet] = Network("UNet")
    vae: Network[VAE] = Network("autoencoder")
    text: Network[TextConfig] = Network("text encoder")
    scheduler: Config = field(default_factory=dict)
    tensors: Tensors = field(default_factory=dict)

    @property
    def networks(self) -> tuple[Network[UNet] | Network[VAE] | Network[TextConfig], ...]:
        """Those that it has, or should have."""
        return tuple(one for one in (self.unet, self.vae, self.text) if one.made is not None or one.problems)

    @property
    def foreign(self) -> tuple[str, ...]:
        """The keys of a single file that belong to no network of Stable Diffusion 1.x."""
        return tuple(key for key in self.tensors if not key.startswith(KNOWN))

    def refuse(self) -> None:
        """One ValueError for all that keeps it from being loaded; of networks, every key."""
        if self.problems:
            raise ValueError(f"{self.path} cannot be loaded: {self.problems[0]}")
        found = [refusal(one.name, one.problems) for one in self.networks if one.problems]
        if found:
            raise ValueError("\n".join(found))


def open_source(
    source: str | Path,
    variant: str | None = None,
    revision: str | None = None,
    *,
    vae: VAESource | None = None,
    tokenizer: bool = True,
) -> Source:
    """A model, or another file, from what is here, or from the hub, from which an id is fetched.

    vae: used instead of the model's own. tokenizer: False where the caller brings one, so that it need not be fetched.
    ValueError where the source leads nowhere or cannot be read; what is wrong with its parts is in their problems.
    """
    path, name = _locate(source, variant, revision, vae=vae is None, tokenizer=tokenizer)
    if path.is_dir():
        return read_folder(path, name, variant, vae)
    return read_file(path, unwrap(stored_tensors(path)), vae)


def read_folder(folder: Path, name: str, variant: str | None, vae: VAESource | None = None) -> Source:
    """A folder in the Stable Diffusion format: unet/, vae/, text_encoder/, tokenizer/, scheduler/."""
    if not (folder / "unet").is_dir():
        folder_unet_config(folder)  # raises, with what is there instead
    kind = Kind(FOLDER)
    with contextlib.suppress(ValueError):  # a problem of the UNet, found again there
        kind = folder_refusal(folder) or kind
    scheduler, problems = {}, _problems(kind)
    try:
        scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    except ValueError as error:
        problems += (Problem(str(error)),)
    unet, text = folder / "unet", folder / "text_encoder"
    return Source(
        name=name,
        path=folder,
        kind=kind,
        problems=problems,
        # A config comes before its tensors: a model of another kind needs no way to convert its pickles.
        unet=unet_network(
            lambda: (
                UNetConfig.from_dict(read_json(unet / "config.json")),
                folder_tensors(unet, BASES["unet"], variant),
            )
        ),
        vae=vae_network(lambda: vae or vae_from_folder(folder / "vae", variant)),
        text=text_network(
            lambda: (
                text_encoder_config(folder),
                hub_text_tensors(folder_tensors(text, BASES["text_encoder"], variant)),
            )
        ),
        scheduler=scheduler,
    )


def read_file(path: Path, tensors: Tensors, vae: VAESource | None = None) -> Source:
    """A single file with these tensors: a checkpoint in LDM names, or something else."""
    kind = recognise(shapes_of(tensors))
    if kind.name not in (CHECKPOINT, WITHOUT_VAE):
        return Source(path.stem, path, kind, _problems(kind), tensors=tensors)
    without = kind.name == WITHOUT_VAE

    def unet() -> tuple[UNetConfig, Tensors]:
        inside = under(tensors, LDM_PREFIX["unet"])
        found = renamed(inside, unet_ldm(*ldm_levels(shapes_of(inside))))
        return unet_config(shapes_of(found)), found

    return Source(
        name=path.stem,
        path=path,
        kind=kind,
        problems=() if vae is not None and without else _problems(kind),
        unet=unet_network(unet),
        vae=Network("autoencoder")
        if vae is None and without
        else vae_network(lambda: vae or vae_by_shape(under(tensors, LDM_PREFIX["vae"]))),
        text=text_network(lambda: text_by_shape(under(tensors, LDM_PREFIX["text_encoder"]))),
        scheduler=file_scheduler(path, tensors),
        tensors=tensors,
    )


def unet_network(read: Callable[[], tuple[UNetConfig, Tensors]]) -> Network[UNet]:
    """A UNet from its config and tensors."""
    return _network("UNet", read, partial(_empty, UNet))


def vae_network(read: Callable[[], VAESource]) -> Network[VAE]:
    """An autoencoder."""
    return _network("autoencoder", read, partial(_empty, VAE))


def text_network(read: Callable[[], tuple[Config, Tensors]]) -> Network[TextConfig]:
    """A text encoder."""

    def make(config: Config) -> tuple[TextConfig, Shapes]:
        sizes = TextConfig.from_dict(config)
        return sizes, text_encoder_shapes(sizes)

    return _network("text encoder", read, make)


def text_by_shape(tensors: Tensors) -> tuple[Config, Tensors]:
    """A text encoder without a config."""
    found = hub_text_tensors(tensors)
    return text_config(shapes_of(found)), found


def _network(
    name: str, read: Callable[[], tuple[Sizes, Tensors]], make: Callable[[Sizes], tuple[Made, Shapes]]
) -> Network[Made]:
    tensors: Tensors = {}
    try:
        sizes, tensors = read()
        made, shapes = make(sizes)
    except ValueError as error:
        return Network(name, None, tensors, (Problem(str(error)),))
    return Network(name, made, tensors, state_problems(shapes, tensors), shapes)


def _empty(kind: Callable[[Sizes], Net], sizes: Sizes) -> tuple[Net, Shapes]:
    """A network on the meta device, and the shapes of its weights."""
    try:
        with torch.device("meta"):
            network = kind(sizes)
    except RuntimeError as error:  # torch's error for sizes beyond any memory
        raise ValueError(f"a network of these sizes cannot be built: {sizes}: {error}") from error
    return network, {key: tuple(value.shape) for key, value in network.state_dict().items()}


def _problems(kind: Kind) -> tuple[Problem, ...]:
    return () if kind.problem is None else (Problem(kind.problem),)


# ---- places


def _locate(
    source: str | Path, variant: str | None, revision: str | None, *, vae: bool, tokenizer: bool
) -> tuple[Path, str]:
    """A model's folder or file, and its name. What exists here is taken before the hub."""
    if not isinstance(source, str | Path) or source == "":
        raise ValueError(f"source is {shown(source)}; expected a hub id, a model folder or a .safetensors file")
    path = local_path(source)
    if revision is not None and (source == BUNDLED or path is not None):
        raise ValueError(f"revision is {revision!r}, but {source} is no hub id; only the hub keeps revisions")
    if source == BUNDLED:
        return BUNDLED_FOLDER, BUNDLED
    if path is None:
        address = re.match(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/]+/[^/?#]+)", str(source))
        if address is not None:
            raise ValueError(f"source is an address; expected the hub id in it: {address[1]!r}")
        return fetch_model(str(source), revision, variant, vae=vae, tokenizer=tokenizer), str(source)
    if path.is_dir():
        snapshots = sorted((path / "snapshots").glob("*/unet"))
        if snapshots and not (path / "unet").is_dir():
            raise ValueError(f"{path} is a repository in the hub's cache; the model is {snapshots[-1].parent}")
        return path, path.resolve().name
    if not path.is_file() and not _looks_like_a_file(path):
        raise ValueError(f"{source} is not there; expected a model folder or a .safetensors file")
    return path, path.stem


def local_path(source: str | Path) -> Path | None:
    """The path, where it is here or can only be meant to be one; None for a hub id."""
    path = Path(source).expanduser()
    meant = isinstance(source, Path) or str(source).startswith("~") or _looks_like_a_file(path)
    return path if meant or path.exists() else None


def _looks_like_a_file(path: Path) -> bool:
    return path.suffix.lower() in (".safetensors", *PICKLES)
