"""Attention maps over a run: reduced step by step, and read by phrase."""

import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import minidiff
from minidiff.model import Model
from minidiff.networks.attention import Maps, Record
from minidiff.networks.sites import Site
from minidiff.networks.text import Phrases
from minidiff.recorded import LAST, MEAN, PER_STEP, Attention, Reduce, SiteMaps

PROMPTS = ["a cat and a red ball", "the red ball by a red ball"]
RECORD = Record(minidiff.cross & (minidiff.level(0) | minidiff.level(1)), minidiff.ALL)
SITES = [Site("mid", 0, 0, "cross"), Site("up", 1, 0, "cross"), Site("up", 1, 1, "cross")]


def shared(model: Model, **options: object) -> dict:
    return {"model": model, "steps": 4, "sampler": "ddim", "seed": 1, **options}


def by_hand(model: Model, record: Record, **options: object) -> list[Maps]:
    """Each step's maps, copied."""
    steps = minidiff.sample_steps(PROMPTS, attention=record, **shared(model, **options))
    return [{site: kept.clone() for site, kept in step.maps.items()} for step in steps]


@pytest.mark.parametrize("keep", [minidiff.ALL, minidiff.HEAD_MEAN])
@pytest.mark.parametrize("sampler", ["ddim", "pndm"])  # pndm calls the network twice in its first step
def test_reductions_equal_a_loop_by_hand(tiny_model: Model, keep: object, sampler: str) -> None:
    record = replace(RECORD, keep=keep)
    every = by_hand(tiny_model, record, sampler=sampler)
    assert len(every) == 4
    # else a reduction that picks one step would pass
    assert all((every[0][site] - every[3][site]).abs().max() > 1e-4 for site in every[0])
    options = shared(tiny_model, sampler=sampler, output="latents", attention=record)
    mean, last, per_step = (
        minidiff.generate(PROMPTS, **options, reduce=reduce).attention for reduce in (MEAN, LAST, PER_STEP)
    )
    for site in every[0]:
        stack = torch.stack([maps[site] for maps in every])
        torch.testing.assert_close(mean.maps[site], stack.mean(dim=0))
        torch.testing.assert_close(last.maps[site], stack[-1])
        torch.testing.assert_close(per_step.maps[site], stack)
    assert (mean.per_step, last.per_step, per_step.per_step) == (False, False, True)
    assert set(mean.maps) == set(every[0]) == set(minidiff.sites(tiny_model, RECORD.sites))  # type: ignore[arg-type]


def test_the_default_is_the_mean_of_the_second_coarsest_grid(tiny_model: Model) -> None:
    found = minidiff.generate(PROMPTS, attention=True, output="latents", **shared(tiny_model)).attention
    assert set(found.maps) == set(minidiff.sites(tiny_model, minidiff.cross & minidiff.level(1)))
    every = by_hand(tiny_model, replace(RECORD, keep=minidiff.HEAD_MEAN))
    for site, kept in found.maps.items():
        assert kept.shape == (2, 4, 4, 77)
        torch.testing.assert_close(kept, torch.stack([maps[site] for maps in every]).mean(dim=0))
    assert minidiff.generate(PROMPTS, output="latents", **shared(tiny_model)).attention is None


@pytest.mark.parametrize(("reduce", "steps"), [(MEAN, 1), (LAST, 1), (PER_STEP, 6)])
def test_only_per_step_grows_with_the_run(reduce: Reduce, steps: int) -> None:
    kept: Maps | None = None
    for n in range(6):
        maps = {site: torch.full((2, 3, 4, 4, 5), float(n)) for site in SITES}
        before = {site: found.clone() for site, found in maps.items()}
        kept = reduce(kept, maps, n)
        assert all(torch.equal(maps[site], before[site]) for site in SITES)  # the caller's Step keeps its own
    assert kept is not None
    assert set(kept) == set(SITES)
    for found in kept.values():
        assert found.numel() == steps * 2 * 3 * 4 * 4 * 5
        assert found.untyped_storage().nbytes() == found.numel() * 4  # not a view of something larger
        assert found.device.type == "cpu"
    expected = {MEAN: 2.5, LAST: 5.0, PER_STEP: 2.5}[reduce]
    torch.testing.assert_close(kept[SITES[0]].mean(), torch.tensor(expected))


# ---- by phrase


def phrase_map(maps: Maps, image: int, tokens: tuple[int, ...], grid: tuple[int, int], heads: bool) -> Tensor:
    """Slow reference: the mean over the sites on a grid, over heads and over tokens."""
    found = []
    for kept in maps.values():
        own = kept[image].mean(dim=0) if heads else kept[image]
        if tuple(own.shape[:2]) == grid:
            found.append(sum(own[..., token] for token in tokens) / len(tokens))
    return sum(found) / len(found)


