"""Prompts to contexts, and words to token positions: CLIP's text encoder and tokenizer, both from transformers.

transformers is imported inside the functions that need it: it costs seconds, and `import minidiff` must not pay them.
Positions count along the L axis of a context: 0 is the begin marker (BOS), 1 the prompt's first token.
"""

from __future__ import annotations

import difflib
import re
import string
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..checks import Check, checked, choice, number, shown, warn, whole

if TYPE_CHECKING:
    from transformers import CLIPTextModel, PreTrainedTokenizerFast

PREFIX = "text_model."  # every key of a weight file carries it; transformers >= 5.6 dropped it inside CLIPTextModel
ACTIVATIONS = ("quick_gelu", "gelu")  # OpenAI's CLIP, and other CLIPs


@dataclass(frozen=True, eq=False)
class Tokens:
    """A prompt as the text encoder reads it.

    text: in which phrases are found. ids: of its tokens, without markers. ranges: the characters of `text` that each
    stands for. places: its position in the context; there are fewer where the rest is cut off. size: the positions of
    a chunk, which begins with a start marker: L, if there is one.
    """

    text: str
    ids: Sequence[int]
    ranges: Sequence[tuple[int, int]]
    places: Sequence[int]
    size: int


@dataclass(frozen=True, eq=False)
class Phrases:
    """A tokenizer that finds the positions of a prompt's words.

    length: L, the number of positions in a context, 77 in SD 1.5. added: words that the tokenizer does not know (see
    weights/words.py), each with its rows in the table of token embeddings, one per token. They are found as whole
    words, in upper or lower case; of two that begin alike, the longer one.
    """

    tokenizer: PreTrainedTokenizerFast
    length: int
    added: Mapping[str, range] = field(default_factory=dict, kw_only=True)

    def num_tokens(self, prompt: str) -> int:
        """The number of the prompt's tokens that fit; they have positions 1 to this number, before the end marker."""
        return len(self.read(prompt).places)

    def read(self, prompt: str) -> Tokens:
        """The prompt's tokens and their positions."""
        ids, ranges = self._tokenize(prompt)
        return Tokens(prompt, ids, ranges, range(1, min(len(ids), self.length - 2) + 1), self.length)

    def tokens(self, prompt: str) -> tuple[str, ...]:
        """L labels, one per position: the part of the prompt, as written, that the token stands for.

        A character of several tokens (e.g. an emoji) labels each of them. Other labels are "<start>", "<end>", "<pad>".
        """
        read = self.read(prompt)
        labels = {place: read.text[start:end] for place, (start, end) in zip(read.places, read.ranges, strict=False)}
        for first in range(0, self.length, read.size):
            labels[first] = "<start>"
            labels[next(place for place in range(first, self.length) if place not in labels)] = "<end>"
        return tuple(labels.get(place, "<pad>") for place in range(self.length))

    def spans(self, prompt: str, phrase: str, occurrence: int | None = None) -> tuple[int, ...]:
        """Positions of the phrase's tokens in the prompt.

        Case, whitespace and Unicode composition are ignored, but only whole words match: "cat" matches neither
        "concatenate" nor "cats". Matches do not overlap and count from the left; if there are several, `occurrence`
        must choose (0 is the first). Punctuation that the tokenizer joins, as in '"cat".', cannot be separated.
        ValueError when the phrase is empty, missing, ambiguous, or cut off at the encoder's length.
        """
        if not isinstance(phrase, str) or not phrase.strip():
            raise ValueError(f"phrase: got {phrase!r}, expected one or more words of the prompt {prompt!r}")
        read = self.read(prompt)
        matches = _matches(read.text, read.ranges, phrase)
        if not matches:
            raise ValueError(_missing(read.text, phrase))
        if occurrence is None and len(matches) > 1:
            raise ValueError(
                f"phrase {phrase!r} occurs {len(matches)} times in the prompt {prompt!r}: "
                f"choose with occurrence=0 (the first) to {len(matches) - 1} (the last), or use a longer phrase"
            )
        index = 0 if occurrence is None else occurrence
        if not 0 <= index < len(matches):
            raise ValueError(
                f"occurrence: got {index}, expected 0 to {len(matches) - 1}: "
                f"phrase {phrase!r} occurs {len(matches)} time(s) in the prompt {prompt!r}"
            )
        first, last = matches[index]
        if last >= len(read.places):
            raise ValueError(
                f"phrase {phrase!r} is lost by truncation: it needs the prompt's tokens {first + 1} to {last + 1}, "
                f"and the text encoder reads {self.length - 2}; move it to the front, or shorten the prompt"
            )
        return tuple(read.places[first : last + 1])

    def all_spans(self, prompt: str, phrase: str) -> tuple[int, ...]:
        """Positions of the phrase's tokens at all its occurrences; otherwise like `spans`."""
        if not isinstance(phrase, str) or not phrase.strip():
            return self.spans(prompt, phrase)  # raises ValueError
        read = self.read(prompt)
        count = len(_matches(read.text, read.ranges, phrase))
        return tuple(token for i in range(max(count, 1)) for token in self.spans(prompt, phrase, i))

    def word_weights(self, prompt: str, weights: Mapping[str, float]) -> torch.Tensor:
        """[1,L]: the weight of each token, 1 for those in no phrase of `weights`, {phrase: weight}."""
        row = torch.ones(1, self.length, dtype=torch.float32, device="cpu")
        for phrase, weight in weights.items():
            row[0, list(self.all_spans(prompt, phrase))] = weight
        return row

    def alignment(self, prompts: Sequence[str], swap: bool = True) -> Tensor:
        """[B,L,L]: for each prompt, how much of each token of the first one its tokens stand for, 1 or 0; the first
        aligns with itself. For `minidiff.prompt_to_prompt()`.

        swap: words instead of others stand for those (prompt-to-prompt's word swap; of m tokens each of n has 1/n).
        Otherwise, and where words were added, they stand for none (its refinement).
        """
        if not isinstance(prompts, list | tuple):
            raise ValueError(f"prompts is {shown(prompts)}; expected a list of texts, the first of which is kept")
        texts = [self.tokens(prompt) for prompt in prompts]
        found = torch.zeros(len(texts), self.length, self.length, dtype=torch.float32, device="cpu")
        for own, text in zip(found, texts, strict=True):
            parts = difflib.SequenceMatcher(None, texts[0], text, autojunk=False).get_opcodes()
            for kind, i, i_end, j, j_end in parts:
                if kind == "equal" or (kind == "replace" and swap and i_end - i == j_end - j):
                    own[range(i, i_end), range(j, j_end)] = 1
                elif kind == "replace" and swap:
                    own[i:i_end, j:j_end] = 1 / (j_end - j)
        return found

    def _tokenize(self, prompt: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a whole prompt without markers, and the range of characters of each.

        The tokens of one character (its bytes) share its range, those of an added word the word's.
        """
        if not isinstance(prompt, str) or re.search(
            "[\ud800-\udfff]", prompt
        ):  # half a character, from a broken locale
            raise ValueError(
                f"prompt: got {prompt!r} of type {type(prompt).__name__}, expected a string of valid Unicode"
            )
        ids: list[int] = []
        ranges: list[tuple[int, int]] = []
        for start, text, rows in self._pieces(prompt):
            more, at = _tokenize(self.tokenizer, text) if rows is None else (rows, [(0, len(text))] * len(rows))
            ids += more
            ranges += [(start + first, start + end) for first, end in at]
        return ids, ranges

    def _pieces(self, prompt: str) -> Iterator[tuple[int, str, range | None]]:
        """Split the prompt at added words: the start of each piece, its text, and its rows if it is an added word."""
        end = 0
        if self.added:
            words = sorted(self.added, key=len, reverse=True)
            for match in re.finditer(_whole_words(words), prompt, re.IGNORECASE):
                assert match.lastindex is not None  # one group per word
                yield end, prompt[end : match.start()], None
                yield match.start(), match[0], self.added[words[match.lastindex - 1]]
                end = match.end()
        yield end, prompt[end:], None


@dataclass(frozen=True, eq=False)
class TextEncoder(Phrases):
    """A frozen CLIP text encoder with its tokenizer."""

    model: CLIPTextModel

    @property
    def width(self) -> int:
        """D, width of a context: 768 in SD 1.5."""
        return int(self.model.config.hidden_size)

    @property
    def words(self) -> frozenset[str] | None:
        """The words that the encoder was trained on, from `minidiff_words` in its tokenizer_config.json; None: any."""
        listed = self.tokenizer.init_kwargs.get("minidiff_words")
        return None if listed is None else frozenset(listed)

    def encode(self, prompts: Sequence[str], clip_skip: int | None = None) -> Tensor:
        """Contexts [B,L,D] of B prompts in the model's dtype, equal to StableDiffusionPipeline.encode_prompt's.

        Causal mask only: padding is attended to. `clip_skip` counts as in diffusers: n skips the last n layers (n + 1
        in A1111); the final layer norm is always applied. A prompt that is too long is truncated, with a warning that
        quotes what was lost; words that are not in `words` also cause a warning. ValueError for a bare string, an empty
        list, a clip_skip out of range.
        """
        if isinstance(prompts, str) or not isinstance(prompts, Sequence) or len(prompts) == 0:
            raise ValueError(f"prompts: got {prompts!r}, expected a non-empty list of strings; write [prompt] for one")
        ids = torch.tensor(list(map(self._ids, prompts)), device="cpu")
        self.warn_of_unknown_words(prompts)
        return self.encode_ids(ids, clip_skip)

    def encode_ids(self, ids: Tensor, clip_skip: int | None = None, mask: Tensor | None = None) -> Tensor:
        """Contexts [N,L,D] of token ids [N,L], with their markers and padding.

        mask [N,L]: 0 where no token may look, 1 elsewhere; default: 1.
        """
        layers = int(self.model.config.num_hidden_layers)
        if clip_skip is not None and not 0 <= clip_skip < layers:
            raise ValueError(f"clip_skip: got {clip_skip}, expected 0 to {layers - 1}: the encoder has {layers} layers")
        ids, mask = ids.to(self.model.device), None if mask is None else mask.to(self.model.device)
        output = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=clip_skip is not None)
        context: Tensor = output.last_hidden_state
        if clip_skip is not None:
            # hidden_states[n] is what the first n layers make of the embeddings, without the final norm
            context = part(self.model, "final_layer_norm")(output.hidden_states[layers - clip_skip])
        return context

    def warn_of_unknown_words(self, prompts: Sequence[str]) -> None:
        """Warn of words that are not in `words`."""
        if self.words is None:
            return
        texts = [text for prompt in prompts for _, text, rows in self._pieces(prompt) if rows is None]
        parts = [part for text in texts for part in re.findall(r"\w+|[^\w\s]", text.lower())]
        unknown = [part for part in dict.fromkeys(parts) if part not in self.words]
        if unknown:
            known = " ".join(sorted(filter(str.isalnum, self.words)))
            warn(f"this model does not know {', '.join(map(repr, unknown))}; it knows {known}")

    def _ids(self, prompt: str) -> list[int]:
        """L token ids: BOS, the prompt's, EOS, padding. Warns about lost words."""
        read, room = self.read(prompt), self.length - 2
        if len(read.ids) > room:
            lost = prompt[read.ranges[room][0] :]
            line = " ".join(prompt.split())
            name = line if len(line) <= 60 else f"{line[:56]} ..."
            text = f"prompt {name!r} has {len(read.ids)} tokens, the text encoder reads {room}: lost {lost!r}"
            warn(f'{text}; syntax="a1111" reads all of it, in chunks')
        return self.framed(read.ids[:room])

    def framed(self, ids: Sequence[int]) -> list[int]:
        """L token ids: BOS, these, EOS, padding."""
        ids = [self.tokenizer.bos_token_id, *ids, self.tokenizer.eos_token_id]
        return ids + [self.tokenizer.pad_token_id] * (self.length - len(ids))


class TextConfig(NamedTuple):
    """The sizes and settings of a CLIP text encoder, named as in its config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    hidden_act: str
    layer_norm_eps: float

    @classmethod
    def from_dict(cls, config: Mapping[str, object]) -> TextConfig:
        """Read text_encoder/config.json. ValueError if it cannot be built.

        Sizes have bounds far above those of any CLIP, so that a wrong one is refused before it is looped over.
        """
        where = "text encoder config"
        given = {"hidden_act": ACTIVATIONS[0], "layer_norm_eps": 1e-5, **config}
        found = cls(**checked({key: given.get(key) for key in cls._fields}, _TEXT, f"{where}: "))
        width, heads = found.hidden_size, found.num_attention_heads
        if width % heads:
            raise ValueError(f"{where}: hidden_size is {width}, expected a multiple of {heads}, the heads")
        return found


_TEXT: Mapping[str, Check] = {
    **dict.fromkeys(TextConfig._fields[:6], partial(whole, least=1, most=2**20)),
    "num_hidden_layers": partial(whole, least=1, most=200),
    "hidden_act": partial(choice, choices=ACTIVATIONS),
    "layer_norm_eps": partial(number, least=0, most=1),
}


def text_encoder_shapes(config: Mapping[str, object] | TextConfig) -> dict[str, torch.Size]:
    """Shape of every weight by its key in the hub's files: 196 in SD 1.5. ValueError if the config cannot be built."""
    read = config if isinstance(config, TextConfig) else TextConfig.from_dict(config)
    width, inner, layers = read.hidden_size, read.intermediate_size, read.num_hidden_layers
    layer: dict[str, tuple[int, ...]] = {  # of the weights; a bias has the first of these sizes
        "layer_norm1": (width,),
        "layer_norm2": (width,),
        **{f"self_attn.{name}": (width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
        "mlp.fc1": (inner, width),
        "mlp.fc2": (width, inner),
    }
    modules = {f"encoder.layers.{n}.{name}": shape for n in range(layers) for name, shape in layer.items()}
    modules["final_layer_norm"] = (width,)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.token_embedding.weight": (read.vocab_size, width),
        "embeddings.position_embedding.weight": (read.max_position_embeddings, width),
    }
    for name, shape in modules.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {PREFIX + key: torch.Size(shape) for key, shape in shapes.items()}


def part(model: CLIPTextModel, name: str) -> torch.nn.Module:
    """A module by its name in the weight file without the prefix, which only some transformers versions use."""
    return model.get_submodule(part_path(model, name))


def part_path(model: CLIPTextModel, name: str) -> str:
    """The path of a module (see part()) in this transformers version."""
    return (PREFIX if hasattr(model, "text_model") else "") + name


def _tokenize(tokenizer: PreTrainedTokenizerFast, prompt: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Phrases._tokenize for a text without added words."""
    encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = sorted({start for start, _ in encoded["offset_mapping"]})
    following = dict(zip(starts, [*starts, len(prompt)][1:], strict=True))
    ranges = []
    for start, end in encoded["offset_mapping"]:
        # an accent that NFC merged into its letter is in no offset; the tokenizer drops nothing else but whitespace
        while end < following[start] and not prompt[end].isspace():
            end += 1
        ranges.append((start, end))
    return encoded["input_ids"], ranges


def _whole_words(words: Sequence[str]) -> str:
    """A pattern with one group per word, tried in this order; not inside a longer word, nor before an accent."""
    forms = [[re.escape(unicodedata.normalize(form, word)) for form in ("NFC", "NFD")] for word in words]
    groups = "|".join(f"({'|'.join(own)})" for own in forms)
    return rf"(?:(?<!\w)|(?!\w))(?:{groups})(?:(?<!\w)|(?!\w))(?![\u0300-\u036f])"


def _fold(text: str) -> str:
    """Normalise a text as the tokenizer does: NFC, lower case, single spaces."""
    return " ".join(unicodedata.normalize("NFC", text).lower().split())


def _matches(prompt: str, ranges: Sequence[tuple[int, int]], phrase: str) -> list[tuple[int, int]]:
    """Whole-word matches from the left without overlap, each as (first, last) token; the prompt's first is 0."""
    wanted, matches, first = _fold(phrase), [], 0
    while first < len(ranges):
        last = _match_at(prompt, ranges, first, wanted)
        if last is None:
            first += 1
        else:
            matches.append((first, last))
            first = last + 1
    return matches


def _match_at(prompt: str, ranges: Sequence[tuple[int, int]], first: int, wanted: str) -> int | None:
    """The last token of the match that begins with token `first`; None if there is none."""
    start = ranges[first][0]
    if _inside_word(prompt, start):
        return None
    for last in range(first, len(ranges)):
        end = ranges[last][1]
        found = _fold(prompt[start:end])
        inside_character = last + 1 < len(ranges) and ranges[last + 1][0] < end
        if found == wanted and not inside_character and not _inside_word(prompt, end):
            return last
        if len(found) > len(wanted):
            return None
    return None


def _inside_word(text: str, index: int) -> bool:
    """Whether a cut before text[index] would split letters or digits, a letter and its accent, or a joined emoji."""
    if index in (0, len(text)):
        return False
    before, after = text[index - 1], text[index]
    joiner, skin_tones = "\u200d", ("\U0001f3fb", "\U0001f3ff")
    if joiner in (before, after) or unicodedata.category(after)[0] == "M" or skin_tones[0] <= after <= skin_tones[1]:
        return True
    return after.isalnum() and (before.isalnum() or unicodedata.category(before)[0] == "M")


def _missing(prompt: str, phrase: str) -> str:
    """The message for a phrase that is not in the prompt: the closest match, and the prompt's words."""
    words = [word for part in prompt.split() if (word := part.strip(string.punctuation))]
    size = len(phrase.split())
    runs = {_fold(run): run for run in [" ".join(words[i : i + size]) for i in range(len(words) - size + 1)] + words}
    close = difflib.get_close_matches(_fold(phrase), runs, n=1)
    hint = f"did you mean {runs[close[0]]!r}?" if close else "write it as the prompt does."
    listed = ", ".join(words) or "none"
    return f"phrase {phrase!r} is not in the prompt {prompt!r} as whole words; {hint} The prompt's words: {listed}"
