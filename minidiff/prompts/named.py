"""What in a prompt can be named: its words, and its phrases that boxes are likely for."""

from __future__ import annotations

import re

_WORD = r"\w+(?:['-]\w+)*"
_SMALL = {"a", "an", "the", "of", "in", "on", "at", "by", "to", "with", "and", "or", "for", "from"}  # end no phrase


def words(prompt: str) -> list[str]:
    """The words of a prompt, each once."""
    return list(dict.fromkeys(re.findall(_WORD, prompt.lower())))


def phrases(prompt: str) -> list[str]:
    """What a box can be named: runs of up to three words that neither start nor end with a small one; longer first."""
    found: dict[str, None] = {}
    for part in re.split(r"[^\w\s'-]+|\bBREAK\b|\bAND\b", prompt):
        own = re.findall(_WORD, part.lower())
        for length in (3, 2, 1):
            runs = [own[at : at + length] for at in range(len(own) - length + 1)]
            found |= {" ".join(run): None for run in runs if not _SMALL & {run[0], run[-1]}}
    return sorted(found, key=lambda phrase: -len(phrase.split()))
