"""networks/text.py against diffusers and against a slow forward pass in plain tensors; spans and their errors."""

import json
import shutil
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minidiff.networks.text import TextEncoder, text_encoder_shapes
from minidiff.weights.text import load_text_encoder, load_tokenizer

TOKENIZER = Path(__file__).parent / "golden" / "tokenizer"
SD15 = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "dtype": "float16",
    "transformers_version": "4.22.0.dev0",
}
TINY = SD15 | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
LONG = "An old lighthouse, " * 20 + "with a Red  Door"
PROMPTS = ["", "a photo of a cat", "Café  au\nlait, 2024 (highly detailed)!", "a 🐱 and the 👩‍🚀 from İstanbul", LONG]


def random_state(config: dict[str, object], seed: int = 0) -> dict[str, Tensor]:
    """Random weights in the hub's keys, with norms around one and biases that matter."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in text_encoder_shapes(config).items():
        centre = 1.0 if "norm" in key and key.endswith("weight") else 0.0
        state[key] = centre + 0.2 * torch.randn(shape, generator=generator)
    return state


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_state(TINY)


@pytest.fixture(scope="module")
def encoder(state: dict[str, Tensor]) -> TextEncoder:
    return load_text_encoder(TINY, state, TOKENIZER)


def token_ids(encoder: TextEncoder, prompts: list[str], length: int = 77) -> Tensor:
    """Padded and truncated by transformers itself."""
    ids = encoder.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return ids.input_ids


def slow_context(state: dict[str, Tensor], config: dict[str, object], ids: Tensor, skip: int) -> Tensor:
    """CLIP's text encoder (Radford et al. 2021) written out; the last `skip` layers are omitted."""
    weights = {key.removeprefix("text_model."): value.double() for key, value in state.items()}
    heads, length = config["num_attention_heads"], ids.shape[1]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def act(x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x) if config["hidden_act"] == "quick_gelu" else F.gelu(x)

    x = weights["embeddings.token_embedding.weight"][ids] + weights["embeddings.position_embedding.weight"][:length]
    future = torch.ones(length, length).triu(1).bool()
    for n in range(config["num_hidden_layers"] - skip):
        layer = f"encoder.layers.{n}"
        y = norm(x, f"{layer}.layer_norm1")
        # [B,L,D] -> [B,H,L,D/H]
        q, k, v = (
            linear(y, f"{layer}.self_attn.{name}_proj").unflatten(-1, (heads, -1)).transpose(1, 2) for name in "qkv"
        )
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        y = logits.masked_fill(future, -torch.inf).softmax(-1) @ v
        x = x + linear(y.transpose(1, 2).flatten(2), f"{layer}.self_attn.out_proj")
        x = x + linear(act(linear(norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1")), f"{layer}.mlp.fc2")
    return norm(x, "final_layer_norm")


def relative(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


# --- encode


@pytest.mark.filterwarnings("ignore:.*the text encoder reads")
def test_encode_equals_diffusers(encoder: TextEncoder) -> None:
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=encoder.model,
        tokenizer=encoder.tokenizer,
        unet=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    expected, negative = pipeline.encode_prompt(PROMPTS, "cpu", 1, True, [prompt[::-1] for prompt in PROMPTS])
    assert relative(encoder.encode(PROMPTS), expected) <= 1e-5
    assert relative(encoder.encode([prompt[::-1] for prompt in PROMPTS]), negative) <= 1e-5


@pytest.mark.filterwarnings("ignore:.*the text encoder reads")
def test_encode_equals_transformers(encoder: TextEncoder) -> None:
    expected = encoder.model(token_ids(encoder, PROMPTS)).last_hidden_state
    context = encoder.encode(PROMPTS)
    assert context.shape == (5, 77, 32) and not context.requires_grad
    torch.testing.assert_close(context, expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*the text encoder reads")
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_clip_skip_equals_a_slow_forward_pass(act: str) -> None:
    config = TINY | {"hidden_act": act}
    state = random_state(config, seed=1)
    encoder = load_text_encoder(config, state, TOKENIZER)
    ids = token_ids(encoder, PROMPTS)
    for clip_skip in (None, 0, 1, 2):
        expected = slow_context(state, config, ids, clip_skip or 0)
        assert relative(encoder.encode(PROMPTS, clip_skip), expected) <= 1e-5, clip_skip


@pytest.mark.parametrize("clip_skip", [-1, 3, 12])
def test_clip_skip_out_of_range(encoder: TextEncoder, clip_skip: int) -> None:
    with pytest.raises(ValueError, match=rf"clip_skip: got {clip_skip}, expected 0 to 2.*3 layers"):
        encoder.encode(["a cat"], clip_skip)


def test_a_prompt_does_not_depend_on_its_batch(encoder: TextEncoder) -> None:
    alone = torch.cat([encoder.encode([prompt]) for prompt in PROMPTS[:4]])
    torch.testing.assert_close(encoder.encode(PROMPTS[:4]), alone, rtol=1e-5, atol=1e-5)


def test_truncation_warns_with_the_lost_words(encoder: TextEncoder) -> None:
    with pytest.warns(UserWarning, match="lost") as caught:
        encoder.encode(["a cat", LONG])
    (warning,) = caught
    assert str(warning.message).startswith("prompt 'An old lighthouse, An old")
    assert "has 84 tokens, the text encoder reads 75: lost ', An old lighthouse, with a Red  Door'" in str(
        warning.message
    )
    assert warning.filename == __file__
    with pytest.warns(UserWarning, match="prompt 'catcatcat"):  # without a space to truncate at
        encoder.encode(["catcat" * 60])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.encode(["cat " * 75])


@pytest.mark.parametrize(
    "prompts", ["a cat", [], None, 7, ["a cat", None], [b"a cat"], [["a cat"]], ["\ud83d"]], ids=repr
)
def test_prompts_of_a_wrong_type(encoder: TextEncoder, prompts: object) -> None:
    with pytest.raises(ValueError, match=r"^prompts?: got .*expected a "):
        encoder.encode(prompts)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.05), (torch.float16, 0.005)])
def test_half_precision(encoder: TextEncoder, state: dict[str, Tensor], dtype: torch.dtype, limit: float) -> None:
    context = load_text_encoder(TINY, state, TOKENIZER, dtype=dtype).encode(PROMPTS[:4], 1)
    assert context.dtype == dtype
    assert relative(context, encoder.encode(PROMPTS[:4], 1)) < limit


# --- spans, tokens

SPANS = [  # prompt, phrase, occurrence, positions; the same in transformers 4.46 and 5.23
    ("a cat", "cat", None, (2,)),
    ("A  Red\tCAT, concatenate", "red cat", None, (2, 3)),
    ("A  Red\tCAT, concatenate", " Cat,\n", None, (3, 4)),
    ("a concatenated cat", "cat", None, (6,)),
    ("a concatenated cat", "concatenated", None, (2, 3, 4, 5)),
    ("cats and a cat", "cat", None, (4,)),
    ("cat, cat; cat", "cat", 0, (1,)),
    ("cat, cat; cat", "cat", 2, (5,)),
    ("very very very big", "very very", None, (1, 2)),
    ("the cat's hat", "cat", None, (2,)),
    ("the cat's hat", "cat's", None, (2, 3)),
    ("a red-haired girl", "red-haired girl", None, (2, 3, 4, 5)),
    ("a red-haired girl", "red", None, (2,)),
    ("(dog),(cat)", "(dog)", None, (1, 2, 3)),
    ("2024, a 2 and cat5, cat 5", "2", None, (7,)),
    ("2024, a 2 and cat5, cat 5", "cat", None, (12,)),
    ("2024, a 2 and cat5, cat 5", "2024", None, (1, 2, 3, 4)),
    ("cafe\u0301 au lait", "Caf\xe9", None, (1,)),
    ("caf\xe9 au lait", "cafe\u0301 au", None, (1, 2)),
    ("a cafe and a cafe\u0301", "cafe", None, (2,)),
    ("e\u0301\u0323 x", "e\u0323\u0301", None, (1, 2, 3, 4, 5)),
    ("\u1112\u1161\u11ab\uad6d x", "\ud55c\uad6d", None, (1, 2, 3, 4)),
    ("İstanbul at night", "İSTANBUL", None, (1, 2, 3)),
    ("🐱🐶 cat", "🐶", None, (2,)),
    ("👩\u200d🚀 and a 🚀", "🚀", None, (5,)),
    ("👍🏽 👍", "👍", None, (2,)),
    ("नि न", "न", None, (3,)),
    ("a <|endoftext|> cat", "cat", None, (3,)),
]


@pytest.mark.parametrize(("prompt", "phrase", "occurrence", "expected"), SPANS, ids=[ascii(row[:2]) for row in SPANS])
def test_spans(
    encoder: TextEncoder, prompt: str, phrase: str, occurrence: int | None, expected: tuple[int, ...]
) -> None:
    positions = encoder.spans(prompt, phrase, occurrence)
    assert positions == expected
    ids = token_ids(encoder, [prompt, phrase])
    back, wanted = (encoder.tokenizer.decode(row) for row in (ids[0, list(positions)], ids[1]))
    wanted = wanted.replace("<|startoftext|>", "").replace("<|endoftext|>", "")
    assert back.replace(" ", "") == wanted.replace(" ", "")


def test_every_word_of_a_prompt_is_found(encoder: TextEncoder) -> None:
    prompt = "Portrait of an astrophotographer's zweihänder, art-nouveau style; 35mm: Überblick [bokeh]"
    words = prompt.split()
    found = [encoder.spans(prompt, word) for word in words]
    assert sum(found, ()) == tuple(range(1, encoder.num_tokens(prompt) + 1))
    assert encoder.spans(prompt, prompt) == sum(found, ())


@pytest.mark.parametrize(
    ("prompt", "phrase", "occurrence", "message"),
    [
        ("a cat", "", None, "phrase: got ''"),
        ("a cat", " \n", None, "expected one or more words of the prompt 'a cat'"),
        ("a cat", None, None, "phrase: got None"),
        (None, "cat", None, "prompt: got None of type NoneType, expected a string"),
        ("a cat, a dog", "cats", None, "did you mean 'cat'? The prompt's words: a, cat, a, dog"),
        ("two cats", "cat", None, "did you mean 'cats'? The prompt's words: two, cats"),
        ("a Red-haired girl.", "red haired girls", None, "did you mean 'a Red-haired girl'?"),
        ("a concatenated dog", "cat", None, "The prompt's words: a, concatenated, dog"),
        ("", "cat", None, "The prompt's words: none"),
        ("cat, Cat; CAT", "cat", None, "occurs 3 times in the prompt 'cat, Cat; CAT': choose with occurrence=0"),
        ("cat and cat", "cat", 2, "occurrence: got 2, expected 0 to 1"),
        ("a cat", "cat", -1, "occurrence: got -1, expected 0 to 0"),
        (LONG, "red door", None, "is lost by truncation: it needs the prompt's tokens 83 to 84, and the text encoder"),
        ("old " * 74 + "concatenate", "concatenate", None, "tokens 75 to 78, and the text encoder reads 75"),
    ],
)
def test_spans_refuses(encoder: TextEncoder, prompt: object, phrase: object, occurrence: object, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        encoder.spans(prompt, phrase, occurrence)
    assert message in str(caught.value)


def test_tokens(encoder: TextEncoder) -> None:
    labels = encoder.tokens("A  CONCATENATE cafe\u0301 猫")
    assert len(labels) == 77 and labels[11:] == ("<pad>",) * 66
    assert labels[:11] == ("<start>", "A", "CON", "CAT", "EN", "ATE", "cafe\u0301", "猫", "猫", "猫", "<end>")
    assert encoder.num_tokens("A  CONCATENATE cafe\u0301 猫") == 9
    assert encoder.tokens("") == ("<start>", "<end>", *["<pad>"] * 75) and encoder.num_tokens("") == 0
    assert encoder.tokens(LONG)[-3:] == ("old", "lighthouse", "<end>") and encoder.num_tokens(LONG) == 75


# --- loading


def test_shapes_of_sd15() -> None:
    shapes = text_encoder_shapes(SD15)
    assert len(shapes) == 196 and sum(shape.numel() for shape in shapes.values()) == 123_060_480


def test_load_assigns_without_copying(state: dict[str, Tensor]) -> None:
    encoder = load_text_encoder(TINY, state | {"text_model.embeddings.position_ids": torch.zeros(1, 3)}, TOKENIZER)
    own = encoder.model.state_dict()
    assert sorted(value.data_ptr() for value in own.values()) == sorted(value.data_ptr() for value in state.values())
    tensors = [*encoder.model.parameters(), *encoder.model.buffers()]
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in tensors)
    (positions,) = encoder.model.buffers()
    assert positions.tolist() == [list(range(77))]
    assert not encoder.model.training and encoder.model.config._attn_implementation == "sdpa"
    assert (encoder.length, encoder.width) == (77, 32)


def test_load_names_every_bad_key(state: dict[str, Tensor]) -> None:
    bad = dict(state)
    del bad["text_model.final_layer_norm.bias"], bad["text_model.encoder.layers.1.mlp.fc1.weight"]
    bad["text_projection.weight"] = torch.zeros(1)
    bad["text_model.encoder.layers.0.mlp.fc2.weight"] = torch.zeros(48, 32)
    with pytest.raises(ValueError) as caught:
        load_text_encoder(TINY, bad, TOKENIZER)
    for part in (
        "missing text_model.final_layer_norm.bias",
        "missing text_model.encoder.layers.1.mlp.fc1.weight",
        "unexpected text_projection.weight",
        "text_model.encoder.layers.0.mlp.fc2.weight has shape [48, 32], expected [32, 48]",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size is None; expected a whole number from 1"),
        ({"hidden_size": 10**400}, "hidden_size is 1000.*; expected a whole number from 1"),
        ({"num_hidden_layers": 10**8}, "num_hidden_layers is 100000000; expected a whole number from 1 to 200"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan; expected a number from 0 to 1"),
        ({"layer_norm_eps": True}, "layer_norm_eps is True; expected a number from 0 to 1"),
        ({"num_attention_heads": 5}, "hidden_size is 32, expected a multiple of 5"),
        ({"hidden_act": "swoosh"}, "hidden_act is 'swoosh'"),
        ({"vocab_size": 1000}, "has 49408 tokens, the text encoder knows 1000"),
    ],
)
def test_bad_config(change: dict[str, object], message: str) -> None:
    config = TINY | change
    with pytest.raises(ValueError, match=message):
        load_text_encoder(config, random_state(config), TOKENIZER)


def test_the_encoder_limits_the_length(tmp_path: Path) -> None:
    config = TINY | {"max_position_embeddings": 16}
    folder = shutil.copytree(TOKENIZER, tmp_path / "tokenizer")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["model_max_length"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for tokenizer in (TOKENIZER, folder):
        encoder = load_text_encoder(config, random_state(config), tokenizer)
        assert encoder.length == 16
        with pytest.warns(UserWarning, match="84 tokens, the text encoder reads 14"):
            context = encoder.encode([LONG])
        assert relative(context, encoder.model(token_ids(encoder, [LONG], 16)).last_hidden_state) == 0


def test_tokenizer_json_alone(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TOKENIZER)
    tokenizer.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    again = load_tokenizer(tmp_path)
    assert [again(prompt).input_ids for prompt in PROMPTS] == [tokenizer(prompt).input_ids for prompt in PROMPTS]
    assert again.pad_token_id == 49407


def test_tokenizer_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the tokenizer reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert len(load_tokenizer(TOKENIZER)) == 49408


def test_tokenizer_missing_or_broken(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "no_such_folder"):
        with pytest.raises(
            ValueError, match=r"no tokenizer in .*expected vocab.json and merges.txt, or tokenizer.json"
        ):
            load_tokenizer(folder)
    shutil.copy(TOKENIZER / "merges.txt", tmp_path)
    with pytest.raises(ValueError, match="no tokenizer in"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text('{"!": 0, ')
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_importing_the_module_does_not_import_transformers() -> None:
    code = "import sys, minidiff.networks.text; sys.exit('transformers' in sys.modules or 'tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0
