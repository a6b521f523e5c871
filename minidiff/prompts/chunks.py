"""Pieces of a prompt to chunks that the text encoder can read, and those to a context in which their weights act."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from ..networks.text import Phrases, TextEncoder, Tokens
from .parse import at_step, parts, pieces

BACKTRACK = 20
"""Of the last tokens of a full chunk, those after a comma go to the next one, if they are at most so many (A1111's
`comma_padding_backtrack`)."""


@dataclass(frozen=True, eq=False)
class Chunks(Tokens):
    """A prompt in chunks of `size` positions, each with its own markers and padding.

    weights: of the tokens. groups: to which piece each belongs. starts: the first token of each chunk, at least one.
    """

    weights: Sequence[float]
    groups: Sequence[int]
    starts: Sequence[int]


@dataclass(frozen=True, eq=False)
class Marked(Phrases):
    """Finds phrases in prompts with A1111's marks: in their text without the marks, in every chunk.

    length: L, the positions of a context: those of the texts that AND joins stand one behind the other, `part` each, a
    multiple of `size`, those of a chunk. step: of so many `steps`, from 1; None: what holds in all of them. composes:
    False where AND is a word, as in negative prompts.
    """

    size: int
    part: int
    steps: int = 1
    step: int | None = None
    composes: bool = True

    def texts(self, prompt: str) -> tuple[tuple[str, float], ...]:
        """The texts of the prompt in this step, with their weights in it. All prompts have at least one."""
        joined = parts(prompt) if self.composes else ((prompt, 1.0),)
        return tuple((at_step(text, self.step or 1, self.steps), weight) for text, weight in joined)

    def changes(self, prompt: str) -> tuple[Marked, ...]:
        """This in every step in which the prompt reads as in none before."""
        steps = [replace(self, step=step) for step in range(1, self.steps + 1)]
        return tuple({one.texts(prompt): one for one in reversed(steps)}.values())[::-1]

    def chunks(self, prompt: str) -> tuple[Chunks, ...]:
        """Each of the prompt's texts, from position 0."""
        return tuple(self.chunked(text) for text, _ in self.texts(prompt))

    def read(self, prompt: str) -> Tokens:
        """The prompt's tokens, with their positions in the context."""
        text = ""
        ids: list[int] = []
        ranges: list[tuple[int, int]] = []
        places: list[int] = []
        for n, one in enumerate(self.chunks(prompt)):
            ids += one.ids
            ranges += [(len(text) + start, len(text) + end) for start, end in one.ranges]
            places += [n * self.part + place for place in one.places]
            text += f"{one.text}\n"
        return Tokens(text[:-1], ids, ranges, places, self.size)

    def spans(self, prompt: str, phrase: str, occurrence: int | None = None) -> tuple[int, ...]:
        """Positions of the phrase's tokens; see Phrases. ValueError where they are not the same in all steps."""
        if self.step is not None:
            return super().spans(prompt, phrase, occurrence)
        return _same(prompt, phrase, [partial(one.spans, prompt, phrase, occurrence) for one in self.changes(prompt)])

    def all_spans(self, prompt: str, phrase: str) -> tuple[int, ...]:
        """Positions of the phrase's tokens at all its occurrences; otherwise like `spans`."""
        if self.step is not None:
            return super().all_spans(prompt, phrase)
        return _same(prompt, phrase, [partial(one.all_spans, prompt, phrase) for one in self.changes(prompt)])

    def chunked(self, part: str) -> Chunks:
        """One text without AND and steps. Every piece is tokenized by itself, as in A1111."""
        text, own = "", pieces(part)
        ids: list[int] = []
        ranges: list[tuple[int, int]] = []
        groups: list[int] = []
        breaks: list[int] = []  # the tokens before which a chunk ends
        for group, piece in enumerate(own):
            if piece.ends_chunk:
                breaks.append(len(ids))
                text += "\n"  # keeps the words on both sides apart
                continue
            more, at = self._tokenize(piece.text)
            ids += more
            ranges += [(len(text) + start, len(text) + end) for start, end in at]
            groups += [group] * len(more)
            text += piece.text
        comma = self.tokenizer.convert_tokens_to_ids(",</w>")  # get_vocab() would cost a tenth of a second
        added = {rows.start: len(rows) for rows in self.added.values()}
        counts = [added.get(token, 1) for token in ids]
        starts = _starts([token == comma for token in ids], counts, breaks, self.size - 2)
        places = [
            chunk * self.size + 1 + n
            for chunk, (first, end) in enumerate(pairwise([*starts, len(ids)]))
            for n in range(end - first)
        ]
        return Chunks(text, ids, ranges, places, self.size, [own[group].weight for group in groups], groups, starts)


