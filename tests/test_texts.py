"""texts.py: prompts that change from step to step and those that AND joins, alone and in batches; their phrases."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import minidiff
from minidiff.denoise import guided
from minidiff.model import Model
from minidiff.request import Request
from minidiff.texts import Texts

HEADS = minidiff.Record(minidiff.cross, minidiff.HEAD_MEAN)


def texts(model: Model, prompt: object, steps: int = 4, **options: object) -> Texts:
    return Texts.of(Request(prompt, syntax="a1111", **options), model, steps)


def made(prompt: object, model: Model, **options: object) -> minidiff.Result:
    shared: dict[str, object] = {"steps": 4, "seed": 3, "sampler": "ddim", "output": "latents", "syntax": "a1111"}
    return minidiff.generate(prompt, model=model, **shared | options)


# ---- texts that change


def test_contexts_of_steps_are_those_of_their_texts(tiny_model: Model) -> None:
    found = texts(tiny_model, ["a [cat:(dog:1.2):2]", "no"], negative_prompt=["[x|y]", ""]).in_each_step()
    assert len(found) == 4 and len(set(found)) == 4
    reads = ["a cat", "a cat", "a (dog:1.2)", "a (dog:1.2)"]
    for one, prompt, negative in zip(found, reads, "xyxy", strict=True):
        plain = texts(tiny_model, [prompt, "no"], negative_prompt=[negative, ""])
        assert torch.equal(one.encode(tiny_model, None, True), plain.encode(tiny_model, None, True))


def test_one_context_where_nothing_changes(tiny_model: Model) -> None:
    assert len(texts(tiny_model, "a (cat:1.2), [dog] [a:b]").in_each_step()) == 1
    found = texts(tiny_model, "a [cat:dog:2]").in_each_step()
    assert len(set(found)) == 2 and found[0] is found[1]


def test_steps_change_the_picture_from_that_step_on(tiny_model: Model) -> None:
    plain, changing = (
        list(minidiff.sample_steps(prompt, model=tiny_model, syntax="a1111", steps=4, seed=3, sampler="ddim"))
        for prompt in ("a cat", "a [cat:dog:2]")
    )
    same = [torch.equal(a.latents, b.latents) for a, b in zip(plain, changing, strict=True)]
    assert same == [True, True, False, False]


def test_phrases_of_steps(tiny_model: Model) -> None:
    found = texts(tiny_model, "a [cat:big dog:2] and a bird").phrases
    assert found.spans("a [cat:big dog:2] and a bird", "a big dog") == (1, 2, 3)
    with pytest.raises(ValueError, match="phrase 'bird' moves from step to step"):
        found.spans("a [cat:big dog:2] and a bird", "bird")
    with pytest.raises(ValueError, match="'fish' is not in the prompt"):
        found.all_spans("a [cat:big dog:2] and a bird", "fish")
    boxes = {"cat": (0, 0, 0.5, 0.5), "bird": (0.5, 0.5, 1, 1)}
    request = Request("a [cat:big dog:2] and a bird", syntax="a1111", boxes=boxes)
    tokens = [
        [region.tokens for region in one.regions(request, tiny_model)[0]]
        for one in Texts.of(request, tiny_model, 4).in_each_step()
    ]
    assert tokens == [[(2,), (5,)]] * 2 + [[(), (6,)]] * 2


@pytest.mark.parametrize("prompt", ["a [cat:big dog:2] and a bird", "a bird AND a [cat|dog] :0.5"])
def test_guidance_follows_a_phrase_through_the_steps(tiny_model: Model, prompt: str) -> None:
    guidance = minidiff.Guidance(minidiff.layout_loss, scale=1, threshold=0, iterations=1, steps=4)
    boxes = {"bird": (0.5, 0.5, 1, 1), "cat": (0, 0, 0.5, 0.5)}
    result = made([prompt, "a bird, a cat"], tiny_model, boxes=boxes, guidance=guidance, steps=4)
    assert result.reports is not None
    assert result.reports[0].iterations == (1, 1, 1, 1)
    assert result.reports[0].loss.isfinite().all()
    alone = made(prompt, tiny_model, boxes=boxes, guidance=guidance)
    torch.testing.assert_close(result.latents[0], alone.latents[0], rtol=1e-3, atol=1e-3)


# ---- AND


def latents_of(model: Model, prompt: str, x: Tensor, **options: object) -> Tensor:
    """The prediction at the first step, by way of DDIM's estimate of the clean latents."""
    run = minidiff.sample_steps(prompt, model=model, latents=x, steps=4, sampler="ddim", **options)
    return next(iter(run)).denoised


