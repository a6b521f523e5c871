"""Where a model comes from: a folder, a single file or the hub, each turned into the same description of parts. No
weights are read here."""

import contextlib
import json
import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..checks import warn
from ..networks.config import UNetConfig, VAEConfig
from ..sampling import SD15_SCHEDULER_CONFIG
from .files import PICKLES, Stored, file_metadata, how_to_convert, stored_tensors
from .names import IGNORED, LDM_PREFIX, TEXT_IGNORED, VAE_OLD_ATTENTION, renamed, unet_ldm, unwrap, vae_ldm
from .recognise import (
    CHECKPOINT,
    Kind,
    ldm_levels,
    ldm_vae_levels,
    recognise,
    refuse_widths,
    text_config,
    unet_config,
    vae_config,
)

BUNDLED_FOLDER = Path(__file__).parents[1] / "shapes" / "model"
BASES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
CLIP_TOKENIZER = "openai/clip-vit-large-patch14"
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class VAESource:
    """An autoencoder's config, and its tensors under our names."""

    config: VAEConfig
    tensors: Mapping[str, Stored]


@dataclass(frozen=True)
class Source:
    """The parts of a loadable model. Tensors under our names (the text encoder's under the hub's)."""

    name: str
    path: Path
    unet: UNetConfig
    unet_tensors: Mapping[str, Stored]
    vae: VAESource
    text: Mapping[str, object]
    text_tensors: Mapping[str, Stored]
    tokenizer: Path
    scheduler: Mapping[str, object]


def folder_source(
    folder: Path, name: str, variant: str | None, tokenizer: Path | None, vae: VAESource | None
) -> Source:
    """A folder in the Stable Diffusion format: unet/, vae/, text_encoder/, tokenizer/, scheduler/."""
    return Source(
        name=name,
        path=folder,
        unet=folder_unet_config(folder),
        unet_tensors=folder_tensors(folder / "unet", "diffusion_pytorch_model", variant),
        vae=vae or vae_from_folder(folder / "vae", variant),
        text=text_encoder_config(folder),
        text_tensors=hub_text_tensors(folder_tensors(folder / "text_encoder", "model", variant)),
        tokenizer=tokenizer or folder / "tokenizer",
        scheduler=read_json(folder / "scheduler" / "scheduler_config.json"),
    )


def text_encoder_config(folder: Path) -> dict[str, object]:
    """The text encoder's config in a folder; the config of a whole CLIP nests it one level deeper."""
    config = read_json(folder / "text_encoder" / "config.json")
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) and "vocab_size" not in config else config


def folder_unet_config(folder: Path) -> UNetConfig:
    """The UNet's config in a folder. ValueError if it is of another kind of model."""
    if not (folder / "unet").is_dir():
        raise ValueError(
            f"{folder} has no unet/{_class_name(folder)}; "
            "expected a Stable Diffusion folder with unet, vae, text_encoder, tokenizer and scheduler"
        )
    refusal = folder_refusal(folder)
    if refusal is not None:
        raise ValueError(f"{folder} cannot be loaded: {refusal.problem}")
    return UNetConfig.from_dict(read_json(folder / "unet" / "config.json"))


def folder_refusal(folder: Path) -> Kind | None:
    """The kind of a folder's model from its UNet's widths; None for SD 1.x."""
    config = read_json(folder / "unet" / "config.json")
    channels, context = config.get("in_channels"), config.get("cross_attention_dim")
    return refuse_widths(channels, context) if isinstance(channels, int) and isinstance(context, int) else None


def _class_name(folder: Path) -> str:
    """The folder's own class name, in brackets; empty if it has none."""
    for file in ("model_index.json", "config.json"):
        try:
            return f" (its {file} says {read_json(folder / file)['_class_name']!r})"
        except (ValueError, KeyError):
            continue
    return ""


