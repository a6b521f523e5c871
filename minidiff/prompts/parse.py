"""A1111's prompt language: a text to weighted pieces.

    (word:1.3)   weight 1.3
    (word)       weight 1.1
    [word]       weight 1/1.1
    \\( \\) ...    brackets that are text
    BREAK        the end of a chunk

After modules/prompt_parser.py of AUTOMATIC1111/stable-diffusion-webui 1.10. Marks nest, and weights multiply; a bracket
that is never closed counts to the end of the text, one that was never opened is text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..checks import shown

LONGEST = 100_000
"""Characters of a prompt. Each costs about 100 bytes, and 75 tokens a run of the text encoder."""
_MOST = 1000.0  # weight of a piece, either sign; beyond about 2 there is only noise, and far beyond half precision ends
_ROUND, _SQUARE = 1.1, 1 / 1.1
_MARK = re.compile(r"\\[()\[\]\\]?|[(\[\])]|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[^\\()\[\]:]+|:")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
NETWORK = re.compile(r"<(lora|lyco|hypernet|locon):([^<>:]*):?([^<>]*)>")
"""A1111's mark for a network: kind, name, weight and more."""


@dataclass(frozen=True)
class Piece:
    """A part of a prompt, without marks. `ends_chunk`: BREAK, which has no text."""

    text: str
    weight: float = 1.0
    ends_chunk: bool = False


def check(text: str) -> None:
    """ValueError for a text that cannot be used."""
    if len(text) > LONGEST:
        raise ValueError(f"the prompt has {len(text):,} characters; expected at most {LONGEST:,}")
    network = NETWORK.search(text)
    if network is not None:
        kind, name, weight = network.groups()
        mend = f"load it with the model: --lora {name or 'FILE'}.safetensors={weight or 1}, or load(..., loras=...)"
        raise ValueError(
            f"{shown(network[0])} in the prompt names a file; expected text alone. "
            + (mend if kind != "hypernet" else "Hypernetworks are not supported")
        )
    pieces(text)


def pieces(text: str) -> tuple[Piece, ...]:
    """The pieces of a text in order, neighbours of one weight joined. ValueError for a weight that is too large."""
    texts: list[str | None] = []  # None: BREAK
    weights: list[float] = []
    open_round: list[int] = []  # where in `texts` each group that is still open began
    open_square: list[int] = []

    def weigh(first: int, by: float) -> None:
        weights[first:] = [weight * by for weight in weights[first:]]

    for mark in _MARK.finditer(text):
        token, weight = mark[0], mark[1]
        if token == "(":
            open_round.append(len(texts))
        elif token == "[":
            open_square.append(len(texts))
        elif open_round and (weight is not None or token == ")"):
            weigh(open_round.pop(), _ROUND if weight is None else float(weight))
        elif open_square and token == "]":
            weigh(open_square.pop(), _SQUARE)
        else:  # of a backslash before anything but a mark nothing is left, as in A1111
            parts = [token[1:]] if token[0] == "\\" else _BREAK.split(token)
            texts += [one for part in parts for one in (part, None)][:-1]
            weights += [1.0] * (len(texts) - len(weights))
    for first in open_round:
        weigh(first, _ROUND)
    for first in open_square:
        weigh(first, _SQUARE)
    return _joined(texts, weights)


def _joined(texts: list[str | None], weights: list[float]) -> tuple[Piece, ...]:
    joined: list[Piece] = []
    for text, weight in zip(texts, weights, strict=True):
        if text is None:
            joined.append(Piece("", ends_chunk=True))
            continue
        if not abs(weight) <= _MOST:
            raise ValueError(f"{shown(text)} in the prompt has the weight {weight:g}; expected -{_MOST:g} to {_MOST:g}")
        if joined and not joined[-1].ends_chunk and joined[-1].weight == weight:
            joined[-1] = Piece(joined[-1].text + text, weight)
        elif text:
            joined.append(Piece(text, weight))
    return tuple(joined)
