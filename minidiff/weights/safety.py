"""Load the safety checker of a model folder: safety_checker/ and feature_extractor/."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checks import shown
from ..safety import SafetyChecker
from ..vocabulary import BUNDLED
from .files import Stored, read_weights
from .hub import fetch_safety
from .open import local_path
from .sources import folder_tensors, read_json, weight_file
from .state import check_state
from .vision import load_vision, read_preprocessor

_CONCEPTS, _SPECIAL = 17, 3  # the numbers of embeddings in every checker of Stable Diffusion 1.x


@dataclass(frozen=True)
class SafetySource:
    """A checker's config, its tensors under the file's names, and the preprocessing for its image encoder."""

    config: Mapping[str, object]
    tensors: Mapping[str, Stored]
    edge: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def find_safety(
    safety: bool | str | Path, source: str | Path, path: Path, variant: str | None, revision: str | None
) -> SafetySource | None:
    """Find the checker for load's `safety` option; None if it asks for none. Weights are not read.

    source, path: the model, as the user named it and where it was found. `variant` is the model's; a checker may lack
    it. ValueError if there is no checker, only a pickle, or one with another preprocessing.
    """
    if safety is False:
        return None
    if not isinstance(safety, bool | str | Path) or safety == "":
        raise ValueError(f"safety is {shown(safety)}; expected True, a folder or a hub id")
    mend = "pass a folder or a hub id that has one, such as safety='stable-diffusion-v1-5/stable-diffusion-v1-5'"
    if safety is True:
        if path.is_file():
            raise ValueError(f"safety=True, but {path} is a single file, which has no safety checker; {mend}")
        folder = path
        if source != BUNDLED and local_path(source) is None:
            folder = fetch_safety(str(source), revision, variant)
    else:
        folder = local_path(safety) or fetch_safety(str(safety), None, variant)
    inside = folder / "safety_checker"
    checker = inside if inside.is_dir() or safety is True else folder
    if not (checker / "config.json").is_file():
        raise ValueError(f"{folder} has no safety checker: {checker / 'config.json'} is not there; {mend}")
    config = read_json(checker / "config.json")
    edge, mean, std = read_preprocessor(folder / "feature_extractor" if checker == inside else checker)
    has = variant is not None and (checker / weight_file("model", variant)).is_file()
    return SafetySource(config, folder_tensors(checker, "model", variant if has else None), edge, mean, std)


def load_safety(found: SafetySource, dtype: torch.dtype, device: torch.device) -> SafetyChecker:
    """The checker, its image encoder in `dtype`. ValueError for a bad config, and for keys that do not fit."""
    config = found.config.get("vision_config")
    if not isinstance(config, dict):
        raise ValueError(f"safety checker config: vision_config is {shown(config)}; expected an object")
    prefix = "vision_model."  # the checker's; files before transformers 5.6 repeat it for the image encoder inside
    inside = {key.removeprefix(prefix): tensor for key, tensor in found.tensors.items() if key.startswith(prefix)}
    own = {key: tensor for key, tensor in found.tensors.items() if not key.startswith(prefix)}
    vision = load_vision(config, inside, dtype, device)
    if vision.config.image_size != found.edge:
        raise ValueError(
            f"the safety checker's image encoder reads {vision.config.image_size} pixels, its feature extractor gives "
            f"{found.edge}: they are from different models"
        )
    projection = own.get("visual_projection.weight")
    wide = projection.shape[0] if projection is not None and projection.shape else 768
    shapes = {
        "visual_projection.weight": torch.Size((wide, vision.config.hidden_size)),
        "concept_embeds": torch.Size((_CONCEPTS, wide)),
        "concept_embeds_weights": torch.Size((_CONCEPTS,)),
        "special_care_embeds": torch.Size((_SPECIAL, wide)),
        "special_care_embeds_weights": torch.Size((_SPECIAL,)),
    }
    check_state("safety checker", shapes, own)
    state = read_weights(own, shapes, torch.float32, device)  # half precision would shift the thresholds
    weight, concepts, thresholds, special, special_thresholds = (state[key] for key in shapes)
    return SafetyChecker(
        vision,
        weight.to(dtype),
        concepts,
        thresholds,
        special,
        special_thresholds,
        found.edge,
        found.mean,
        found.std,
    )