def file_source(
    path: Path,
    tensors: Mapping[str, Stored],
    tokenizer: Path | Callable[[], Path],
    vae: VAESource | None,
    scheduler: Mapping[str, object] = SD15_SCHEDULER_CONFIG,
) -> Source:
    """A single .safetensors file in LDM names, from its header; `tokenizer` is a folder or a function that gets one.

    Keys outside its three networks are ignored, with a warning that names them.
    """
    kind = recognise({key: tensor.shape for key, tensor in tensors.items()})
    if kind.problem is not None and not (
        vae is not None and kind.name.startswith(f"{CHECKPOINT} without an autoencoder")
    ):
        raise ValueError(f"{path} cannot be loaded: {kind.problem}")
    parts = {part: _under(tensors, prefix) for part, prefix in LDM_PREFIX.items()}
    foreign = [key for key in tensors if not key.startswith((*LDM_PREFIX.values(), *IGNORED))]
    if foreign:
        warn(f"{path.name} holds {len(foreign)} tensors that are not part of Stable Diffusion 1.x: {_some(foreign)}")
    table = unet_ldm(*ldm_levels(_shapes(parts["unet"])))
    unet_tensors = renamed(parts["unet"], table)
    text_tensors = hub_text_tensors(parts["text_encoder"])
    return Source(
        name=path.stem,
        path=path,
        unet=unet_config(_shapes(unet_tensors)),
        unet_tensors=unet_tensors,
        vae=vae or _vae_by_shape(parts["vae"]),
        text=text_config(_shapes(text_tensors)),
        text_tensors=text_tensors,
        tokenizer=tokenizer() if callable(tokenizer) else tokenizer,
        scheduler=scheduler,
    )


def file_scheduler(path: Path, keys: Container[str]) -> dict[str, object]:
    """A single file's scheduler config: from marker tensors, its metadata or a .yaml next to it; else SD 1.5's.

    The tensors `v_pred` and `ztsnr` are ComfyUI's and A1111's markers, `modelspec.prediction_type` is sd-scripts', and
    the .yaml is the original code's.
    """
    beside = path.with_suffix(".yaml")
    yaml = beside.read_text(encoding="utf-8", errors="replace") if beside.is_file() else ""
    v = (
        "v_pred" in keys
        or file_metadata(path).get("modelspec.prediction_type", "").startswith("v")
        or re.search(r"""^\s*parameterization\s*:\s*["']?v["']?\s*(#|$)""", yaml, re.MULTILINE) is not None
    )
    changes = {"prediction_type": "v_prediction"} if v else {}
    return {**SD15_SCHEDULER_CONFIG, **changes, "rescale_betas_zero_snr": "ztsnr" in keys}


def check_fit(found: Source, length: int, width: int) -> None:
    """ValueError if the parts of a model do not fit together, since one may have been replaced.

    length and width: those of the text encoder's contexts.
    """
    if found.unet.cross_attention_dim != width:
        raise ValueError(
            f"the UNet reads text embeddings {found.unet.cross_attention_dim} wide, the text encoder gives {width}: "
            "they are from different models"
        )
    if found.unet.latent_channels != found.vae.config.latent_channels:
        raise ValueError(
            f"the UNet works on {found.unet.latent_channels} channels, the autoencoder on "
            f"{found.vae.config.latent_channels}: they are from different models"
        )
    if length < 3:
        raise ValueError(
            f"the tokenizer allows {length} tokens, which leaves no room for a word; "
            "see model_max_length in tokenizer_config.json"
        )


def vae_from_folder(folder: Path, variant: str | None) -> VAESource:
    """An autoencoder's own folder: config.json and its weights, under old or new names."""
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} has no config.json: this model comes without an autoencoder; expected one there, or passed as "
            "vae="
        )
    tensors = folder_tensors(folder, "diffusion_pytorch_model", variant)
    config = VAEConfig.from_dict(read_json(folder / "config.json"))
    return VAESource(config, renamed(tensors, VAE_OLD_ATTENTION))


def vae_from_file(path: Path) -> VAESource:
    """An autoencoder in a file: LDM names with or without prefix, a whole checkpoint, or the folder's names."""
    tensors = unwrap(stored_tensors(path))
    inside = _under(tensors, LDM_PREFIX["vae"]) or tensors
    if not any(key.startswith("decoder.") for key in inside):
        raise ValueError(
            f"{path} holds no autoencoder; expected keys such as decoder.conv_in.weight, found {_some(list(tensors))}"
        )
    return _vae_by_shape(inside)


