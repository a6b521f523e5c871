"""Textual inversion (Gal et al. 2022): words whose token embeddings come from a file.

A file has one tensor, [n,D] or [D]: n vectors for one word, D the width of the text encoder. A1111 and kohya name it
`emb_params`, diffusers after the word it was trained for, converted pickles of A1111 "*". The name does not matter:
the caller gives the word.
"""

import unicodedata
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checks import shown
from ..model import Adapter, Model
from ..networks.text import TextEncoder, part, part_path
from ..speed.replace import with_modules
from ..vocabulary import own_keywords
from .files import Stored, read_tensors, sha256, stored_tensors
from .recognise import EMBEDDING, TEXT_WIDTHS, recognise

_TABLE = "embeddings.token_embedding"


@own_keywords
def with_words(model: Model, words: Mapping[str, str | Path]) -> Model:
    """A model with additional words, {word: file}. The old one does not change and shares all but the embedding table.

    A word stands for the vectors of its .safetensors file, a textual inversion embedding, with one token per vector. It
    is recognised in prompts and negative prompts as a whole word, in any case (if two begin alike, the longer one), and
    can be a phrase like any other in boxes, spans and attention.
    ValueError for a word that is empty, has whitespace, occurs twice or is a token already; for a file that is damaged
    or not an embedding for this model.
    """
    if not isinstance(words, Mapping):
        raise ValueError(
            f'words is {shown(words)}; expected {{word: file}}, as in {{"EasyNegative": "easy.safetensors"}}'
        )
    text, adapters, table = model.text, list(model.adapters), part(model.text.model, _TABLE).weight
    assert isinstance(table, Tensor)
    parts, rows = [table], len(table)
    for word, file in words.items():
        _check_word(word, text)
        stored = find_embedding(file)
        vectors = _read(stored, text, table)
        text = replace(text, added={**text.added, word: range(rows, rows + len(vectors))})
        parts, rows = [*parts, vectors], rows + len(vectors)
        digest = sha256(stored.path)
        adapters.append(Adapter("word", word, stored.path.name, digest, {"vectors": len(vectors)}, digest[:12]))
    longer = nn.Embedding.from_pretrained(torch.cat(parts))
    text = replace(text, model=with_modules(text.model, {part_path(text.model, _TABLE): longer}))
    return replace(model, text=text, adapters=tuple(adapters))


def find_embedding(file: str | Path) -> Stored:
    """The tensor of an embedding's file, from its header. ValueError if the file is something else, which it names."""
    if not isinstance(file, str | Path):
        raise ValueError(f"the file of a word is {shown(file)}; expected a path")
    path = Path(file).expanduser()
    tensors = stored_tensors(path)
    kind = recognise({key: tensor.shape for key, tensor in tensors.items()}).name
    names = ", ".join(list(tensors)[:5]) + (f" and {len(tensors) - 5} more" if len(tensors) > 5 else "")
    expected = f"expected a {EMBEDDING}, which is one tensor [vectors, width]"
    if not tensors:
        raise ValueError(f"{path} holds no tensors; {expected}")
    if tensors.keys() & {"clip_l", "clip_g"}:
        raise ValueError(
            f"{path} is a {EMBEDDING} of Stable Diffusion XL or a later model, with vectors for each of its text "
            f"encoders ({names}); expected one of Stable Diffusion 1.x, which has one text encoder"
        )
    if not kind.startswith((EMBEDDING, "unknown")):
        raise ValueError(f"{path} is no {EMBEDDING}, it is a file of another kind: {kind}")
    if len(tensors) > 1 and "emb_params" in tensors:
        raise ValueError(f"{path} has unknown keys besides emb_params ({names}); {expected}")
    if len(tensors) > 1:
        raise ValueError(f"{path} holds {len(tensors)} tensors ({names}), none known as the embedding; {expected}")
    (only,) = tensors.values()
    if not 1 <= len(only.shape) <= 2 or not only.dtype.startswith(("F", "BF")):
        raise ValueError(f"{path} holds {only.key} of shape {list(only.shape)} and dtype {only.dtype}; {expected}")
    return only


def _read(stored: Stored, text: TextEncoder, like: Tensor) -> Tensor:
    """The vectors [n,D], in the dtype and on the device of `like`. ValueError if they do not fit."""
    path, most = stored.path, text.length - 2
    *_, count, width = (1, *stored.shape)
    if width != text.width:
        of = f", as in {TEXT_WIDTHS[width]}" if width in TEXT_WIDTHS else ""
        raise ValueError(
            f"{path} holds vectors {width} wide{of}; the text encoder of this model is {text.width} wide: take an "
            "embedding that was trained for this kind of model"
        )
    if not 1 <= count <= most:
        raise ValueError(f"{path} holds {count} vectors; expected 1 to {most}, the tokens that a prompt may have")
    found = read_tensors({"": stored}, {"": torch.Size([count, width])}, like.dtype, like.device)[""]
    if not found.isfinite().all():  # in the model's dtype: float16 ends at 65504
        dtype = str(like.dtype).removeprefix("torch.")
        raise ValueError(f"{path} holds values that are not finite (NaN or infinity) in {dtype}; download it again")
    return found


def _check_word(word: object, text: TextEncoder) -> None:
    if not isinstance(word, str) or not word or any(map(str.isspace, word)) or not word.isprintable():
        raise ValueError(f"word is {shown(word)}; expected a name without spaces, as used in prompts")
    there = next((name for name in text.added if _same(name, word)), None)
    if there is not None:
        raise ValueError(
            f"this model already has the word {word!r}, as {there!r} (case does not matter); use another name"
        )
    tokenizer = text.tokenizer
    ids = tokenizer(word, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) == 1 and (ids[0] != tokenizer.unk_token_id or word in tokenizer.all_special_tokens):
        raise ValueError(
            f"word {word!r} is already a token of this model and would lose its meaning; use another name, such as "
            f"{f'my-{word}'!r}"
        )


def _same(one: str, other: str) -> bool:
    """Whether two words are the same for the tokenizer."""
    return unicodedata.normalize("NFC", one).lower() == unicodedata.normalize("NFC", other).lower()
