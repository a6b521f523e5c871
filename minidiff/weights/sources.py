"""Configs and tensors of a model's networks as folders and files hold them, under our names. No weights are read."""

import json
import re
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from ..networks.config import UNetConfig, VAEConfig
from ..sampling import SD15_SCHEDULER_CONFIG
from .files import PICKLES, Stored, file_metadata, how_to_convert, stored_tensors
from .names import IGNORED, LDM_PREFIX, TEXT_IGNORED, VAE_OLD_ATTENTION, renamed, unwrap, vae_ldm
from .recognise import Kind, ldm_vae_levels, refuse_widths, vae_config

BUNDLED_FOLDER = Path(__file__).parents[1] / "shapes" / "model"
BASES = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
CLIP_TOKENIZER = "openai/clip-vit-large-patch14"
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class VAESource(NamedTuple):
    """An autoencoder's config, and its tensors under our names."""

    config: VAEConfig
    tensors: Mapping[str, Stored]


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


def check_fit(unet: UNetConfig, vae: VAEConfig, length: int, width: int) -> None:
    """ValueError if the parts of a model do not fit together, since one may have been replaced.

    length and width: those of the text encoder's contexts.
    """
    if unet.cross_attention_dim != width:
        raise ValueError(
            f"the UNet reads text embeddings {unet.cross_attention_dim} wide, the text encoder gives {width}: "
            "they are from different models"
        )
    if unet.latent_channels != vae.latent_channels:
        raise ValueError(
            f"the UNet works on {unet.latent_channels} channels, the autoencoder on {vae.latent_channels}: they are "
            "from different models"
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
    inside = under(tensors, LDM_PREFIX["vae"]) or tensors
    if not any(key.startswith("decoder.") for key in inside):
        raise ValueError(
            f"{path} holds no autoencoder; expected keys such as decoder.conv_in.weight, found {some(list(tensors))}"
        )
    return vae_by_shape(inside)


def vae_by_shape(tensors: Mapping[str, Stored]) -> VAESource:
    """An autoencoder without a config; tensors in LDM names without prefix, or in the folder's names."""
    table = VAE_OLD_ATTENTION
    if not any(key.startswith("encoder.down_blocks.") for key in tensors):
        table = vae_ldm(*ldm_vae_levels(shapes_of(tensors)))
    # Some files include the training loss, a network of its own.
    found = renamed({key: tensor for key, tensor in tensors.items() if not key.startswith(IGNORED)}, table)
    return VAESource(vae_config(shapes_of(found)), found)


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


def under(tensors: Mapping[str, Stored], prefix: str) -> dict[str, Stored]:
    """The tensors below a prefix, without it."""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def shapes_of(tensors: Mapping[str, Stored]) -> dict[str, tuple[int, ...]]:
    """Their shapes."""
    return {key: tensor.shape for key, tensor in tensors.items()}


def some(keys: Iterable[str]) -> str:
    """The first five of them, and how many more."""
    keys = list(keys)
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
