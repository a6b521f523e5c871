"""Load the text encoder and its tokenizer. Importing transformers takes seconds, so it is imported only when needed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..networks.text import PREFIX, TextConfig, TextEncoder, part, text_encoder_shapes
from .state import check_state

if TYPE_CHECKING:
    from transformers import CLIPTextModel, PreTrainedTokenizerFast


def load_text_encoder(
    config: Mapping[str, object] | TextConfig,
    state: Mapping[str, Tensor],
    tokenizer: Path,
    dtype: torch.dtype | None = None,
) -> TextEncoder:
    """A TextEncoder from its config (or the contents of its config.json), its weights and the folder of its tokenizer.

    `state` has the hub file's keys, all with the prefix "text_model."; position_ids are ignored (merged files carry
    corrupt ones). The weights are used as they are, not copied, unless `dtype` asks for another one.
    One ValueError names all missing, unexpected and misshapen keys; others report a bad config or tokenizer.
    """
    sizes = config if isinstance(config, TextConfig) else TextConfig.from_dict(config)
    expected = text_encoder_shapes(sizes)
    weights = {key: value for key, value in state.items() if not key.endswith("position_ids")}
    check_state("text encoder", expected, weights)
    reader = load_tokenizer(tokenizer)
    check_vocabulary(reader, tokenizer, sizes.vocab_size)
    model = _empty_model(sizes)
    strip = 0 if next(iter(model.state_dict())).startswith(PREFIX) else len(PREFIX)
    model.load_state_dict({key[strip:]: weights[key].to(dtype=dtype) for key in expected}, strict=True, assign=True)
    positions = torch.arange(sizes.max_position_embeddings, device=model.device)[None]
    part(model, "embeddings").register_buffer("position_ids", positions, persistent=False)  # was on the meta device
    model.eval()  # type: ignore[no-untyped-call, unused-ignore]
    # a tokenizer without a limit claims 1e30; the encoder has one
    length = int(min(reader.model_max_length, model.config.max_position_embeddings))
    return TextEncoder(reader, length, model.requires_grad_(False))


def check_vocabulary(reader: PreTrainedTokenizerFast, folder: Path, known: int) -> None:
    """ValueError if the tokenizer can give an id beyond the `known` tokens of the text encoder."""
    tokens = max(len(reader), 1 + max(reader.get_vocab().values(), default=0))
    if tokens > known:
        raise ValueError(
            f"tokenizer {folder} has {tokens} tokens, the text encoder knows {known}: "
            "they do not belong together; use the tokenizer from the source of the weights"
        )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder, read without the network. ValueError when its files are missing or cannot be read."""
    choices = ("tokenizer.json",), ("vocab.json", "merges.txt")
    if not any(all((folder / name).is_file() for name in names) for names in choices):
        raise ValueError(
            f"no tokenizer in {folder}: expected vocab.json and merges.txt, or tokenizer.json, with "
            "tokenizer_config.json next to them; use the tokenizer folder of a Stable Diffusion 1.5 model"
        )
    from transformers import CLIPTokenizerFast  # type: ignore[attr-defined, unused-ignore]  # 5.x: CLIPTokenizer's alias

    try:
        tokenizer: PreTrainedTokenizerFast = CLIPTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ValueError(f"the tokenizer in {folder} cannot be read: {error}; copy its files again") from error
    return tokenizer


def _empty_model(sizes: TextConfig) -> CLIPTextModel:
    """The network without weights, on the meta device.

    Only the keys that define the network are used: others vary with the transformers version that wrote the config.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        return CLIPTextModel(
            CLIPTextConfig(
                **sizes._asdict(),
                # CLIP's markers are its last two tokens; transformers warns of others, and the context needs neither
                bos_token_id=max(sizes.vocab_size - 2, 0),
                eos_token_id=sizes.vocab_size - 1,
            )
        )
