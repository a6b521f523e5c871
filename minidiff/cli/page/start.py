"""minidiff page: what its flags choose, and the page that shows it."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from ...vocabulary import BUNDLED
from ..main import LOADING
from .studio import Source


def start(args: argparse.Namespace) -> None:
    """Serve the page until it is interrupted. ValueError without gradio."""
    from ...speed.accelerate import keep_memory

    try:
        from .app import Page, launch
    except ImportError as error:
        raise ValueError(f"the page needs gradio ({error}); install it with: pip install 'minidiff[page]'") from error
    keep_memory()
    launch(Page(sources(args), folder(args.out)), args.host, args.port)


def sources(args: argparse.Namespace) -> list[Source]:
    """One source for each model named, all with the same LoRAs and arguments of load()."""
    if bool(args.ip_adapter) != bool(args.image_encoder):
        raise ValueError("got one of --ip-adapter and --image-encoder; expected both")
    loading = {name: getattr(args, name) for name in LOADING if name != "loras"}
    loading = {name: value for name, value in loading.items() if value is not None and value is not False}
    loras, adapters = tuple(args.loras or ()), tuple(args.ip_adapter or ())
    names = dict.fromkeys(args.model or [BUNDLED])
    return [Source(name, loading, loras, adapters, args.image_encoder) for name in names]


def folder(out: str | None) -> Path:
    """Where pictures are written: as asked, or a new temporary folder."""
    path = Path(tempfile.mkdtemp(prefix="minidiff-page-") if out is None else out).resolve()
    path.mkdir(parents=True, exist_ok=True)
    return path
