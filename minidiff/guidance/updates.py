"""Inputs that change between the steps of a run: what edits with `update` make of each step's attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import or_

from ..networks.attention import HEAD_MEAN, Edit, Inputs, Maps, Record
from .objectives._objective import converted


class Updates:
    """The inputs of one run that its edits replaced so far: `found`.

    edits: those of the run. told: who else reads the inputs, such as guidance.
    """

    def __init__(self, edits: Sequence[Edit], told: Callable[[Inputs], None] | None = None) -> None:
        self.edits, self.told = tuple(edit for edit in edits if edit.update is not None), told
        self.found: Inputs = {}

    def record(self, own: Record | None, index: int) -> Record | None:
        """What a step is to keep: its own, and what the edits read."""
        rows = "cond" if own is None else own.rows
        acting = [Record(edit.sites, HEAD_MEAN, rows) for edit in self.edits if edit.acts_in(index)]
        return reduce(or_, acting if own is None else [own, *acting]) if acting else own

    def take(self, maps: Maps, record: Record, own: Record | None, inputs: Inputs, index: int) -> Maps:
        """Take what a step kept for `record`; returns what `own` keeps of it."""
        for edit in self.edits:
            if edit.acts_in(index):
                assert edit.update is not None and isinstance(edit.sites, frozenset)  # chosen
                views = converted(maps, record.kinds, [(site, HEAD_MEAN) for site in edit.sites], inputs)
                seen = {site: kept for (site, _), kept in views.items()}
                self.found = {**self.found, **edit.update(seen, {**inputs, **self.found})}
        if self.told is not None:
            self.told(self.found)
        if own is None:
            return {}
        return {site: kept for (site, _), kept in converted(maps, record.kinds, own.kinds.items(), inputs).items()}
