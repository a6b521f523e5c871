"""The texts of a request: what they are in each step, their contexts, and where their phrases are."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .apart import Apart
from .checks import listed, warn
from .guidance.layout import Layout, PlacedObject, make_layout, read_objects
from .guidance.regions import Region, share_bias, share_name, shares
from .guidance.relations import Relation
from .model import Model
from .networks.sites import Grid, Position, Site, choose, cross
from .networks.text import Phrases
from .prompts.chunks import Marked, encode
from .prompts.joined import MARK, Joined
from .request import Request

# A1111's syntax for weights, networks and breaks, which a plain prompt does not have
_MARKS = re.compile(r"\([^()]+:\s*[\d.]+\)|<(?:lora|lyco|hypernet):[^>]*>|\bBREAK\b")


@dataclass(frozen=True, eq=False)
class Texts:
    """The P prompts of a request, or their contexts [P,L,D]; each makes `repeats` adjacent images.

    phrases: finds phrases in the prompts; with a syntax, as they read in a step. chunks: of how many each text of each
    prompt consists, in all steps, and its negative one. emphasis: how weights act on them.
    areas: the regions of each prompt; own: the texts of all of them, whose contexts stand behind the prompt's own.
    base_weight: how much the prompts count in regions.
    """

    prompts: tuple[str, ...] | None
    negatives: tuple[str, ...]
    context: Tensor | None
    negative_context: Tensor | None
    repeats: int
    phrases: Phrases
    chunks: tuple[int, ...] = ()
    emphasis: str = "a1111"
    areas: tuple[tuple[Region, ...], ...] = ()
    own: Texts | None = None
    base_weight: float = 0.0

    @classmethod
    def of(cls, request: Request, model: Model, steps: int) -> Texts:
        """One text or context per prompt, each with a negative one ("" by default), for a run of so many steps."""
        width, count = model.unet.config.cross_attention_dim, request.prompts
        for name in ("context", "negative_context"):
            context = getattr(request, name)
            if context is not None and (len(context) != count or context.shape[2] != width):
                raise ValueError(
                    f"{name} is {list(context.shape)}; expected a tensor [{count}, L, {width}], such as "
                    "model.text.encode gives"
                )
        prompts = None if request.prompt is None else tuple(listed(request.prompt))
        negatives = tuple(listed(request.negative_prompt or ""))
        texts = cls(
            prompts,
            negatives * (count // len(negatives)),
            request.context,
            request.negative_context,
            request.images_per_prompt,
            Phrases(model.text.tokenizer, model.text.length, added=model.text.added),
        )
        if any(request.areas):
            instead = texts.negatives if request.regions_apart else ()
            own = cls.of(request.filled(_of_areas(request.areas, instead)), model, steps)
            texts = replace(texts, areas=request.areas, own=own, base_weight=request.base_weight)
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
        if self.own is not None and (joined > 1 or self.own.weights is not None):
            raise ValueError("AND joins texts of the whole image, and regions is given; expected one of the two")
        return replace(self, phrases=replace(marked, length=joined * part, part=part), chunks=chunks, emphasis=emphasis)

    def in_each_step(self) -> tuple[Texts, ...]:
        """As they read in each step, the same value where nothing changes; one for all if nothing ever does."""
        if not isinstance(self.phrases, Marked):
            return (self,)
        unlike: dict[object, Texts] = {}
        found = []
        for step in range(1, self.phrases.steps + 1):
            one = self._at(step)
            own = [] if one.own is None else one.own._readers()
            reads = [[reader.texts(text) for text in some] for reader, some in one._readers() + own]
            found.append(unlike.setdefault(repr(reads), one))
        return tuple(found) if len(unlike) > 1 else (found[0],)

    def _at(self, step: int) -> Texts:
        assert isinstance(self.phrases, Marked)
        own = None if self.own is None else self.own._at(step)
        return replace(self, phrases=replace(self.phrases, step=step), own=own)

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
        found = torch.full(
            (len(self.negatives), self.phrases.length // self.phrases.part), math.nan, dtype=torch.float32, device="cpu"
        )
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
        own = self.own is not None and self.own.any_negative
        return self.negative_context is not None or any(self.negatives) or own

    @torch.no_grad()
    def encode(self, model: Model, clip_skip: int | None, negative: bool) -> Tensor:
        """[B,L,D], or [uncond, cond] [2B,L,D] with `negative`. Repeated texts are encoded once."""
        device, dtype = model.device, model.dtype
        each = [self._encoded(model, rows, clip_skip) for rows in ([True, False] if negative else [False])]
        halves = [one.to(device, dtype).repeat_interleave(self.repeats, dim=0) for one in each]
        if halves[0].shape[1] != halves[-1].shape[1]:
            raise ValueError(
                f"context holds {halves[1].shape[1]} tokens and the negative one {halves[0].shape[1]}; expected equal "
                "lengths. Pass both context and negative_context"
            )
        if self.own is not None:
            own = self.own.encode(model, clip_skip, negative).chunk(len(halves))
            slots = [self._in_slots(some).repeat_interleave(self.repeats, dim=0) for some in own]
            halves = [torch.cat(pair, dim=1) for pair in zip(halves, slots, strict=True)]
        return torch.cat(halves)

    def _in_slots(self, own: Tensor) -> Tensor:
        """What belongs to the tokens of all regions, [N,l,...], as it stands in each prompt's context, [P,R*l,...]."""
        return pad_sequence(own.split([len(some) for some in self.areas]), batch_first=True).flatten(1, 2)

    def _encoded(self, model: Model, negative: bool, clip_skip: int | None) -> Tensor:
        """[P,L,D]."""
        context = self.negative_context if negative else self.context
        if context is None:
            texts = self.negatives if negative else self.prompts
            assert texts is not None  # a request has one of the two
            if isinstance(self.phrases, Marked):
                context = self._read(self._readers()[negative][0], model, texts, clip_skip)
            else:
                unique = list(dict.fromkeys(texts))
                context = model.text.encode(unique, clip_skip)[[unique.index(text) for text in texts]]
        return context

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
        at = torch.arange(self.phrases.length, device="cpu")
        unread = at % part >= torch.tensor(self.chunks, device="cpu")[:, None] * size
        unread |= at // part >= torch.tensor(joined, device="cpu")[:, None]
        if not unread.any():
            return None
        bias = torch.zeros(unread.shape, dtype=torch.float32, device="cpu").masked_fill(unread, -60.0)
        return bias.repeat_interleave(self.repeats, dim=0)[:, None, None, None]

    @property
    def length(self) -> int:
        """The positions of a prompt's context, without its regions."""
        return self.phrases.length if self.context is None else self.context.shape[1]

    def masks(self, model: Model, there: Mapping[Site, Position], negative: bool) -> dict[str, Tensor]:
        """The inputs of `share_edits`: biases that hide the positions which an image does not use, and that say how
        much each region's text counts in a cell. None where every cell reads all."""
        if self.own is None:
            return {} if self.unread is None else {"unread": self.unread.to(model.device)}
        lengths, hidden, found = self._lengths, self._hidden(), {}
        for grid in {at.grid for at in there.values()}:
            for rows in ("cond", "uncond") if negative else ("cond",):
                parts = shares(self.areas, grid, self.base_weight, rows == "uncond")
                bias = hidden + share_bias(parts, lengths).repeat_interleave(self.repeats, dim=0)
                found[share_name(rows, grid)] = bias.to(model.device, model.dtype)
        return found

    @property
    def _lengths(self) -> list[int]:
        """The positions of the prompt's text and of each region's."""
        assert self.own is not None
        return [self.length] + [self.own.length] * max(map(len, self.areas))

    def _hidden(self) -> Tensor:
        """A bias [B,1,1,1,L] that hides the positions, also of regions, which an image does not use."""
        assert self.own is not None
        lengths, unread = self._lengths, self.unread
        hidden = (
            torch.zeros(self.images, 1, 1, 1, sum(lengths), dtype=torch.float32, device="cpu")
            if unread is None
            else F.pad(unread, (0, sum(lengths[1:])))
        )
        if self.own.unread is not None:
            own = self._in_slots(self.own.unread[:, 0, 0, 0]).repeat_interleave(self.repeats, dim=0)
            hidden[..., self.length :] = own[:, None, None, None]
        return hidden

    def apart(self, share: float, steps: int, model: Model, grid: Grid) -> Apart | None:
        """What takes the regions apart in a share of a run's steps, for latents of this grid."""
        if self.own is None or share == 0:
            return None
        hidden, there = self._hidden(), model.unet.positions(*grid)
        return Apart(
            steps=round(share * steps),
            areas=tuple(own for own in self.areas for _ in range(self.repeats)),
            grid=grid,
            base_weight=self.base_weight,
            length=self.length,
            own=self.own.length,
            hidden=hidden.to(model.device, model.dtype) if hidden.any() else None,
            sites=choose(cross, there),
            multiple=2 ** (len(model.unet.config.block_out_channels) - 1),
        )

    def reading(self, negative: bool = False) -> tuple[Phrases, tuple[str, ...] | None]:
        """What finds phrases in the prompts and the texts of their regions (or in the negative ones), and these texts,
        as it reads them; None where there are contexts instead."""
        phrases, texts = (self.negative_phrases, self.negatives) if negative else (self.phrases, self.prompts)
        if self.own is None:
            return phrases, texts
        others, own = self.own.reading(negative)
        length, added = self.length + others.length * max(map(len, self.areas)), phrases.added
        reader = Joined(phrases.tokenizer, length, phrases, self.length, others, added=added)
        if texts is None:
            return reader, None
        each, pairs = iter(own or ()), zip(texts, self.areas, strict=True)
        return reader, tuple(MARK.join([text, *itertools.islice(each, len(some))]) for text, some in pairs)

    def regions(self, request: Request, model: Model) -> tuple[tuple[PlacedObject, ...], ...]:
        """Each image's regions, with the tokens of their phrases."""
        found = []
        reader, prompts = self.reading()
        length = self.length if self.own is None else reader.length
        for i, boxes in enumerate(request.layouts):
            prompt = None if prompts is None else prompts[i]

            def find(phrase: str, prompt: str | None = prompt) -> tuple[int, ...]:
                if prompt is None:
                    raise ValueError(f"boxes has the key {phrase!r} but there is no prompt; expected token positions")
                return self._find(reader, prompt, phrase)

            own = () if boxes is None else read_objects(boxes, find, length)
            phrases = dict.fromkeys(phrase for first, _, second in request.related[i] for phrase in (first, second))
            names = {region.name for region in own}
            found.append((*own, *(PlacedObject(phrase, find(phrase)) for phrase in phrases if phrase not in names)))
        return tuple(own for own in found for _ in range(self.repeats))

    def _find(self, reader: Phrases, prompt: str, phrase: str) -> tuple[int, ...]:
        """Positions of a phrase; none in a step whose text lacks it, if another's has it."""
        try:
            return reader.all_spans(prompt, phrase)
        except ValueError:
            if isinstance(reader, Marked):
                for other in reader.changes(prompt):
                    with suppress(ValueError):
                        other.all_spans(prompt, phrase)
                        return ()
            raise

    def layout(
        self,
        model: Model,
        regions: Sequence[Sequence[PlacedObject]],
        length: int,
        there: Mapping[Site, Position],
        related: Sequence[Sequence[Relation]],
    ) -> Layout:
        """The regions of a batch on every grid of the UNet. length: L of the contexts; related: of each prompt."""
        reader, prompts = self.reading()
        if prompts is None:
            tokens = [length - 1] * self.images  # all but the start marker: the prompt's length is unknown
        else:
            tokens = [reader.num_tokens(prompt) for prompt in prompts for _ in range(self.repeats)]
        relations = [own for own in related for _ in range(self.repeats)]
        layout = make_layout(regions, tokens, length, {at.grid for at in there.values()}, model.device, relations)
        if prompts is None or not (self.chunks or self.areas):
            return layout
        words = torch.zeros_like(layout.words)
        for i, prompt in enumerate(prompts):
            words[i * self.repeats : (i + 1) * self.repeats, list(reader.read(prompt).places)] = 1
        return layout._replace(words=words.to(model.device))


def _of_areas(areas: Sequence[Sequence[Region]], negatives: Sequence[str]) -> dict[str, object]:
    """The fields of a request for the texts of all regions. negatives: the prompts', for regions without their own."""
    every = [area.prompt for some in areas for area in some]
    instead = negatives or [""] * len(areas)
    each = zip(areas, instead, strict=True)
    own = [text if area.negative is None else area.negative for some, text in each for area in some]
    texts = {"prompt": every, "negative_prompt": own, "regions_apart": 0.0}
    return {**dict.fromkeys(("context", "negative_context", "regions")), **texts, "images_per_prompt": 1}


def _padded(context: Tensor, length: int) -> Tensor:
    """[l,D] -> [L,D], with zeros."""
    return F.pad(context, (0, 0, 0, length - len(context)))