@pytest.mark.parametrize("keep", [minidiff.ALL, minidiff.HEAD_MEAN])
def test_a_phrase_is_read_from_every_image(tiny_model: Model, keep: object) -> None:
    record = replace(RECORD, keep=keep)
    options = shared(tiny_model, width=48, images_per_prompt=2, output="latents", attention=record)
    found = minidiff.generate(PROMPTS, **options).attention
    assert found.images == 4
    read = found["red ball"]
    assert read.shape == (4, 4, 6)  # of grids 2x3 and 4x6 the finer
    for image in range(4):
        prompt = PROMPTS[image // 2]
        tokens = tiny_model.text.all_spans(prompt, "red ball")
        assert len(tokens) == (2 if image < 2 else 4)  # occurs twice in the second prompt
        torch.testing.assert_close(read[image], found.of(image, "red ball"))
        for grid in ((4, 6), (2, 3)):
            expected = phrase_map(found.maps, image, tokens, grid, keep is minidiff.ALL)
            torch.testing.assert_close(found.of(image, "red ball", grid), expected)
    assert read.min() > 0
    assert (read[0] - read[1]).abs().max() > 1e-4


@pytest.mark.parametrize("keep", [minidiff.ALL, minidiff.HEAD_MEAN])
def test_a_phrase_is_read_at_every_step(tiny_model: Model, keep: object) -> None:
    record = replace(RECORD, keep=keep)
    found = minidiff.generate(PROMPTS, output="latents", attention=record, reduce=PER_STEP, **shared(tiny_model))
    read = found.attention["ball"]
    assert read.shape == (2, 4, 4, 4)
    every = by_hand(tiny_model, record)
    for image in range(2):
        tokens = tiny_model.text.all_spans(PROMPTS[image], "ball")
        for step in range(4):
            expected = phrase_map(every[step], image, tokens, (4, 4), keep is minidiff.ALL)
            torch.testing.assert_close(read[image, step], expected)


def test_a_runs_result_holds_the_maps_of_the_steps_taken(tiny_model: Model) -> None:
    run = minidiff.sample_steps(PROMPTS, attention=RECORD, output="latents", reduce="last", **shared(tiny_model))
    for step in run:
        own = run.result().attention
        assert all(torch.equal(own.maps[site], kept) for site, kept in step.maps.items())
    run = minidiff.sample_steps(PROMPTS, attention=RECORD, output="latents", reduce=PER_STEP, **shared(tiny_model))
    next(run), next(run)
    assert run.result().attention["ball"].shape == (2, 2, 4, 4)


# ---- errors


def hand_made(maps: SiteMaps, per_step: bool = False, maps_are_per_head: bool = False) -> Attention:
    keep = minidiff.ALL if maps_are_per_head else minidiff.HEAD_MEAN
    text = Phrases(None, 7)  # type: ignore[arg-type]
    return Attention(maps, dict.fromkeys(maps, keep), 2, text, per_step=per_step)


def test_what_cannot_be_read_is_named(tiny_model: Model) -> None:
    found = minidiff.generate(PROMPTS, output="latents", attention=RECORD, **shared(tiny_model)).attention
    with pytest.raises(ValueError, match="phrase 'cat' is not in the prompt 'the red ball by"):
        found["cat"]  # not in the second image's prompt
    assert found.of(0, "cat").shape == (4, 4)
    with pytest.raises(
        ValueError, match=r"no cross-attention was recorded on a grid \(8, 8\); expected one of .*\(2, 2\)"
    ):
        found.of(0, "cat", (8, 8))
    context = tiny_model.text.encode(PROMPTS[:1])
    by_context = minidiff.generate(context=context, output="latents", attention=True, **shared(tiny_model)).attention
    with pytest.raises(ValueError, match="there is no prompt to find 'cat' in; expected e.g."):
        by_context["cat"]
    torch.testing.assert_close(next(iter(by_context.maps.values())).sum(-1), torch.ones(1, 4, 4))


def test_self_attention_is_read_from_a_pixel_and_not_by_phrase(tiny_model: Model) -> None:
    both = minidiff.Record(minidiff.level(1), minidiff.HEAD_MEAN)
    found = minidiff.generate(PROMPTS, output="latents", attention=both, **shared(tiny_model)).attention
    cross = minidiff.generate(PROMPTS, output="latents", attention=True, **shared(tiny_model)).attention
    torch.testing.assert_close(found["ball"], cross["ball"], rtol=1e-4, atol=1e-6)  # without self-attention
    looks = found.from_pixel(1, 0.99, 0.3)
    own = [kept for site, kept in found.maps.items() if site.kind == "self"]
    expected = torch.stack([kept[1, 1, 3].unflatten(-1, (4, 4)) for kept in own]).mean(dim=0)
    torch.testing.assert_close(looks, expected)
    assert float(looks.sum()) == pytest.approx(1, abs=1e-5)
    alone = replace(both, sites=minidiff.self_ & minidiff.level(1))
    found = minidiff.generate(PROMPTS, output="latents", attention=alone, **shared(tiny_model)).attention
    with pytest.raises(ValueError, match="no cross-attention was recorded, only .*; attention.from_pixel reads self"):
        found["ball"]
    with pytest.raises(ValueError, match="no self-attention was recorded"):
        cross.from_pixel(0, 0.5, 0.5)


def test_unconditional_rows_are_read_by_the_negative_prompt(tiny_model: Model) -> None:
    record = minidiff.Record(minidiff.cross & minidiff.level(1), minidiff.HEAD_MEAN, rows="uncond")
    options = shared(tiny_model, negative_prompt="a blurry thing")
    found = minidiff.generate("the red ball", output="latents", attention=record, **options).attention
    (tokens,) = [tiny_model.text.all_spans("a blurry thing", "blurry")]
    expected = torch.stack([kept[0][..., list(tokens)].mean(-1) for kept in found.maps.values()]).mean(0)
    torch.testing.assert_close(found["blurry"][0], expected)
    with pytest.raises(ValueError, match="'ball' is not in the prompt 'a blurry thing'"):
        found["ball"]


def test_occurrences_and_names(tiny_model: Model) -> None:
    found = minidiff.generate("a cat and a dog", output="latents", attention=True, **shared(tiny_model)).attention
    first, second = (found.of(0, "a", occurrence=n) for n in (0, 1))
    torch.testing.assert_close(found["a"][0], (first + second) / 2)
    assert (first - second).abs().max() > 1e-6
    site = next(iter(found.maps))
    assert torch.equal(found.maps[site.name], found.maps[site])  # type: ignore[index]
    assert site.name in found.maps
    for wrong, message in (
        ({"occurrence": "first"}, "occurrence is 'first'"),
        ({"grid": 3}, r"on a grid 3; expected one of \("),
        ({"phrase": "tokens:900"}, "tokens is 900; expected a whole number from 0 to"),
        ({"image": 1}, "image is 1"),
    ):
        with pytest.raises(ValueError, match=message):
            found.of(**{"image": 0, "phrase": "a"} | wrong)  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="down.9.9.cross was not recorded; recorded sites: "):
        found.maps["down.9.9.cross"]  # type: ignore[index]


