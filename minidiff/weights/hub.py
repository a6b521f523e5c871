"""The hub: fetch just the files that are needed, or find them in its cache. huggingface_hub is imported when first needed."""

from pathlib import Path

from .sources import CLIP_TOKENIZER, TOKENIZER_FILES, weight_file


def fetch_model(repo: str, revision: str | None, variant: str | None) -> Path:
    """The local folder of a Stable Diffusion repository: configs, tokenizer and one set of safetensors."""
    return _fetch(
        repo,
        revision,
        [
            *(f"{part}/config.json" for part in ("unet", "vae", "text_encoder")),
            *(f"{part}/{weight_file('diffusion_pytorch_model', variant)}" for part in ("unet", "vae")),
            f"text_encoder/{weight_file('model', variant)}",
            *(f"tokenizer/{name}" for name in TOKENIZER_FILES),
            "model_index.json",
            "scheduler/scheduler_config.json",
        ],
    )


def fetch_vae(repo: str, variant: str | None) -> Path:
    """The local folder of an autoencoder's own repository, such as stabilityai/sd-vae-ft-mse, or a model's vae folder."""
    weights = weight_file("diffusion_pytorch_model", variant)
    folder = _fetch(repo, None, ["config.json", weights, "vae/config.json", f"vae/{weights}"])
    return folder / "vae" if (folder / "vae").is_dir() else folder


def fetch_tokenizer() -> Path:
    """The local folder of CLIP's tokenizer, which single files do not carry. 1.5 MB."""
    try:
        return _fetch(CLIP_TOKENIZER, None, [name for name in TOKENIZER_FILES if name != "tokenizer.json"])
    except ValueError as error:
        raise ValueError(
            f"a single file carries no tokenizer, and {error} Or pass the folder of one with tokenizer="
        ) from error


def _fetch(repo: str, revision: str | None, files: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    at = repo if revision is None else f"{repo} at revision {revision}"
    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=files))
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{repo} asks for an account that has accepted its terms: accept them on its page and log in with `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"there is no model {repo!r} on the hub, and no such file or folder here; check the spelling (owner/name)."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"the hub has no {at}; leave revision out for the newest one.") from error
    except errors.HFValidationError as error:
        raise ValueError(f"{repo!r} is neither a file or folder here nor a hub id (owner/name): {error}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ValueError(
            f"{at} is not in the hub's cache and the hub cannot be reached (or HF_HUB_OFFLINE is set); "
            "go online once to fetch it, or give a folder or a .safetensors file."
        ) from error
    except errors.HfHubHTTPError as error:
        raise ValueError(f"the hub did not give {at}: {error}") from error
