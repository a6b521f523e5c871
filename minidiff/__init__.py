"""Stable Diffusion 1.5 in plain PyTorch, with its attention maps and its layout in the caller's hands.

Public names are imported when they are first used, so that the command line prints its help without torch. They are
listed once, in __init__.pyi.
"""

import ast
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

__version__ = version("minidiff")
_HOMES = {
    alias.name: node.module
    for node in ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]  # None: a module of that name
    module = import_module(f".{home or name}", __name__)
    return getattr(module, name) if home else module


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