def _same(prompt: str, phrase: str, finds: Sequence[Callable[[], tuple[int, ...]]]) -> tuple[int, ...]:
    """What all of them find, of those that find anything."""
    found: set[tuple[int, ...]] = set()
    missing: ValueError | None = None
    for find in finds:
        try:
            found.add(find())
        except ValueError as error:
            missing = missing or error
    if len(found) > 1:
        raise ValueError(
            f"phrase {phrase!r} moves from step to step, because of [from:to:when] or [a|b] before it in the prompt "
            f"{prompt!r}; put it before them, or read the maps of each step"
        )
    if missing is not None and not found:
        raise missing
    return found.pop()


def _starts(commas: Sequence[bool], counts: Sequence[int], breaks: Sequence[int], room: int) -> list[int]:
    """The first token of each chunk, as A1111 fills them. counts: of the tokens that stay together from each one on.
    room: for a chunk's own tokens."""
    starts, comma, ends = [0], None, Counter(breaks)
    for token, (is_comma, count) in enumerate(zip(commas, counts, strict=True)):
        if ends[token]:
            starts += [token] * ends[token]
            comma = None
        if token - starts[-1] == room:
            near = comma is not None and not is_comma and token - comma <= BACKTRACK
            starts.append(comma + 1 if comma is not None and near else token)
            comma = None  # A1111 forgets that a chunk began with one
        elif is_comma:
            comma = token
        if token + count - starts[-1] > room:
            starts.append(token)
            comma = None
    return starts + [len(commas)] * (ends[len(commas)] - 1)  # no chunk after a BREAK at the end


def encode(
    encoder: TextEncoder,
    prompts: Sequence[Chunks],
    counts: Sequence[int],
    emphasis: str = "a1111",
    clip_skip: int | None = None,
) -> list[Tensor]:
    """The context of each text, [count * S, D]: as many chunks as `counts` says, the last ones empty.

    emphasis: what a weight w does to a token's encoding z. "a1111": w * z, and each chunk is scaled so that its mean
    stays (modules/sd_emphasis.py). "compel": e + w * (z - e), with e of the empty prompt; and every piece with w < 1
    draws the context towards that of the prompt in which no token sees the piece, by a share of tan((1 - w) * pi / 2)
    (compel 2, DownweightMode.MASK). "none": nothing.
    """
    encoder.warn_of_unknown_words([prompt.text for prompt in prompts])
    rows: list[list[int]] = []
    for prompt, count in zip(prompts, counts, strict=True):
        own = [encoder.framed(prompt.ids[a:b]) for a, b in pairwise([*prompt.starts, len(prompt.ids)])]
        rows += own + [encoder.framed([])] * (count - len(own))
    ids = torch.tensor(rows, device="cpu")
    parts = zip(prompts, ids.split(list(counts)), encoder.encode_ids(ids, clip_skip).split(list(counts)), strict=True)
    return [_emphasized(encoder, *part, emphasis, clip_skip).flatten(0, 1) for part in parts]


def _emphasized(
    encoder: TextEncoder, prompt: Chunks, ids: Tensor, z: Tensor, emphasis: str, clip_skip: int | None
) -> Tensor:
    """Chunks z [n,S,D] with the weights in them; the same tensor where there are none."""
    if emphasis == "none" or all(weight == 1 for weight in prompt.weights):
        return z
    weights = torch.ones(ids.numel(), dtype=torch.float32, device="cpu")
    weights[list(prompt.places)] = torch.tensor(prompt.weights, dtype=torch.float32, device="cpu")
    weights = weights.view(*ids.shape, 1).to(z.device)
    if emphasis == "compel":
        return _drawn(encoder, prompt, ids, z.float(), weights, clip_skip).to(z.dtype)
    scaled = z.float() * weights
    return (scaled * (z.float().mean((1, 2), keepdim=True) / scaled.mean((1, 2), keepdim=True))).to(z.dtype)


def _drawn(
    encoder: TextEncoder, prompt: Chunks, ids: Tensor, z: Tensor, weights: Tensor, clip_skip: int | None
) -> Tensor:
    empty = encoder.encode_ids(torch.tensor([encoder.framed([])], device="cpu"), clip_skip).float()
    base, size = torch.where(weights == 1, z, empty + (z - empty) * weights), prompt.size
    light: dict[int, list[int]] = defaultdict(list)
    share_of: dict[int, float] = {}
    for place, group, weight in zip(prompt.places, prompt.groups, prompt.weights, strict=True):
        if weight < 1:
            light[group].append(place)
            share_of[group] = math.tan((1 - max(weight, 1e-5)) * math.pi / 2)
    drawn = torch.zeros_like(base)
    for group, places in light.items():
        mask = torch.ones(ids.shape, dtype=torch.long, device="cpu")
        mask.view(-1)[places] = 0
        some = sorted({place // size for place in places})
        without = encoder.encode_ids(ids[some], clip_skip, mask[some]).float()
        without = torch.where(weights[some] == 1, without, empty + (without - empty) * weights[some])
        drawn[some] += share_of[group] * (without - base[some])
    return base + drawn / (1 + sum(share_of.values()))
