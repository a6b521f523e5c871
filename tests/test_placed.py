"""How likely objects are to come out in their boxes: the numbers by other formulas, and where there are none."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

import minidiff
from bench.placed import Objects, area_under_curve, calibration_error, cross_fitted, fit, objects
from bench.scenes import SEED, scenes
from minidiff import Model
from minidiff.guidance.layout import read_objects
from minidiff.guidance.placed import CALIBRATIONS, LOOKS, OTHER, OWN, Calibration, features
from minidiff.guidance.report import Report
from minidiff.model import Adapter
from minidiff.vocabulary import BUNDLED

BOXES = {"cat": (0.0, 0.0, 0.5, 0.25), "ball": (0.1, 0.3, 0.9, 0.9)}
MASK = torch.stack([one.coverage((16, 16)) for one in read_objects(BOXES)])


def test_the_chance_is_a_logistic_function_of_attention_and_box() -> None:
    seen = [[0.1, 0.2]] * 3 + [[0.4, 0.8], [0.2, 0.8], [0.4, 0.7], [0.4, 0.8], [0.5, 0.8]] + [[0.9, 0.1]]
    mass = torch.tensor(seen, dtype=torch.float64)
    weights, bias, names = (0.5, 0.2, -1.0, -20.0, -10.0, -0.3, -0.9, -0.4), 0.7, tuple(BOXES)
    found = Calibration(weights, bias)(mass, MASK, names)
    for o, ((x0, y0, x1, y1), chance) in enumerate(zip(BOXES.values(), found.tolist(), strict=True)):
        short, long = sorted((x1 - x0, y1 - y0))
        odds = [math.log(own[o] / (1 - own[o])) for own in seen[3:8]]
        everything = sum(map(sum, seen[3:8])) / 10
        terms = [sum(odds) / 5, everything, math.log(short * long)]
        terms += [max(0.22 - short, 0), max(long - 0.62, 0), max(long / short - 2, 0), 0, 0]
        logit = sum(w * term for w, term in zip(weights, terms, strict=True)) + bias
        assert chance == pytest.approx(1 / (1 + math.exp(-logit)))
    assert Calibration(weights, bias)(mass[: LOOKS.start], MASK, names).isnan().all()
    once = Calibration(weights, bias)(mass[: LOOKS.start + 1], MASK, names)
    assert not once.isnan().any() and once[1] > found[1]  # what there is of the steps
    free = Calibration(weights, bias)(mass, MASK * torch.tensor([1, 0])[:, None, None], names)
    assert free[0] == found[0] and free[1].isnan()
    twice = Calibration(weights, bias)(mass, MASK, ("cat", "cat"))
    torch.testing.assert_close(twice.logit(), found.logit() - 0.9)
    frail = Calibration(weights, bias)(mass, MASK, ("star cat string", "red Ring"))
    torch.testing.assert_close(frail.logit(), found.logit() - torch.tensor([0, 0.4]))
    lost = mass.clone()
    lost[:, 1] = math.nan  # of an object without a mask
    alone = Calibration(weights, bias)(lost, MASK, names)
    expected = Calibration(weights, bias)(mass[:, :1], MASK[:1], ("cat",))
    assert alone[0] == expected[0]


def test_a_fit_finds_the_weights_and_says_what_comes() -> None:
    rng = np.random.default_rng(0)
    given = torch.from_numpy(rng.normal(size=(4000, 2)) * [1, 3] + [0, 5])
    chance = (given @ torch.tensor([1.5, -0.5]).double() + 2).sigmoid()
    hits = (torch.from_numpy(rng.random(4000)) < chance).double()
    some = Objects(given, hits, [("a", i // 4) for i in range(4000)])
    assert (*fit(some).weights, fit(some).bias) == pytest.approx((1.5, -0.5, 2), rel=0.12)
    said = cross_fitted(some).tolist()
    assert calibration_error(said, hits.tolist()) < 0.03 < calibration_error([one**2 for one in said], hits.tolist())
    ranks = mannwhitneyu(np.array(said)[hits.bool()], np.array(said)[~hits.bool()]).statistic
    assert area_under_curve(said, hits.tolist()) == pytest.approx(ranks / float(hits.sum() * (1 - hits).sum()))
    unrelated = Objects(given, hits[torch.randperm(4000, generator=torch.Generator().manual_seed(0))], some.prompts)
    assert area_under_curve(cross_fitted(unrelated).tolist(), unrelated.hits.tolist()) < 0.55


def test_what_was_fitted_is_what_a_report_reads() -> None:
    scene = next(one for one in scenes(1) if one.split == "2 objects")
    row = {"split": scene.split, "scenes": SEED, "number": 0, "ious": [0.6, 0.4]}
    mass = [[0.1, 0.1]] * 3 + [[0.3, 0.6], [0.5, 0.7]]
    found = objects([row | {"first_mass": mass}])
    older = objects([row | {"mass": [[0.0, 0.0], *mass], "used": 5}])
    torch.testing.assert_close(found.features, older.features)
    mask = torch.stack([one.coverage((16, 16)) for one in read_objects(scene.layout)])
    torch.testing.assert_close(found.features, features(torch.tensor(mass).double(), mask, list(scene.layout)))
    assert found.hits.tolist() == [1, 0]


def test_reports_of_the_bundled_model_say_it_and_others_do_not(tiny_model: Model) -> None:
    def report(model: Model, **options: object) -> Report:
        how = {"guidance": {"objective": "inside", "steps": 4, "iterations": 1}, "steps": 4, "guidance_scale": 1}
        given = {"model": model, "boxes": BOXES, "seed": 0, "output": "latents", **how, **options}
        return minidiff.generate("a cat and a ball", **given).reports[0]

    named = replace(tiny_model, name=BUNDLED)
    found = report(named)
    expected = CALIBRATIONS[OTHER](found.mass, MASK.float(), found.names)
    torch.testing.assert_close(found.placed, expected, rtol=1e-4, atol=1e-6)
    bundled = minidiff.load().defaults
    default = report(replace(named, defaults=bundled), guidance=None, steps=8)
    expected = CALIBRATIONS[OWN](default.mass, MASK.float(), default.names)
    torch.testing.assert_close(default.placed, expected, rtol=1e-3, atol=1e-6)
    given = report(replace(named, defaults=bundled), guidance=None, steps=8, latents=torch.randn(1, 4, 8, 8))
    expected = CALIBRATIONS[OTHER](given.mass, MASK.float(), given.names)  # the default stretches nothing there
    torch.testing.assert_close(given.placed, expected, rtol=1e-2, atol=1e-6)
    alone = report(replace(named, defaults=replace(named.defaults, guidance="none")))
    assert torch.equal(alone.placed, found.placed)
    assert found.plain()["placed"] == found.placed.tolist()
    for name, chance in zip(found.names, found.placed.tolist(), strict=True):
        assert (f"inside, {chance:.0%} likely in its box" in str(found)) and name in str(found)
    least = replace(found, placed=torch.tensor([0.34, 0.5]))
    assert (
        str(least).count("34% likely in its box; try more seeds or a larger box") == str(least).count("try more") == 1
    )
    adapted = replace(named, adapters=(Adapter("lora", "a", "a.safetensors", "0" * 64),))
    bias = named.unet.state_dict()["conv_out.bias"]
    changed = replace(named, unet=minidiff.with_weights(named.unet, {"conv_out.bias": bias}))
    elsewhere = minidiff.Guidance(minidiff.inside_loss, sites=minidiff.cross, steps=4, iterations=1)
    for other in (
        report(tiny_model),
        report(adapted),
        report(changed),
        report(named, edits=minidiff.regional_prompting()),
        report(named, guidance=elsewhere),
    ):
        assert other.placed is None and "likely" not in str(other)
    assert report(named, guidance={"objective": "inside", "steps": 2, "iterations": 1}).placed.isnan().all()
