"""Where a source leads: the one road of load() and describe() from what the user wrote to a folder or a file."""

import re
from pathlib import Path

from ..checks import shown
from ..request import BUNDLED
from .files import PICKLES
from .hub import fetch_model
from .sources import BUNDLED_FOLDER


def open_source(
    source: str | Path,
    variant: str | None = None,
    revision: str | None = None,
    *,
    vae: bool = True,
    tokenizer: bool = True,
) -> tuple[Path, str]:
    """(A model's folder or file, its name). What exists here is taken before the hub, from which an id is fetched.

    vae, tokenizer: False where the caller brings them, so that they need not be fetched.
    ValueError where the source leads nowhere.
    """
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
