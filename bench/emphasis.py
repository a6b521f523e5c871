"""Weighted prompts with emphasis="compel" against compel, with the same random text encoder."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from compel.embeddings_provider import EmbeddingsProvider, SplitLongTextMode

import minidiff
from minidiff.prompts.chunks import Marked, encode
from minidiff.prompts.parse import pieces

from .models import TINY, write_folder
from .table import Row

BOUND = 1e-5
TEXTS = {
    "raised": "a (red:1.3) circle",
    "lowered": "(blurry:0.4) circle",
    "nested": "[[[noise]]] and ((much:1.2) more)",
    "long": ("a [dark] castle (huge:1.5) " * 20) + "(cat:0.3)",
}


@torch.no_grad()
def emphasis_rows() -> Iterator[Row]:
    """One row per text: its context. compel splits long texts between any two tokens, as ours without commas."""
    with tempfile.TemporaryDirectory(prefix="minidiff-bench-") as folder:
        model = minidiff.load(write_folder(Path(folder) / "tiny", TINY), dtype="float32", device="cpu")
    text = model.text
    mode = SplitLongTextMode.BRUTAL
    provider = EmbeddingsProvider(text.tokenizer, text.model, truncate=False, split_long_text_mode=mode)
    for name, prompt in TEXTS.items():
        parts = pieces(prompt)
        texts, weights = [piece.text for piece in parts], [piece.weight for piece in parts]
        expected = provider.get_embeddings_for_weighted_prompt_fragments([texts], [weights])[0]
        read = Marked(text.tokenizer, 77, 77, 77).chunked(prompt)
        (found,) = encode(text, [read], [len(read.starts)], "compel")
        error = (found - expected).abs().max() / expected.abs().max()
        yield Row(f"weights of compel, {name}", "x".join(map(str, found.shape)), error.item(), BOUND)
