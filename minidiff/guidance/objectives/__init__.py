"""Objectives of the attention, one file each: NAME.py holds NAME_loss.

To add one, add its file; the command line and `guidance="NAME"` find it by that name.
"""

from collections.abc import Mapping
from importlib import import_module

from ...vocabulary import OBJECTIVES as _NAMES
from ._objective import Objective, Settings, Term, objective

OBJECTIVES: Mapping[str, Objective] = {
    name: getattr(import_module(f".{name}", __name__), f"{name}_loss") for name in _NAMES
}
"""By the names under which generate and the command line know them."""

__all__ = ["OBJECTIVES", "Objective", "Settings", "Term", "objective"]
