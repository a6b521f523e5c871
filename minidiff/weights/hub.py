"""The hub: fetch the files of a model, or find them in the cache. huggingface_hub is only imported when needed."""

from pathlib import Path

from .sources import BASES, CLIP_TOKENIZER, TOKENIZER_FILES, folder_unet_config, index_file, weight_file, weight_files


def fetch_model(
    repo: str, revision: str | None, variant: str | None, *, vae: bool = True, tokenizer: bool = True
) -> Path:
    """The local folder of a Stable Diffusion repository: configs, tokenizer and one set of safetensors files.

    Configs are fetched first, so that another kind of model is refused before its weights are downloaded.
    vae, tokenizer: False skips them.
    """
    parts = ["unet", "text_encoder", *(["vae"] if vae else [])]
    configs = [f"{part}/config.json" for part in parts]
    small = ["model_index.json", "scheduler/scheduler_config.json", *configs]
    if tokenizer:
        small += [f"tokenizer/{name}" for name in TOKENIZER_FILES]
    folder = _fetch(repo, revision, small)
    if (folder / "unet").is_dir():
        folder_unet_config(folder)
    folder, lacking = _fetch_weights(repo, revision, variant, folder, parts, small)
    missing = [name for name in configs if not (folder / name).is_file()]
    missing += [f"{part}/{weight_file(BASES[part], variant)}" for part in lacking]
    if missing:
        raise ValueError(
            f"{_at(repo, revision)} holds no {', '.join(missing)}; expected a Stable Diffusion 1.x folder with "
            + ("safetensors" if variant is None else f"safetensors of the variant {variant!r}")
            + ". Pickles (.bin) are not fetched, since reading them can run code. If the hub cannot be reached, the "
            "cache may be incomplete"
        )
    return folder


def _fetch_weights(
    repo: str, revision: str | None, variant: str | None, folder: Path, parts: list[str], wanted: list[str]
) -> tuple[Path, list[str]]:
    """Fetch one set of weights per part, including shards. Returns the folder and the parts without weights."""
    lacking = parts
    for name in dict.fromkeys((variant, None)):
        wanted = wanted + [
            f"{part}/{file(BASES[part], name)}" for part in lacking for file in (weight_file, index_file)
        ]
        folder = _fetch(repo, revision, wanted)
        found = {part: weight_files(folder / part, BASES[part], variant) for part in parts}
        lacking = [part for part in parts if not found[part]]
        if not lacking or len(lacking) == len(parts):
            break
    shards = [f"{part}/{file.name}" for part in parts for file in found[part] if not file.is_file()]
    return _fetch(repo, revision, wanted + shards) if shards else folder, lacking


def fetch_vae(repo: str, variant: str | None) -> Path:
    """The local folder of an autoencoder's own repository, such as stabilityai/sd-vae-ft-mse, or a model's vae folder.

    Fetches the weights of the variant, or the plain ones if it has none.
    """
    for file in dict.fromkeys(weight_file(BASES["vae"], name) for name in (variant, None)):
        folder = _fetch(repo, None, ["config.json", file, "vae/config.json", f"vae/{file}"])
        for found in (folder / "vae", folder):
            if (found / file).is_file():
                return found
    raise ValueError(f"{repo} holds no autoencoder; expected config.json and {file}, at the top or in vae/")


def fetch_safety(repo: str, revision: str | None, variant: str | None) -> Path:
    """The local folder of a repository with a safety checker: a model's, or a checker's own.

    Fetches the weights of the variant, or the plain ones if it has none. The caller handles missing files.
    """
    for file in dict.fromkeys(weight_file("model", name) for name in (variant, None)):
        inside = ["safety_checker/config.json", f"safety_checker/{file}", "feature_extractor/preprocessor_config.json"]
        folder = _fetch(repo, revision, [*inside, "config.json", file, "preprocessor_config.json"])
        if (folder / "safety_checker" / file).is_file() or (folder / file).is_file():
            break
    return folder


def fetch_tokenizer() -> Path:
    """The local folder of CLIP's tokenizer (1.5 MB), which single files lack."""
    try:
        return _fetch(CLIP_TOKENIZER, None, [name for name in TOKENIZER_FILES if name != "tokenizer.json"])
    except ValueError as error:
        raise ValueError(
            f"a single file has no tokenizer, and {error} Or pass a tokenizer's folder as tokenizer="
        ) from error


def fetch_image_encoder(source: str) -> Path:
    """The local folder of a CLIP vision model: a repository, or a folder in one (owner/name/folder)."""
    owner, _, rest = source.partition("/")
    name, _, inside = rest.partition("/")
    files = ["config.json", "preprocessor_config.json", "model.safetensors"]
    return (
        _fetch(f"{owner}/{name}" if name else owner, None, [f"{inside}/{file}".lstrip("/") for file in files]) / inside
    )


def _at(repo: str, revision: str | None) -> str:
    return repo if revision is None else f"{repo} at revision {revision}"


def _fetch(repo: str, revision: str | None, files: list[str]) -> Path:
    import huggingface_hub

    # huggingface_hub.errors lacks some of them before 0.25.
    from huggingface_hub.utils import (  # type: ignore[attr-defined, unused-ignore]
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = _at(repo, revision)
    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=files))
    except GatedRepoError as error:
        raise ValueError(
            f"{repo} requires an account that has accepted its terms: "
            "accept them on its page and log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"there is no model {repo!r} on the hub, and no such file or folder here; check the spelling (owner/name)"
            + ("; runwayml's models are now at stable-diffusion-v1-5/." if repo.startswith("runwayml/") else ".")
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"the hub has no {at}; leave revision out for the newest one.") from error
    except HFValidationError as error:
        raise ValueError(f"{repo!r} is neither a file or folder here nor a hub id (owner/name): {error}") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        staged = _staged(repo, revision)
        if staged is not None:
            return staged
        moved = ". It moved to stable-diffusion-v1-5/" + repo.partition("/")[2] if repo.startswith("runwayml/") else ""
        if "/" not in repo:
            moved = f" (there is no {repo!r} here; if a picture names it, give its path: pictures record the last part)"
        raise ValueError(
            f"{at} is not in the hub's cache and the hub cannot be reached (or HF_HUB_OFFLINE is set); "
            f"go online once to fetch it, or give a folder or a .safetensors file{moved}."
        ) from error
    except Exception as error:  # from the disk, or an HTTP library that depends on the version
        problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"could not fetch {at} from the hub: {problem}. Try again; fetched files are kept") from error


def _staged(repo: str, revision: str | None) -> Path | None:
    """A snapshot in a cache that was filled by hand, which huggingface_hub ignores if refs/ is missing."""
    from huggingface_hub.constants import HF_HUB_CACHE

    root, name = Path(HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}", revision or "main"
    ref = root / "refs" / name
    commit = ref.read_text(errors="replace").strip() if ref.is_file() else name
    snapshots = [folder for folder in sorted((root / "snapshots").glob("*")) if folder.is_dir()]
    exact = [folder for folder in snapshots if folder.name == commit]
    if exact:
        return exact[0]
    return snapshots[0] if revision is None and len(snapshots) == 1 else None