def test_a_result_with_attention_travels_to_another_process(tiny_model: Model) -> None:
    result = minidiff.generate(PROMPTS, attention=True, boxes={"ball": (0, 0, 0.5, 0.5)}, **shared(tiny_model))
    data = pickle.dumps(result)
    assert len(data) < 5_000_000  # it holds a tokenizer, but no network
    again = pickle.loads(data)
    assert torch.equal(again.attention["ball"], result.attention["ball"])
    assert str(again.reports[0]) == str(result.reports[0])


@pytest.mark.parametrize(
    ("shape", "per_step"),
    [
        ((2, 3, 7), False),
        ((2, 4, 2, 3, 4, 7), False),
        ((1, 4, 4, 7), False),
        ((4, 1, 4, 4, 7), True),
        ((2, 4, 7), True),
    ],
)
def test_maps_of_another_kind_are_named(shape: tuple[int, ...], per_step: bool) -> None:
    with pytest.raises(
        ValueError, match=r"the maps of mid.0.0.cross are .*; expected those of minidiff.ALL or minidiff"
    ):
        hand_made({SITES[0]: torch.zeros(shape)}, per_step)["tokens:1,2"]


@pytest.mark.parametrize("keep", [minidiff.BOX_MASS, minidiff.COLUMNS])
def test_maps_that_name_no_tokens_are_not_read_by_phrase(tiny_model: Model, keep: object) -> None:
    """BOX_MASS [B,H,O,L] and COLUMNS [B,H,h,w,O] have as many axes as HEAD_MEAN and ALL, but other meanings."""
    record = Record(minidiff.cross & minidiff.level(1), keep)
    boxes = {"cat": (0, 0, 0.5, 0.5), "red ball": (0.5, 0.5, 1, 1), "and": (0, 0.5, 0.5, 1)}
    result = minidiff.generate(
        PROMPTS[0], boxes=boxes, guidance="none", attention=record, output="latents", **shared(tiny_model)
    )
    assert result.attention.maps
    with pytest.raises(ValueError, match="expected those of minidiff.ALL or minidiff.HEAD_MEAN"):
        result.attention["red ball"]


def test_both_halves_of_the_batch_are_not_read_by_phrase(tiny_model: Model) -> None:
    record = replace(RECORD, rows="all")
    found = minidiff.generate(PROMPTS, output="latents", attention=record, **shared(tiny_model)).attention
    with pytest.raises(ValueError, match="expected those of minidiff.ALL"):
        found["ball"]
