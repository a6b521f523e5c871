"""Phrases in several texts whose contexts stand one after the other: a prompt and those of its regions."""

from __future__ import annotations

from dataclasses import dataclass

from ..networks.text import Phrases, Tokens
from .chunks import Marked

MARK = "\ud800"
"""Stands between the texts: half a character, which no valid text has."""
_BETWEEN = " | "  # in the text where phrases are found; none matches across it


@dataclass(frozen=True, eq=False)
class Joined(Phrases):
    """Finds phrases in texts that are joined by MARK.

    first: reads the first text. start: the positions of its context. others: reads the other texts. length: L, the
    positions of all.
    """

    first: Phrases
    start: int
    others: Phrases

    def read(self, prompt: str) -> Tokens:
        """The tokens of all texts, without those that are cut off."""
        text, ids, ranges, places, at = "", list[int](), list[tuple[int, int]](), list[int](), 0
        for number, own in enumerate(prompt.split(MARK)):
            phrases = self.others if number else self.first
            if isinstance(phrases, Marked) and phrases.step is None and len(phrases.changes(own)) > 1:
                raise ValueError(f"{own!r} changes from step to step; with regions, no phrases are found in such texts")
            read = phrases.read(own)
            text += _BETWEEN if number else ""
            ids += read.ids[: len(read.places)]
            ranges += [(len(text) + a, len(text) + b) for a, b in read.ranges[: len(read.places)]]
            places += [at + place for place in read.places]
            text, at = text + read.text, at + (self.others.length if number else self.start)
        return Tokens(text, ids, ranges, places, self.others.length)
