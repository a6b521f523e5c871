"""Presets: each makes what it stands for, and its file makes the picture again."""

from dataclasses import replace

import pytest
import torch

import minidiff
from minidiff import Model
from minidiff.guidance.presets import preset
from minidiff.vocabulary import BUNDLED, PRESETS

BOXES = {"cat": (0.0, 0.0, 0.5, 0.5), "ball": (0.5, 0.3, 1.0, 0.9)}


def made(model: Model, guidance: object, **options: object) -> minidiff.Result:
    given = {"boxes": BOXES, "steps": 2, "guidance_scale": 2, "seed": 1, "output": "latents", **options}
    return minidiff.generate("a cat and a ball", model=model, guidance=guidance, **given)  # type: ignore[arg-type]


def test_each_stands_for_what_it_says_and_is_made_again_from_its_file(tiny_model: Model) -> None:
    dense = minidiff.dense_diffusion()
    bundled = replace(tiny_model, name=BUNDLED)
    asked = [
        (tiny_model, "fast", {"guidance": "none", "edits": dense}),
        (tiny_model, "balanced", {"guidance": "layout"}),
        (tiny_model, "best", {"guidance": "rnb"}),
        (bundled, "best", {"guidance": None}),
    ]
    for model, name, same in asked:
        steps = 2 if name == "fast" else 1
        found = made(model, name, steps=steps)
        assert torch.equal(found.latents, made(model, **same, steps=steps).latents), name
        written = minidiff.Request.from_plain(found.parameters[0]).filled({"model": model})
        for again in (found.request, written) if name == "fast" else ():
            assert torch.equal(minidiff.generate(again).latents, found.latents)
    assert {preset(name, BUNDLED) for name in PRESETS} != {preset(name, "x") for name in PRESETS}


def test_beside_edits_relations_and_tries(tiny_model: Model) -> None:
    none = {"boxes": None, "relations": ["cat left of ball"]}
    edits = (minidiff.regional_prompting(), minidiff.dense_diffusion())
    both = made(tiny_model, "none", edits=edits).latents
    assert torch.equal(made(tiny_model, "fast", edits=edits[0]).latents, both)
    assert not torch.equal(made(tiny_model, "none", edits=edits[0]).latents, both)
    assert torch.equal(made(tiny_model, "best", **none).latents, made(tiny_model, "rnb", **none).latents)
    assert torch.equal(made(tiny_model, "fast", **none).latents, made(tiny_model, "layout", **none).latents)
    tried = made(tiny_model, "best", tries=2, steps=1)
    assert minidiff.Request("a cat", guidance="fast", tries=2, relations=["cat left of ball"]).guided
    assert tried.info["tries"] == 2 and torch.equal(minidiff.generate(tried.request).latents, tried.latents)


def test_fast_with_relations_is_for_all_prompts_or_none(tiny_model: Model) -> None:
    mixed = {"relations": [None, ["cat left of ball"]], "boxes": BOXES, "guidance": "fast", "model": tiny_model}
    with pytest.raises(ValueError, match='guidance is "fast", which is "balanced" where relations are, but some'):
        minidiff.sample_steps(["a cat and a ball"] * 2, **mixed)


def test_fast_acts_behind_the_steps_with_regions_apart(tiny_model: Model) -> None:
    given = {"regions": [minidiff.Region("a dog", (0, 0, 0.5, 1))], "regions_apart": 0.4, "steps": 4}
    assert not torch.equal(made(tiny_model, "fast", **given).latents, made(tiny_model, "none", **given).latents)


def test_their_names_are_among_those_of_an_error() -> None:
    with pytest.raises(ValueError, match="guidance is 'bets'; expected one of .*fast, balanced, best, none"):
        minidiff.Request("a cat", boxes={"cat": BOXES["cat"]}, guidance="bets")
    with pytest.raises(ValueError, match="nothing is guided"):
        minidiff.Request("a cat", boxes={"cat": BOXES["cat"]}, guidance="fast", tries=2)


def test_fast_that_does_nothing_is_told_of(tiny_model: Model) -> None:
    with pytest.raises(ValueError, match='guidance is "fast", but no phrase of boxes has a box or mask'):
        made(tiny_model, "fast", boxes={"cat": None})
    assert not minidiff.Request("a cat", boxes=BOXES, guidance="fast").guided
    regions = [minidiff.Region("a dog", (0, 0, 0.5, 1))]
    with pytest.warns(UserWarning, match='guidance="fast" has no effect: its steps are 0 to 1'):
        minidiff.sample_steps(
            "a cat",
            boxes={"cat": BOXES["cat"]},
            model=tiny_model,
            guidance="fast",
            regions=regions,
            regions_apart=1,
            steps=2,
        )
