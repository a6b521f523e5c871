"""Steps that go on with what a look has computed: one that moves nothing is the first part of the step's own pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..networks.unet import Begun


class Begins:
    """Passes that looks have begun, by `forward`, and steps can finish.

    forward: of a UNet that tells where a pass ended.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._last: deque[Begun] = deque(maxlen=1)
        self._of: dict[int, Begun] = {}  # an image that is as its last look has seen it
        self.forward = partial(forward, at_stop=self._last.append)

    def keep(self, rows: Sequence[int], moving: Container[int]) -> None:
        """Of the last look, at images `rows`, keep the passes of those that do not move. moving: by index in rows."""
        while self._last:
            begun = self._last.pop()
            self._of.update({row: begun.row(i) for i, row in enumerate(rows) if i not in moving})

    def take(self, images: int) -> Begun | None:
        """The pass of all images, once; None if one of them has none."""
        found = [self._of[row] for row in sorted(self._of)]
        self._of.clear()
        return found[0].joined(found[1:]) if len(found) == images else None
