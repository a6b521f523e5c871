"""prompts/chunks.py against compel, against A1111's rules written out slowly, and what generate makes of both."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

import minidiff
from minidiff.model import Model
from minidiff.networks.text import TextEncoder
from minidiff.prompts.chunks import Marked, encode
from minidiff.prompts.parse import pieces
from minidiff.shapes.measure import matched, measure
from minidiff.shapes.world import Thing

WEIGHTED = "a (red:1.3) circle, [dark], (blurry:0.4) and (no:0) noise (big:-1)"
LONG = "An old lighthouse, " * 20 + "with a (Red  Door:1.2)"


@pytest.fixture(scope="module")
def encoder(tiny_model: Model) -> TextEncoder:
    return tiny_model.text


def marked(encoder: TextEncoder, chunks: int = 1) -> Marked:
    return Marked(encoder.tokenizer, 77 * chunks, 77, 77 * chunks)


def context(encoder: TextEncoder, text: str, emphasis: str, clip_skip: int | None = None) -> Tensor:
    read = marked(encoder).chunked(text)
    (found,) = encode(encoder, [read], [len(read.starts)], emphasis, clip_skip)
    return found


# ---- chunks


def slow_chunks(marked: Marked, text: str) -> list[list[int]]:
    """tokenize_line of A1111's modules/sd_hijack_clip.py in its own terms: a chunk that is filled token by token."""
    comma, done, chunk, last_comma = marked.tokenizer.get_vocab()[",</w>"], [], [], -1
    for piece in pieces(text):
        if piece.ends_chunk:
            done, chunk, last_comma = [*done, chunk], [], -1
        for token in marked.tokenizer(piece.text, add_special_tokens=False).input_ids:
            if token == comma:
                last_comma = len(chunk)
            elif len(chunk) == 75 and last_comma != -1 and len(chunk) - last_comma <= 20:
                done, chunk, last_comma = [*done, chunk[: last_comma + 1]], chunk[last_comma + 1 :], -1
            if len(chunk) == 75:
                done, chunk, last_comma = [*done, chunk], [], -1
            chunk = [*chunk, token]
    return [*done, chunk] if chunk or not done else done


