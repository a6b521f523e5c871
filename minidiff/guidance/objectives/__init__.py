"""Objectives of the attention, one file each: NAME.py holds NAME_loss.

To add one, add its file; the command line and `guidance="NAME"` find it by that name.
"""

from collections.abc import Iterator, Mapping
from importlib import import_module

from ...vocabulary import OBJECTIVES as _NAMES
from ._objective import Objective, Settings, Term, objective


class _ByName(Mapping[str, Objective]):
    """Imports the file of an objective when it is asked for."""

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
"""By the names under which generate and the command line know them."""

__all__ = ["OBJECTIVES", "Objective", "Settings", "Term", "objective"]