@pytest.mark.parametrize("scale", [1, 4])
def test_and_is_a_weighted_sum(tiny_model: Model, scale: float) -> None:
    x = torch.randn(1, 4, 8, 8)
    uncond, cat, dog = (latents_of(tiny_model, text, x, guidance_scale=1) for text in ("blur", "a cat", "a dog"))
    cond = uncond + 0.7 * (cat - uncond) - 0.3 * (dog - uncond)
    marks: dict[str, object] = {"syntax": "a1111", "negative_prompt": "blur", "guidance_scale": scale}
    found = latents_of(tiny_model, "a cat:0.7 AND a dog :-0.3", x, **marks)
    torch.testing.assert_close(found, guided(uncond, cond, scale), rtol=1e-3, atol=1e-3)
    assert (found - cat).abs().max() > 1e-2


@pytest.mark.parametrize("scale", [1, 4])
def test_an_image_of_a_batch_with_and_equals_the_image_alone(tiny_model: Model, scale: float) -> None:
    prompts = ["a cat AND " + "a dog, " * 40 + "AND a [bird|fish:1]", "a cat", "a dog AND (a cat:1.2) :0.4"]
    options: dict[str, object] = {"guidance_scale": scale, "attention": HEADS}
    together = made(prompts, tiny_model, **options)
    for i, prompt in enumerate(prompts):
        alone = made(prompt, tiny_model, seed=3 + i, **options)
        torch.testing.assert_close(together.latents[i], alone.latents[0], rtol=1e-3, atol=1e-3)
        maps = [
            found.of(image, "a cat", occurrence=0) for found, image in ((together.attention, i), (alone.attention, 0))
        ]
        torch.testing.assert_close(*maps, rtol=1e-3, atol=1e-4)


def test_maps_of_and_are_those_of_its_texts(tiny_model: Model) -> None:
    x = torch.randn(1, 4, 8, 8)
    shared: dict[str, object] = {"model": tiny_model, "latents": x, "steps": 2, "sampler": "ddim", "attention": HEADS}
    both = next(minidiff.sample_steps("a cat AND a dog", syntax="a1111", **shared)).maps
    alone = [next(minidiff.sample_steps(text, **shared)).maps for text in ("a cat", "a dog")]
    for site, found in both.items():
        torch.testing.assert_close(found, torch.cat([one[site] for one in alone], dim=-1), rtol=1e-4, atol=1e-5)
    phrases = texts(tiny_model, "a cat AND a dog").phrases
    assert phrases.spans("a cat AND a dog", "dog") == (79,) and phrases.length == 154


def test_edits_and_custom_records_work_beside_and(tiny_model: Model) -> None:
    boxes = {"dog": (0.5, 0.5, 1, 1), "cat": (0, 0, 0.5, 0.5)}
    options: dict[str, object] = {"boxes": boxes, "guidance": "none", "steps": 2}
    plain = made("a cat AND a dog", tiny_model, **options)
    edited = made("a cat AND a dog", tiny_model, edits=minidiff.regional_prompting(20), **options)
    assert (plain.latents - edited.latents).abs().max() > 1e-3
    record = minidiff.Record(minidiff.cross, minidiff.BOX_MASS)
    recorded = made("a cat AND a dog", tiny_model, attention=record, **options)
    torch.testing.assert_close(recorded.latents, plain.latents, rtol=1e-3, atol=1e-3)
    uncond = made("a cat AND a dog", tiny_model, attention=minidiff.Record(minidiff.cross, rows="uncond"), steps=2)
    assert uncond.attention is not None and uncond.attention.prompts == ("",)


def test_and_in_a_negative_prompt_is_a_word(tiny_model: Model) -> None:
    found = texts(tiny_model, "a cat", negative_prompt="x AND y")
    assert found.weights is None and found.negative_phrases.spans("x AND y", "AND") == (2,)
    same = ("a AND b",)
    assert texts(tiny_model, same, negative_prompt=same).encode(tiny_model, None, True).shape == (2, 154, 64)


def test_given_contexts_know_no_texts(tiny_model: Model) -> None:
    context = torch.cat([tiny_model.text.encode(["a cat"])] * 2, dim=1)
    found = minidiff.generate(
        context=context, negative_prompt="[a|b] BREAK c", model=tiny_model, syntax="a1111", steps=2, output="latents"
    )
    assert isinstance(found.images, Tensor) and found.images.isfinite().all()
    with pytest.raises(ValueError, match="context holds 77 tokens and the negative one 154"):
        minidiff.generate(
            context=context[:, :77], negative_prompt="a BREAK b", model=tiny_model, syntax="a1111", steps=2
        )


# ---- compiled


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "count"),
    [("a [cat|big dog] and [b:c BREAK:2]", 1), ("a [cat|dog] AND a bird", 2)],
)
def test_steps_compile_nothing_anew(tiny_model: Model, prompt: str, count: int) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    unet = copy.deepcopy(tiny_model.unet)
    unet.compile(backend=backend, fullgraph=True, dynamic=False)
    found = made(prompt, replace(tiny_model, unet=unet), guidance_scale=4)
    torch.testing.assert_close(found.latents, made(prompt, tiny_model, guidance_scale=4).latents, rtol=1e-3, atol=1e-3)
    assert len(graphs) == count
