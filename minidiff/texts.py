"""The texts of a request: what they are in each step, their contexts, and where their phrases are."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import warn
from .guidance.layout import Layout, Region, make_layout, read_regions
from .model import Model
from .networks.sites import Position, Site
from .networks.text import Phrases
from .prompts.chunks import Marked, encode
from .request import Request, listed

# A1111's syntax for weights, networks and breaks, which a plain prompt does not have
_MARKS = re.compile(r"\([^()]+:\s*[\d.]+\)|<(?:lora|lyco|hypernet):[^>]*>|\bBREAK\b")


@dataclass(frozen=True, eq=False)
class Texts:
    """The P prompts of a request, or their contexts [P,L,D]; each makes `repeats` adjacent images.

    phrases: finds phrases in the prompts; with a syntax, as they read in a step. chunks: of how many each text of each
    prompt consists, in all steps, and its negative one. emphasis: how weights act on them.
    """

    prompts: tuple[str, ...] | None
    negatives: tuple[str, ...]
    context: Tensor | None
    negative_context: Tensor | None
    repeats: int
    phrases: Phrases
    chunks: tuple[int, ...] = ()
    emphasis: str = "a1111"

    @classmethod
    def of(cls, request: Request, model: Model, steps: int) -> Texts:
        """One text or context per prompt, each with a negative one ("" by default), for a run of so many steps."""
        width = model.unet.config.cross_attention_dim
        for name, context, count in (
            ("context", request.context, request.prompts),
            ("negative_context", request.negative_context, request.prompts),
        ):
            if context is not None and (len(context) != count or context.shape[2] != width):
                raise ValueError(
                    f"{name} is {list(context.shape)}; expected a tensor [{count}, L, {width}], such as "
                    "model.text.encode gives"
                )
        prompts = None if request.prompt is None else tuple(listed(request.prompt))
        negatives = tuple(listed(request.negative_prompt or ""))
        texts = cls(
            prompts,
            negatives * (request.prompts // len(negatives)),
            request.context,
            request.negative_context,
            request.images_per_prompt,
            Phrases(model.text.tokenizer, model.text.length, added=model.text.added),
        )
        if request.syntax == "a1111":
            return texts._marked(request.emphasis or "a1111", steps)
        marked = next((text for text in (*(prompts or ()), *negatives) if _MARKS.search(text)), None)
        if marked is not None and model.text.words is None:
            warn(
                f"{_MARKS.search(marked)[0]!r} in the prompt is A1111 syntax, which is not interpreted: the model "  # type: ignore[index]
                'reads it as plain text. syntax="a1111" interprets it'
            )
        return texts

    def _marked(self, emphasis: str, steps: int) -> Texts:
        """The same, read with A1111's syntax. A prompt and its negative one get equally many chunks."""
        size = self.phrases.length
        marked = Marked(self.phrases.tokenizer, size, size, size, steps, added=self.phrases.added)
        counts = [
            [max(len(one.starts) for step in reader.changes(text) for one in step.chunks(text)) for text in texts]
            for reader, texts in ((marked, self.prompts or ()), (replace(marked, composes=False), self.negatives))
        ]
        given = [] if self.context is None else [self.context.shape[1] // size] * len(self.context)
        chunks = tuple(map(max, zip(*(some for some in (*counts, given) if some), strict=True)))
        part, joined = max(chunks) * size, max((len(marked.texts(text)) for text in self.prompts or ()), default=1)
        return replace(self, phrases=replace(marked, length=joined * part, part=part), chunks=chunks, emphasis=emphasis)

    def in_each_step(self) -> tuple[Texts, ...]:
        """As they read in each step, the same value where nothing changes; one for all if nothing ever does."""
        if not isinstance(self.phrases, Marked):
            return (self,)
        unlike: dict[object, Texts] = {}
        found = []
        for step in range(1, self.phrases.steps + 1):
            one = replace(self, phrases=replace(self.phrases, step=step))
            reads = [[reader.texts(text) for text in some] for reader, some in one._readers()]
            found.append(unlike.setdefault(repr(reads), one))
        return tuple(found) if len(unlike) > 1 else (found[0],)

    def _readers(self) -> list[tuple[Marked, tuple[str, ...]]]:
        """How to read the prompts, if there are any, and the negative ones, in which AND is a word."""
        assert isinstance(self.phrases, Marked)
        alone = replace(self.phrases, length=self.phrases.part, composes=False)
        return [(self.phrases, self.prompts or ()), (alone, self.negatives)]

    @property
    def negative_phrases(self) -> Phrases:
        """Finds phrases in the negative prompts."""
        return self._readers()[1][0] if isinstance(self.phrases, Marked) else self.phrases

    @property
    def weights(self) -> Tensor | None:
        """Of the texts that AND joins, [B,T], NaN where an image has fewer than another; None without an AND."""
        if not isinstance(self.phrases, Marked) or self.phrases.length == self.phrases.part:
            return None
        found = torch.full((len(self.negatives), self.phrases.length // self.phrases.part), math.nan)
        for row, prompt in zip(found, self.prompts or (), strict=True):
            for n, (_, weight) in enumerate(self.phrases.texts(prompt)):
                row[n] = weight
        return found.repeat_interleave(self.repeats, dim=0)

    @property
    def images(self) -> int:
        """B, the number of images."""
        return len(self.negatives) * self.repeats

    @property
    def any_negative(self) -> bool:
        """True where the caller gave any negative prompt or context."""
        return self.negative_context is not None or any(self.negatives)

    @torch.no_grad()
    def encode(self, model: Model, clip_skip: int | None, negative: bool) -> Tensor:
        """[B,L,D], or [uncond, cond] [2B,L,D] with `negative`. Repeated texts are encoded once."""
        cond = self._encoded(model, False, clip_skip)
        if not negative:
            return cond
        uncond = self._encoded(model, True, clip_skip)
        if uncond.shape[1] != cond.shape[1]:
            raise ValueError(
                f"context holds {cond.shape[1]} tokens and the negative one {uncond.shape[1]}; expected equal lengths. "
                "Pass both context and negative_context"
            )
        return torch.cat([uncond, cond])

    def _encoded(self, model: Model, negative: bool, clip_skip: int | None) -> Tensor:
        context = self.negative_context if negative else self.context
        if context is None:
            texts = self.negatives if negative else self.prompts
            assert texts is not None  # a request has one of the two
            if isinstance(self.phrases, Marked):
                context = self._read(self._readers()[negative][0], model, texts, clip_skip)
            else:
                unique = list(dict.fromkeys(texts))
                context = model.text.encode(unique, clip_skip)[[unique.index(text) for text in texts]]
        return context.to(model.device, model.dtype).repeat_interleave(self.repeats, dim=0)

    def _read(self, reader: Marked, model: Model, texts: Sequence[str], clip_skip: int | None) -> Tensor:
        """[P,L,D], zeros at the positions that a text does not have."""
        wanted = [[(part, n) for part, _ in reader.texts(text)] for text, n in zip(texts, self.chunks, strict=True)]
        unique = list(dict.fromkeys(key for keys in wanted for key in keys))
        read, counts = [reader.chunked(part) for part, _ in unique], [count for _, count in unique]
        found = encode(model.text, read, counts, self.emphasis, clip_skip)
        part_of = {key: _padded(one, reader.part) for key, one in zip(unique, found, strict=True)}
        rows = [torch.cat([part_of[key] for key in keys]) for keys in wanted]
        assert isinstance(self.phrases, Marked)
        return torch.stack([_padded(row, self.phrases.length) for row in rows])

    @property
    def unread(self) -> Tensor | None:
        """A bias for logits [B,1,1,1,L] that hides the positions an image does not use; None where all are used.

        Hidden tokens get 1e-26 of the attention, not 0: an objective may divide by all that a token gets.
        """
        if not isinstance(self.phrases, Marked) or self.prompts is None:
            return None
        size, part = self.phrases.size, self.phrases.part
        joined = [len(self.phrases.texts(prompt)) for prompt in self.prompts]
        at = torch.arange(self.phrases.length)
        unread = at % part >= torch.tensor(self.chunks)[:, None] * size
        unread |= at // part >= torch.tensor(joined)[:, None]
        if not unread.any():
            return None
        bias = torch.zeros(unread.shape).masked_fill(unread, -60.0)
        return bias.repeat_interleave(self.repeats, dim=0)[:, None, None, None]

    def regions(self, request: Request, model: Model) -> tuple[tuple[Region, ...], ...]:
        """Each image's regions, with the tokens of their phrases."""
        found = []
        for i, boxes in enumerate(request.layouts):
            prompt = None if self.prompts is None else self.prompts[i]
            length = self.phrases.length if self.context is None else self.context.shape[1]

            def find(phrase: str, prompt: str | None = prompt) -> tuple[int, ...]:
                if prompt is None:
                    raise ValueError(f"boxes has the key {phrase!r} but there is no prompt; expected token positions")
                return self._find(prompt, phrase)

            found.append(() if boxes is None else read_regions(boxes, find, length))
        return tuple(own for own in found for _ in range(self.repeats))

    def _find(self, prompt: str, phrase: str) -> tuple[int, ...]:
        """Positions of a phrase; none in a step whose text lacks it, if another's has it."""
        try:
            return self.phrases.all_spans(prompt, phrase)
        except ValueError:
            if isinstance(self.phrases, Marked):
                for other in self.phrases.changes(prompt):
                    with suppress(ValueError):
                        other.all_spans(prompt, phrase)
                        return ()
            raise

    def layout(
        self, model: Model, regions: Sequence[Sequence[Region]], length: int, there: Mapping[Site, Position]
    ) -> Layout:
        """The regions of a batch on every grid of the UNet. length: L of the contexts."""
        if self.prompts is None:
            tokens = [length - 1] * self.images  # all but the start marker: the prompt's length is unknown
        else:
            tokens = [self.phrases.num_tokens(prompt) for prompt in self.prompts for _ in range(self.repeats)]
        layout = make_layout(regions, tokens, length, {at.grid for at in there.values()}, model.device)
        if self.prompts is None or not self.chunks:
            return layout
        words = torch.zeros_like(layout.words)
        for i, prompt in enumerate(self.prompts):
            words[i * self.repeats : (i + 1) * self.repeats, list(self.phrases.read(prompt).places)] = 1
        return layout._replace(words=words.to(model.device))


def _padded(context: Tensor, length: int) -> Tensor:
    """[l,D] -> [L,D], with zeros."""
    return F.pad(context, (0, 0, 0, length - len(context)))
