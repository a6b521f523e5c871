"""A1111's prompt language: a text to weighted pieces.

    (word:1.3)   weight 1.3
    (word)       weight 1.1
    [word]       weight 1/1.1
    \\( \\) ...    brackets that are text
    BREAK        the end of a chunk
    [a:b:5]      a for 5 steps, then b; [a:b:0.5]: a for half of the steps
    [b:5]        nothing for 5 steps, then b; [a::5]: a for 5 steps, then nothing
    [a|b]        a and b in turn, a step each
    a AND b:0.8  texts of their own, combined by their weights in every step (Liu et al. 2022)

After modules/prompt_parser.py of AUTOMATIC1111/stable-diffusion-webui 1.10. Marks nest, and weights multiply; a bracket
that is never closed counts to the end of the text, one that was never opened is text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ..checks import shown

LONGEST = 100_000
"""Characters of a prompt. Each costs about 100 bytes, and 75 tokens a run of the text encoder."""
_MOST = 1000.0  # weight of a piece, either sign; beyond about 2 there is only noise, and far beyond half precision ends
MOST_PARTS = 32
"""Texts that AND can join: each costs a pass through the UNet in every step."""
_ROUND, _SQUARE = 1.1, 1 / 1.1
_MARK = re.compile(r"\\[()\[\]\\]?|[(\[\])]|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[^\\()\[\]:]+|:")
_AND = re.compile(r"\bAND\b")
_PART_WEIGHT = re.compile(r"\s*:\s*([-+]?(?:\d+\.?|\d*\.\d+))\s*$")
_TOKEN = re.compile(r"\\.?|[()\[\]:|]|[^\\()\[\]:|]+", re.DOTALL)
_SEPARATOR = re.compile("[:|]")
_NUMBER = re.compile(r"\s*[-+]?(?:\d+\.?\d*|\.\d+)\s*")
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
            f"{shown(network[0])} in the prompt names a file; expected text alone: "
            + (mend if kind != "hypernet" else "Hypernetworks are not supported")
        )
    for part, _ in parts(text):
        pieces(part)


def parts(text: str) -> tuple[tuple[str, float], ...]:
    """The texts that AND joins, each with its weight; the text itself where there is none.

    Unlike A1111, which takes the end of "at 12:30" for a weight too, only beside an AND.
    """
    texts = _AND.split(text)
    if len(texts) == 1:
        return ((text, 1.0),)
    if len(texts) > MOST_PARTS:
        raise ValueError(f"AND joins {len(texts)} texts in the prompt; expected at most {MOST_PARTS}")
    found = []
    for one in texts:
        mark = _PART_WEIGHT.search(one)
        found.append((one, 1.0) if mark is None else (one[: mark.start()], _checked(one, float(mark[1]))))
    return tuple(found)


def at_step(text: str, step: int, steps: int) -> str:
    """What a text reads in a step, counted from 1, of so many: one choice of every [from:to:when] and [a|b].

    when: a number of steps, or with a decimal point a share of them. [a|b] alternates from step to step. So A1111
    describes it; its code counts from 0 here and keeps every choice a step longer. A group in brackets that are not
    balanced is text.
    """
    if "[" not in text or not _SEPARATOR.search(text):
        return text
    groups = [_Group("")]
    for mark in _TOKEN.finditer(text):
        token = mark[0]
        if token in "([":
            groups.append(_Group(token))
        elif token in ":|" and groups[-1].opening == "[":
            groups[-1].separators += token
            groups[-1].fields.append("")
        elif token in ")]" and groups[-1].opening + token in ("()", "[]"):
            groups[-2].fields[-1] += groups.pop().closed(step, steps)
        else:
            if token in ")]":  # it closes nothing, so what is open around it is text
                groups = [_Group("", "", ["".join(group.written() for group in groups)])]
            groups[-1].fields[-1] += token
    return "".join(group.written() for group in groups)


@dataclass
class _Group:
    """A bracket that is open, and what follows it, divided at its own separators."""

    opening: str
    separators: str = ""
    fields: list[str] = field(default_factory=lambda: [""])

    def written(self) -> str:
        return self.opening + "".join(a + b for a, b in zip(self.fields, [*self.separators, ""], strict=True))

    def closed(self, step: int, steps: int) -> str:
        if self.opening == "(":
            return f"{self.written()})"
        if self.separators and ":" not in self.separators:
            return self.fields[(step - 1) % len(self.fields)]
        texts = self.fields[:1]
        for separator, text in zip(self.separators, self.fields[1:], strict=True):
            if separator == ":":
                texts.append(text)
            else:
                texts[-1] += f"|{text}"
        if not 2 <= len(texts) <= 3 or not _NUMBER.fullmatch(texts[-1]):
            return f"{self.written()}]"
        when = min(float(texts[-1]) * (steps if "." in texts[-1] else 1), steps)
        return texts[-2] if step > int(when) else texts[0] if len(texts) == 3 else ""


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
        _checked(text, weight)
        if joined and not joined[-1].ends_chunk and joined[-1].weight == weight:
            joined[-1] = Piece(joined[-1].text + text, weight)
        elif text:
            joined.append(Piece(text, weight))
    return tuple(joined)


def _checked(text: str, weight: float) -> float:
    if not abs(weight) <= _MOST:
        raise ValueError(f"{shown(text)} in the prompt has the weight {weight:g}; expected -{_MOST:g} to {_MOST:g}")
    return weight
