"""Objectives (losses on attention maps), one file each: NAME.py defines NAME_loss.

Adding a file adds the objective: the command line and `guidance="NAME"` find it by name.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module

from ...vocabulary import OBJECTIVES as _NAMES
from ._objective import Objective, Settings, Term, objective


class _ByName(Mapping[str, Objective]):
    """Imports an objective's file on first access."""

    def __getitem__(self, name: str) -> Objective:
        if name not in _NAMES:
            raise KeyError(name)
        found: Objective = getattr(import_module(f".{name}", __name__), f"{name}_loss")
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(_NAMES)

    def __len__(self) -> int:
        return len(_NAMES)


OBJECTIVES: Mapping[str, Objective] = _ByName()
"""Objectives by the names that generate() and the command line use."""

__all__ = ["OBJECTIVES", "Objective", "Settings", "Term", "objective"]