def _vae_by_shape(tensors: Mapping[str, Stored]) -> VAESource:
    """An autoencoder without a config; tensors in LDM names without prefix, or in the folder's names."""
    table = VAE_OLD_ATTENTION
    if not any(key.startswith("encoder.down_blocks.") for key in tensors):
        table = vae_ldm(*ldm_vae_levels(_shapes(tensors)))
    # Some files include the training loss, a network of its own.
    found = renamed({key: tensor for key, tensor in tensors.items() if not key.startswith(IGNORED)}, table)
    return VAESource(vae_config(_shapes(found)), found)


def hub_text_tensors(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Add the prefix that merged files and transformers >= 5.6 omit, and drop what is not part of the text encoder,
    e.g. a whole CLIP's image encoder."""
    return {
        key if key.startswith("text_model.") else f"text_model.{key}": tensor
        for key, tensor in tensors.items()
        if not key.endswith(TEXT_IGNORED) and not key.startswith(("vision_model.", "visual_projection."))
    }


def folder_tensors(folder: Path, base: str, variant: str | None) -> dict[str, Stored]:
    """The tensors of one part of a model folder. ValueError if it has none, saying what is there instead."""
    files = weight_files(folder, base, variant)
    if files:
        return {key: tensor for path in files for key, tensor in stored_tensors(path).items()}
    path = folder / weight_file(base, variant)
    found = sorted(file.name for file in folder.glob("*")) if folder.is_dir() else []
    others = [name for name in found if name.endswith(".safetensors")]
    pickles = [name for name in found if name.endswith(PICKLES)]
    if others:
        mend = (
            f'there is {", ".join(others)}; variant="fp16" loads {base}.fp16.safetensors, no variant {base}.safetensors'
        )
    elif pickles:
        recipe = how_to_convert(folder / pickles[0], path.name)
        mend = f"there is only {pickles[0]}, a pickle, which can run code when it is read. {recipe}"
    else:
        mend = f"the folder holds {', '.join(found) or 'nothing'}"
    raise ValueError(f"{path} is not there; {mend}")


def network_tensors(path: Path, variant: str | None) -> list[Stored]:
    """The tensors of a model's networks, or all tensors of a file that is no model; unreadable parts are skipped."""
    if path.is_file():
        tensors = unwrap(stored_tensors(path))
        return [tensors[key] for key in tensors if key.startswith(tuple(LDM_PREFIX.values()))] or list(tensors.values())
    found: list[Stored] = []
    for part, base in BASES.items():
        with contextlib.suppress(ValueError):  # reported elsewhere, by part
            found += folder_tensors(path / part, base, variant).values()
    return found


def weight_file(base: str, variant: str | None) -> str:
    """The file name of a network's weights, such as model.fp16.safetensors."""
    return f"{base}.safetensors" if variant is None else f"{base}.{variant}.safetensors"


def index_file(base: str, variant: str | None) -> str:
    """The index file, which lists the shard of each tensor."""
    return f"{base}.safetensors.index.json" if variant is None else f"{base}.safetensors.index.{variant}.json"


def weight_files(folder: Path, base: str, variant: str | None) -> list[Path]:
    """The weight files of a part: one file, or the shards in its index, existing or not; empty without either.

    As in diffusers, a part without files of the variant uses the plain ones if another part has the variant.
    """
    plain = variant is not None and any(folder.parent.glob(f"*/*.{variant}[.-]*safetensors"))
    for name in (variant, None) if plain else (variant,):
        path, index = folder / weight_file(base, name), folder / index_file(base, name)
        if path.is_file():
            return [path]
        if index.is_file():
            shards = read_json(index).get("weight_map")
            names = {str(file) for file in shards.values()} if isinstance(shards, dict) else set()
            if not names or any(Path(file).name != file for file in names):
                raise ValueError(f"{index}: weight_map must map every tensor to a file in the same folder")
            return [folder / file for file in sorted(names)]
    return []


def read_json(path: Path) -> dict[str, object]:
    """A config file. ValueError if it is missing or not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))  # Notepad writes a BOM
    except FileNotFoundError:
        raise ValueError(
            f"{path} is not there; expected a Stable Diffusion folder with a config in each part"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} contains a {type(value).__name__}; expected a JSON object")
    return value


def _under(tensors: Mapping[str, Stored], prefix: str) -> dict[str, Stored]:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def _shapes(tensors: Mapping[str, Stored]) -> dict[str, tuple[int, ...]]:
    return {key: tensor.shape for key, tensor in tensors.items()}


def _some(keys: Iterable[str]) -> str:
    keys = list(keys)
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