def read_chunks(marked: Marked, text: str) -> list[list[int]]:
    read = marked.chunked(text)
    chunks: list[list[int]] = [[] for _ in read.starts]
    for place, token in zip(read.places, read.ids, strict=True):
        assert place % 77 == 1 + len(chunks[place // 77])
        chunks[place // 77].append(token)
    return chunks


EXAMPLES = ["", "BREAK", "BREAK a", "a BREAK BREAK b BREAK", "a " * 75 + "BREAK b", "a " * 76, LONG, WEIGHTED]
EXAMPLES += ["a " * before + "," + " a" * after for before in (54, 55, 56, 73, 74, 75, 76) for after in (20, 40)]


@pytest.mark.parametrize("text", EXAMPLES)
def test_chunks_are_a1111s(encoder: TextEncoder, text: str) -> None:
    assert read_chunks(marked(encoder), text) == slow_chunks(marked(encoder), text)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from(["a ", ", ", "BREAK ", "(cat) ", "é"]).flatmap(lambda one: st.just(one * 7)), max_size=60)
)
def test_chunks_of_any_text_are_a1111s(parts: list[str]) -> None:
    reader, text = marked(TOKENIZERS[0]), "".join(parts)
    assert read_chunks(reader, text) == slow_chunks(reader, text)


TOKENIZERS: list[TextEncoder] = []


@pytest.fixture(autouse=True)
def _for_hypothesis(encoder: TextEncoder) -> None:
    TOKENIZERS[:] = [encoder]


# ---- phrases


def test_phrases_are_found_without_marks_in_every_chunk(encoder: TextEncoder) -> None:
    reader = marked(encoder, 2)
    prompt = "a (red:1.3) \\(big\\) circle BREAK the [red] fox"
    assert reader.read(prompt).text == "a red (big) circle\nthe red fox"
    assert reader.spans(prompt, "red (big) circle") == (2, 3, 4, 5, 6)
    assert reader.spans(prompt, "red fox") == (79, 80)
    assert reader.all_spans(prompt, "red") == (2, 79)
    assert reader.num_tokens(prompt) == 9
    labels = reader.tokens(prompt)
    assert len(labels) == 154
    assert labels[:9] == ("<start>", "a", "red", "(", "big", ")", "circle", "<end>", "<pad>")
    assert labels[76:83] == ("<pad>", "<start>", "the", "red", "fox", "<end>", "<pad>")
    assert marked(encoder, 2).tokens("a " * 76)[75:80] == ("a", "<end>", "<start>", "a", "<end>")
    assert marked(encoder, 3).spans(LONG, "red door") == (85, 86)
    with pytest.raises(ValueError, match="did you mean 'red fox'"):
        reader.spans(prompt, "red foxes")


# ---- contexts


@pytest.mark.parametrize("texts", [["a cat"], ["", "a photo of a cat: 12:30, Café"], ["dogs", "cats", "dogs"]])
@pytest.mark.parametrize("emphasis", ["a1111", "compel", "none"])
def test_without_marks_the_context_is_the_plain_one(encoder: TextEncoder, texts: list[str], emphasis: str) -> None:
    found = encode(encoder, [marked(encoder).chunked(text) for text in texts], [1] * len(texts), emphasis)
    assert torch.equal(torch.stack(found), encoder.encode(texts))


@pytest.mark.parametrize(
    "text",
    [
        "a (red:1.3) circle",
        "a [dark] circle",
        "(blurry:0.4) circle",
        WEIGHTED,
        "[[[noise]]] and ((much:1.2) more)",
        ("a [dark] castle, (huge:1.5) " * 14) + "(cat:0.3)",
    ],
)
def test_compels_emphasis_is_compels(encoder: TextEncoder, text: str) -> None:
    compel = pytest.importorskip("compel.embeddings_provider")
    mode = compel.SplitLongTextMode.BRUTAL
    provider = compel.EmbeddingsProvider(encoder.tokenizer, encoder.model, truncate=False, split_long_text_mode=mode)
    parts = pieces(text.replace(",", " "))  # compel does not look at commas
    expected = provider.get_embeddings_for_weighted_prompt_fragments(
        [[piece.text for piece in parts]], [[piece.weight for piece in parts]]
    )[0]
    found = context(encoder, text.replace(",", " "), "compel")
    assert found.shape == expected.shape and not torch.equal(found, context(encoder, text, "none")[: len(found)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("text", ["a (red:1.3) circle", WEIGHTED, LONG, "a BREAK (b:0.5)"])
@pytest.mark.parametrize("clip_skip", [None, 1])
def test_a1111s_emphasis_is_a_product_that_keeps_the_mean(
    encoder: TextEncoder, text: str, clip_skip: int | None
) -> None:
    read, found = marked(encoder).chunked(text), context(encoder, text, "a1111", clip_skip)
    for n, tokens in enumerate(slow_chunks(marked(encoder), text)):
        ids = [encoder.tokenizer.bos_token_id, *tokens] + [encoder.tokenizer.eos_token_id] * (76 - len(tokens))
        z = encoder.encode_ids(torch.tensor([ids]), clip_skip)[0].double()
        weights = torch.ones(77, 1, dtype=torch.float64)
        for place, weight in zip(read.places, read.weights, strict=True):
            if place // 77 == n:
                weights[place % 77] = weight
        expected = z * weights * (z.mean() / (z * weights).mean())
        torch.testing.assert_close(found[77 * n : 77 * (n + 1)].double(), expected, rtol=1e-4, atol=1e-4)


def test_no_emphasis_reads_the_marks_and_ignores_the_weights(encoder: TextEncoder) -> None:
    assert torch.equal(context(encoder, "a (red:1.3) circle", "none"), encoder.encode(["a red circle"])[0])


def test_empty_chunks_fill_up(encoder: TextEncoder) -> None:
    (found,) = encode(encoder, [marked(encoder).chunked("a cat")], [3])
    torch.testing.assert_close(found.view(3, 77, -1), encoder.encode(["a cat", "", ""]))


# ---- pictures


def images(prompt: str | list[str], model: Model, **options: object) -> Tensor:
    found = minidiff.generate(prompt, model=model, steps=2, seed=3, output="latents", **options).images
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("scale", [1, 5])
def test_a_text_without_marks_makes_the_plain_picture(tiny_model: Model, scale: float) -> None:
    prompts, options = ["a cat, sitting", "dogs"], {"guidance_scale": scale}
    options |= {} if scale == 1 else {"negative_prompt": "blurry, low: quality"}
    assert torch.equal(images(prompts, tiny_model, **options), images(prompts, tiny_model, syntax="a1111", **options))


@pytest.mark.parametrize("scale", [1, 5])
def test_an_image_of_a_batch_equals_the_image_alone(tiny_model: Model, scale: float) -> None:
    prompts = ["a cat", LONG, "a BREAK (b:1.4) BREAK c"]
    negatives = ["x" if scale > 1 else "", "", "[y] BREAK " * 3 if scale > 1 else ""]
    shared = {"model": tiny_model, "syntax": "a1111", "steps": 2, "output": "latents", "guidance_scale": scale}
    record = minidiff.Record(minidiff.cross, minidiff.HEAD_MEAN)
    together = minidiff.generate(prompts, negative_prompt=negatives, seed=3, attention=record, **shared)
    for i, (prompt, negative) in enumerate(zip(prompts, negatives, strict=True)):
        alone = minidiff.generate(prompt, negative_prompt=negative, seed=3 + i, attention=record, **shared)
        torch.testing.assert_close(together.images[i], alone.images[0], rtol=1e-4, atol=1e-4)
        word = prompt.split()[-1].strip("():1.2")
        torch.testing.assert_close(together.attention.of(i, word), alone.attention.of(0, word), rtol=1e-4, atol=1e-5)


def test_weights_matter_and_none_ignores_them(tiny_model: Model) -> None:
    plain = images("a red circle", tiny_model)
    found = {
        how: images("a (red:1.5) circle", tiny_model, syntax="a1111", emphasis=how)
        for how in ("a1111", "compel", "none")
    }
    assert torch.equal(found["none"], plain)
    assert (found["a1111"] - plain).abs().max() > 1e-3 and (found["compel"] - found["a1111"]).abs().max() > 1e-3


def test_a_given_context_takes_a_marked_negative_prompt(tiny_model: Model) -> None:
    given_ = torch.cat([tiny_model.text.encode(["a cat"])] * 2, dim=1)
    found = minidiff.generate(
        context=given_, negative_prompt="(blurry:1.2)", syntax="a1111", model=tiny_model, steps=2, output="latents"
    )
    assert found.images.isfinite().all()


def test_guidance_and_records_work_with_a_long_context(tiny_model: Model) -> None:
    boxes = {"red door": (0.5, 0.5, 1.0, 1.0)}
    prompts = [LONG, "a (Red Door)"]
    run = minidiff.sample_steps(
        prompts, model=tiny_model, syntax="a1111", boxes=boxes, attention=True, steps=2, seed=0, sampler="euler"
    )
    steps = list(run)
    result = run.result()
    assert result.reports[0].iterations and result.reports[0].loss.isfinite().all()
    assert next(iter(steps[0].maps.values())).shape[-1] == 154
    assert result.attention["red door"].shape[0] == 2
    assert result.attention.text.spans(LONG, "red door") == (85, 86)
    alone = minidiff.generate(
        prompts[1], model=tiny_model, syntax="a1111", boxes=boxes, steps=2, seed=1, sampler="euler", output="latents"
    )
    torch.testing.assert_close(result.latents[1], alone.images[0], rtol=1e-3, atol=1e-3)


TEXTS = st.lists(
    st.sampled_from(
        ["(", ")", "[", "]", ":1.3)", "BREAK", "\\", " ", ",", "cat", "a red circle", "AND", "<", "|", "\0"]
    )
    | st.text(max_size=6),
    max_size=12,
).map("".join)


@settings(max_examples=15, deadline=None)
@given(TEXTS, TEXTS, st.sampled_from(["a1111", "compel", "none"]))
def test_any_prompt_makes_a_picture_or_one_error(prompt: str, negative: str, emphasis: str) -> None:
    model = MODELS[0]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = minidiff.generate(
                prompt,
                model=model,
                negative_prompt=negative,
                syntax="a1111",
                emphasis=emphasis,
                steps=1,
                seed=0,
                width=16,
                height=16,
                output="latents",
                boxes={"tokens:1": (0, 0, 1, 1)},
                guidance="none",
            )
    except ValueError as error:
        assert str(error)
    else:
        assert found.images.shape == (1, 4, 4, 4)


MODELS: list[Model] = []


@pytest.fixture(autouse=True)
def _model_for_hypothesis(tiny_model: Model) -> None:
    MODELS[:] = [tiny_model]


@pytest.mark.parametrize("unit", ["(", "[cat] ", "cat ", ", ", "🐱"])
def test_ten_thousand_characters(tiny_model: Model, unit: str) -> None:
    text = unit * (10_000 // len(unit))
    try:
        found = images(text, tiny_model, syntax="a1111", width=16, height=16)
    except ValueError as error:
        assert "weight" in str(error)
    else:
        assert found.shape == (1, 4, 4, 4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:this model does not know")
def test_a_box_on_the_last_phrase_of_a_long_prompt_places_the_object() -> None:
    model, box = minidiff.load(dtype="float32", device="cpu"), (0.55, 0.5, 0.95, 0.9)
    prompt = "a red circle, " * 75 + "a blue square"  # of 303 tokens
    result = minidiff.generate(
        prompt, model=model, syntax="a1111", boxes={"blue square": box}, steps=10, seed=1, output="tensor"
    )
    (found,) = matched(measure((result.images[0] * 255).to(torch.uint8)).things, [Thing("square", "blue", box)])
    assert found is not None
    assert found.box[0] >= 0.5 and found.box[1] >= 0.45 and found.box[2] <= 1 and found.box[3] <= 0.95, found
