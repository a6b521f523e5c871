"""Pictures of one call whose attention takes from the first one's."""

import warnings
from dataclasses import replace

import pytest
import torch
from compare import relative_error

import minidiff
from minidiff.guidance.pairs import masactrl, prompt_to_prompt
from minidiff.model import Model
from minidiff.networks.attention import Edit, Hooks, hooked_attention
from minidiff.networks.sites import Site
from minidiff.shapes.measure import iou, measure

PAIR = ["a red ball and a cat", "a big green ball and a cat"]


def test_words_stand_for_those_they_replace(tiny_model: Model) -> None:
    texts = [tiny_model.text.tokens(prompt) for prompt in PAIR]
    for swap in (True, False):
        first, second = tiny_model.text.alignment(PAIR, swap=swap)
        assert torch.equal(first, torch.eye(77))
        for j, label in enumerate(texts[1]):
            if label in ("big", "green"):  # for "red", half of its attention each
                expected = {texts[0].index("red"): 0.5} if swap else {}
            else:
                after = j - 1 if j > 3 else j
                expected = {after: 1.0}
            assert {int(i): float(second[i, j]) for i in second[:, j].nonzero()} == expected
    one = tiny_model.text.alignment(["a red ball", "a green ball"])[1]
    assert torch.equal(one, torch.eye(77))


def test_the_others_take_the_firsts_attention() -> None:
    generator = torch.Generator().manual_seed(2)
    alignment = torch.zeros(3, 4, 4)
    alignment[0] = torch.eye(4)
    alignment[1, 0, 0] = alignment[1, 1, 2] = 1
    alignment[2, 3, :2] = 0.5
    for kind, edits, length in (("cross", prompt_to_prompt()[:1], 4), ("self", prompt_to_prompt()[1:], 6)):
        q, k, v = (torch.randn(3, 2, n, 5, generator=generator) for n in (6, length, length))
        edits = tuple(replace(one, sites=frozenset([Site("up", 1, 0, kind)]), rows="all") for one in edits)
        hooks = Hooks({}, "all", edits, {"alignment": alignment})
        found, _ = hooked_attention(Site("up", 1, 0, kind), q, k, v, (2, 3), hooks)
        probs = (q @ k.mT / 5**0.5).softmax(dim=-1)
        expected = probs.clone()
        for b in range(3):
            if kind == "self":
                expected[b] = probs[0]
            for j in range(4 if kind == "cross" else 0):
                column = alignment[b, :, j]
                if column.any():
                    expected[b, :, :, j] = sum(column[i] * probs[0, :, :, i] for i in range(4))
        torch.testing.assert_close(found, expected @ v)


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_the_first_picture_stays_as_it_is(tiny_model: Model, scale: float) -> None:
    shared = {"model": tiny_model, "steps": 3, "seed": [1, 1], "guidance_scale": scale, "output": "latents"}
    plain = minidiff.generate(PAIR, **shared).latents
    inputs = {"alignment": tiny_model.text.alignment(PAIR)}
    swapped = minidiff.generate(PAIR, edits=prompt_to_prompt(), inputs=inputs, **shared).latents
    looked = masactrl(steps=None)[: 1 if scale == 1 else 2]
    for found in (swapped, minidiff.generate(PAIR, edits=looked, **shared).latents):
        assert relative_error(found[0], plain[0]) < 1e-4
        assert relative_error(found[1], plain[1]) > 3e-4


def test_the_unconditional_row_takes_the_firsts_keys_too(tiny_model: Model) -> None:
    shared = {
        "model": tiny_model,
        "steps": 1,
        "spacing": "trailing",
        "seed": [1, 1],
        "output": "latents",
        "negative_prompt": ["a", "hat"],
    }
    both, one = (minidiff.generate(PAIR, edits=masactrl(steps=None)[:count], **shared).latents for count in (2, 1))
    assert relative_error(both[1], one[1]) > 1e-4


@pytest.mark.slow
def test_a_word_is_swapped_and_the_layout_stays() -> None:
    model = minidiff.load("minidiff/shapes", dtype="float32", device="cpu")
    kept = 0
    for seed in range(4):
        pair = ["a red circle and a blue square", "a green circle and a blue square"]
        edits, inputs = minidiff.prompt_to_prompt(), {"alignment": model.text.alignment(pair)}
        images = minidiff.generate(
            pair, model=model, seed=[seed, seed], edits=edits, inputs=inputs, guidance="none", output="tensor"
        ).images
        found = [
            {(one.colour, one.shape): one.box for one in measure((image * 255).round().to(torch.uint8)).things}
            for image in images
        ]
        pairs = ((("red", "circle"), ("green", "circle")), (("blue", "square"), ("blue", "square")))
        kept += all(a in found[0] and b in found[1] and iou(found[0][a], found[1][b]) > 0.8 for a, b in pairs)
    assert kept >= 3


def test_what_does_not_fit_is_named(tiny_model: Model) -> None:
    shared = {"model": tiny_model, "steps": 1, "spacing": "trailing", "seed": [1, 1], "output": "latents"}
    with pytest.raises(ValueError, match=r'"alignment": model.text.alignment\(prompts\)'):
        minidiff.generate(PAIR, edits=prompt_to_prompt(), **shared)
    alone = {"alignment": tiny_model.text.alignment(PAIR[:1])}
    with pytest.raises(ValueError, match=r"alignment is .*; expected \[2, 77, 77\]"):
        minidiff.generate(PAIR, edits=prompt_to_prompt(), inputs=alone, **shared)
    boxes = {"ball": (0.1, 0.1, 0.7, 0.6)}
    with pytest.raises(ValueError, match='which guidance may leave out; expected guidance="none"'):
        minidiff.generate(PAIR, edits=masactrl(steps=None), boxes=boxes, guidance="layout", **shared)


@pytest.mark.parametrize(
    "edits", [minidiff.masactrl(steps=None), minidiff.bounded_attention()], ids=["masactrl", "bounded"]
)
def test_what_is_done_to_both_rows_is_done_to_the_one_at_guidance_scale_1(
    tiny_model: Model, edits: tuple[Edit, ...]
) -> None:
    shared = {"model": tiny_model, "steps": 2, "seed": [1, 1], "guidance_scale": 1, "output": "latents"}
    shared |= {"boxes": {"cat": (0, 0, 0.5, 0.5)}, "guidance": "none"}
    found = minidiff.generate(["a cat", "a red cat"], edits=edits, **shared)
    alone = minidiff.generate(["a cat", "a red cat"], edits=edits[0], **shared)
    assert torch.equal(found.latents, alone.latents)
    with pytest.raises(ValueError, match='edit.rows is "uncond", but guidance_scale 1 runs no unconditional rows'):
        minidiff.generate(["a cat", "a red cat"], edits=edits[1], **shared)


@pytest.mark.parametrize(
    ("prompt", "seed", "message"),
    [
        ("a cat", 1, "take from a call's first picture, and there is one only: they change nothing; expected two"),
        (["a cat", "a dog"], [1, 2], r"which begins with other noise: seeds \(1, 2\); expected equal ones"),
    ],
)
def test_a_pair_that_is_none_is_warned_of(tiny_model: Model, prompt: object, seed: object, message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        minidiff.sample_steps(prompt, seed=seed, model=tiny_model, steps=2, edits=minidiff.masactrl(steps=None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        minidiff.sample_steps(["a cat", "a dog"], seed=[1, 1], model=tiny_model, edits=minidiff.masactrl(steps=None))
