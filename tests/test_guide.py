"""Guidance updates each image of a batch independently, with every sampler, and reports what it did."""

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compare import relative_error
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import minidiff
from minidiff.guidance.evaluate import evaluate
from minidiff.guidance.guide import Guidance, Guide
from minidiff.guidance.layout import Layout, PlacedObject, make_layout, read_objects
from minidiff.guidance.objectives import OBJECTIVES
from minidiff.model import Model
from minidiff.networks.attention import Inputs, Maps, Record
from minidiff.networks.sites import Site
from minidiff.vocabulary import SAMPLERS

SITE = Site("mid", 0, 0, "cross")
STRONG = Guidance(scale=1000.0, threshold=0.0, iterations=2, steps=2)  # the tiny model's attention is nearly flat
CAT = {"cat": (0.1, 0.1, 0.7, 0.6)}


# ---- the value


PLACED = [name for name in OBJECTIVES if name not in ("relation", "self_cross", "conform")]
"""Those that a box alone gives something to do."""


@pytest.mark.parametrize("name", OBJECTIVES)
def test_guidance_has_its_objectives_settings_unless_told(name: str) -> None:
    own = OBJECTIVES[name].settings
    given = Guidance(OBJECTIVES[name])
    fields = ("scale", "threshold", "iterations", "steps", "step_rule")
    assert [getattr(given, field) for field in fields] == [getattr(own, field) for field in fields]
    told = Guidance(OBJECTIVES[name], scale=3, threshold=0.25, iterations=2, steps=4, step_rule="variance")
    assert [getattr(told, field) for field in fields] == [3, 0.25, 2, 4, "variance"]
    # 0 is a value, not "unset"
    zero = Guidance(OBJECTIVES[name], scale=0, threshold=0, iterations=0, steps=0)
    assert [getattr(zero, field) for field in fields[:4]] == [0, 0, 0, 0]


def test_each_step_has_its_own_values_and_none_after_the_last() -> None:
    given = Guidance(scale=(3.0, 2.0, 1.0), threshold=(0.3, 0.2), iterations=(5, 0, 9), steps=2)
    assert [given.at(index) for index in range(4)] == [(3.0, 0.3, 5), (2.0, 0.2, 0), (0.0, 0.0, 0), (0.0, 0.0, 0)]
    assert Guidance(scale=7, iterations=2, steps=1).at(0) == (7, 0.2, 2)


@pytest.mark.parametrize(
    ("options", "acts"),
    [
        ({}, True),
        ({"scale": 0}, False),
        ({"iterations": 0}, False),
        ({"steps": 0}, False),
        ({"scale": (0, 1), "iterations": (1, 0), "steps": 2}, False),
        ({"scale": (0, 1), "iterations": (0, 1), "steps": 2}, True),
        ({"scale": (0, 1), "steps": 1}, False),
    ],
)
def test_guidance_knows_whether_it_can_act(options: dict, acts: bool) -> None:
    assert Guidance(**options).acts is acts


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "layout"}, "objective is 'layout'; expected one such as minidiff.layout_loss"),
        ({"objective": lambda maps, layout: 0}, "or your own function under @minidiff.objective"),
        ({"scale": -1}, "scale is -1; expected a number of at least 0"),
        ({"scale": math.inf}, "scale is inf"),
        ({"scale": math.nan}, "scale is nan"),
        ({"scale": True}, "scale is True"),
        ({"scale": "30"}, "scale is '30'"),
        ({"scale": (1.0, -1.0), "steps": 2}, r"scale is -1.0"),
        ({"scale": (1.0, 2.0), "steps": 3}, "scale holds 2 values for 3 guided steps; expected one per step"),
        ({"threshold": -0.1}, "threshold is -0.1"),
        ({"threshold": ()}, "threshold holds 0 values for 10 guided steps"),
        ({"iterations": 2.0}, "iterations is 2.0; expected a whole number from 0 to 1000"),
        ({"iterations": True}, "iterations is True"),
        ({"iterations": (1, 2)}, "iterations holds 2 values for 10 guided steps"),
        ({"steps": -1}, "steps is -1; expected how many of the first steps are guided"),
        ({"steps": 2.0}, "steps is 2.0"),
        ({"steps": 10**12}, "steps is 1000000000000; expected how many of the first steps are guided, 0 to 1000"),
        ({"steps": True}, "steps is True"),
        ({"step_rule": "sigma"}, "step_rule is 'sigma'; expected one of variance"),
    ],
)
def test_bad_guidance_is_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guidance(**options)


def test_guidance_reads_names_objectives_and_mappings() -> None:
    given = Guidance(minidiff.boxdiff_loss, scale=3.0)
    assert Guidance.read(given) is given
    assert Guidance.read(minidiff.rnb_loss) == Guidance(minidiff.rnb_loss)
    for name, objective in OBJECTIVES.items():
        assert Guidance.read(name) == Guidance(objective)
        assert Guidance.read({"objective": name, "steps": 3}) == Guidance(objective, steps=3)
    assert Guidance.read({}) == Guidance()
    assert Guidance.read({"scale": 5}) == Guidance(scale=5)
    read = Guidance.read(
        {"objective": {"boxdiff": 2, "layout": 0.5}, "scale": [3, 2], "iterations": [1, 4], "steps": 2}
    )
    both = 2 * minidiff.boxdiff_loss + 0.5 * minidiff.layout_loss
    assert read == Guidance(both, scale=(3, 2), iterations=(1, 4), steps=2)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("lay-out", "guidance is 'lay-out'; expected one of attend_and_excite, .* Did you mean 'layout'"),
        ({"objective": {"layout": 1, "box": 2}}, "guidance is 'box'"),
        ({"objective": {}}, "guidance has an empty objective"),
        ({"objective": ["layout"]}, r"guidance is [\[(]'layout'.*; expected one of .*layout"),
        ({"objective": {"layout": "2"}}, "'2'"),
        (
            {"strength": 3},
            r"guidance is \{'strength': 3\}; expected a minidiff.Guidance, an objective, one of .*layout",
        ),
        (3.0, "guidance is 3.0; expected a minidiff.Guidance"),
        ({"scale": -3}, "scale is -3"),
    ],
)
def test_guidance_that_cannot_be_read_is_named(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guidance.read(value)  # type: ignore[arg-type]


@minidiff.objective
def my_own(maps: Maps, layout: Layout) -> Tensor:
    """[B]"""
    return torch.stack([probs[..., 1].mean(dim=(1, 2, 3)) for probs in maps.values()]).mean(dim=0)


@pytest.mark.parametrize(
    "given",
    [
        *[Guidance(objective) for objective in OBJECTIVES.values()],
        Guidance(minidiff.boxdiff_loss * 3.0, scale=(3.0, 2.0), steps=2, iterations=7),
        Guidance(minidiff.inside_loss, passes=25, early=True, watch=True),
        Guidance(minidiff.rnb_loss + 0.25 * minidiff.layout_loss, threshold=0.5, step_rule="unit"),
    ],
    ids=lambda given: "+".join(term.name for term in given.objective.terms),
)
def test_guidance_is_read_back_from_plain_values(given: Guidance) -> None:
    assert Guidance.read(json.loads(json.dumps(given.plain()))) == given


@pytest.mark.parametrize(("name", "passes", "first"), [("inside", 25, 3), ("layout", 7, 1), ("refocusing", 50, 3)])
def test_passes_are_spread_over_the_guided_steps(name: str, passes: int, first: int) -> None:
    how = Guidance(OBJECTIVES[name], passes=passes, sites={SITE}).of_run(20, {})
    found = [how.at(i)[2] for i in range(20)]
    assert sum(found) == passes and found[0] == first and found == sorted(found, reverse=True)
    assert max(found) - min(found[: how.steps]) <= 1
    with pytest.raises(ValueError, match="passes is 0"):
        Guidance(passes=0)


@pytest.mark.parametrize(("passes", "steps"), [(25, 20), (7, 50), (100, 3)])
def test_early_passes_decline_linearly(passes: int, steps: int) -> None:
    how = Guidance(minidiff.inside_loss, passes=passes, early=True, sites={SITE}).of_run(steps, {})
    found = [how.at(i)[2] for i in range(steps)]
    guided = round(0.6 * steps)
    weights = [2 * (guided - i) - 1 if i < guided else 0 for i in range(steps)]
    assert sum(found) == passes
    assert all(abs(n - passes * weight / sum(weights)) <= 1 for n, weight in zip(found, weights, strict=True))
    with pytest.raises(ValueError, match="early is True without passes"):
        Guidance(early=True)


def test_what_plain_values_cannot_say_stays_as_it_is() -> None:
    twice = minidiff.layout_loss + minidiff.boxdiff_loss + minidiff.layout_loss  # one name, two weights
    for given in (Guidance(my_own), Guidance(twice), Guidance(sites=minidiff.cross & minidiff.level(0))):
        assert given.plain() is given


# ---- the rule, on a network small enough to follow by hand


def toy(
    x: Tensor, t: Tensor, context: Tensor, record: Record | None, edits: object, inputs: Inputs | None
) -> tuple[None, Maps]:
    """The latents' four channels are the logits of four tokens, at one site with one head."""
    assert record is not None
    assert inputs is not None
    probs = x.movedim(1, -1)[:, None].softmax(dim=-1)  # [B,1,h,w,4]
    return None, {SITE: record.keep(SITE, probs, inputs)}


def toy_guide(guidance: Guidance, regions: list[list[PlacedObject]], **options: object) -> Guide:
    layout = make_layout(regions, [2] * len(regions), 4, [(4, 6)])
    bound = replace(
        guidance,
        objective=replace(
            guidance.objective, terms=tuple(replace(term, sites=frozenset([SITE])) for term in guidance.objective.terms)
        ),
    )
    names = [[region.name for region in some] for some in regions]
    return Guide(bound, toy, torch.zeros(len(regions), 4, 8), layout, names, **options)  # type: ignore[arg-type]


def test_an_update_replaces_what_guidance_reads_and_adds_nothing() -> None:
    guide = toy_guide(Guidance(minidiff.layout_loss), [[BOXES[0]]])
    guide.update({"masks.4x6": torch.ones(1, 1, 4, 6), "segments.self": torch.ones(1, 24, 24)})
    guide.refine(torch.randn(1, 4, 4, 6), torch.tensor(500.0), 0.4, 0)
    assert "segments.self" not in guide.inputs and guide.inputs["masks.4x6"].min() == 1


def toy_loss(x: Tensor, region: PlacedObject) -> Tensor:
    """layout_loss of one image [4,4,6] with one object of one token."""
    probs = x.softmax(dim=0)[region.tokens[0]]
    return (1 - (region.coverage((4, 6)).float() * probs).sum() / probs.sum()) ** 2


BOXES = [
    PlacedObject("a", (1,), ((0.0, 0.0, 0.5, 0.5),)),
    PlacedObject("b", (2,), ((0.3, 0.1, 0.9, 0.8),)),
    PlacedObject("c", (1,), ((0.0, 0.3, 0.6, 1.0),)),
    PlacedObject("d", (3,), ((0.2, 0.2, 0.9, 0.9),)),
]


def by_hand(
    x: Tensor, region: PlacedObject, size: float, threshold: float, iterations: int
) -> tuple[Tensor, list[float]]:
    """One image guided alone: (its final latents, the loss at each evaluation)."""
    seen = []
    for _ in range(iterations):
        x = x.detach().requires_grad_()
        loss = toy_loss(x, region)
        seen.append(loss.item())
        if loss.item() <= threshold:
            break
        (gradient,) = torch.autograd.grad(loss, x)
        x = x - size * gradient
    return x.detach(), seen


@pytest.mark.parametrize("whole_batch", [False, True])
def test_each_image_stops_by_its_own_loss(whole_batch: bool) -> None:
    guidance = Guidance(scale=40.0, threshold=0.25, iterations=6, steps=1)
    guide = toy_guide(guidance, [[region] for region in BOXES], whole_batch=whole_batch)
    x = torch.randn(4, 4, 4, 6)
    found = guide.refine(x, torch.tensor(500.0), 0.4, 0)
    counts = []
    for i, region in enumerate(BOXES):
        expected, seen = by_hand(x[i], region, 40.0 * (1 - 0.4), 0.25, 6)
        torch.testing.assert_close(found[i], expected, rtol=1e-5, atol=1e-6)
        moves = len(seen) if seen[-1] > 0.25 else len(seen) - 1
        counts.append(moves)
        report = guide.report(i)
        assert report.iterations == (moves,)
        assert float(report.loss[0]) == pytest.approx(seen[-1], rel=1e-5)
        if moves == 0:
            assert torch.equal(found[i], x[i])
    assert len(set(counts)) >= 3  # else stopping would not be tested
    assert 0 in counts


def test_each_step_has_its_own_layout() -> None:
    guidance = Guidance(scale=40.0, threshold=0.0, iterations=2, steps=2)
    x, t = torch.randn(1, 4, 4, 6), torch.tensor(500.0)
    first, second = (toy_guide(guidance, [[BOXES[i]]]) for i in (0, 1))
    absent = toy_guide(guidance, [[replace(BOXES[0], tokens=())]])
    told = [(one.context, one.layout, one.inputs) for one in (first, second, absent)]
    guide = toy_guide(replace(guidance, steps=3), [[BOXES[0]]], each_step=told)
    assert torch.equal(guide.refine(x, t, 0.4, 1), second.refine(x, t, 0.4, 1))
    assert torch.equal(guide.refine(x, t, 0.4, 0), first.refine(x, t, 0.4, 0))
    assert torch.equal(guide.refine(x, t, 0.4, 2), x)  # a text without the phrase


def test_a_whole_batch_is_the_same_as_a_shrinking_one() -> None:
    guidance = Guidance(scale=40.0, threshold=0.25, iterations=6, steps=3)
    x = torch.randn(4, 4, 4, 6)
    regions = [[BOXES[0], BOXES[3]], [BOXES[1]], [BOXES[2]], [BOXES[3]]]
    ends, reports = [], []
    for whole_batch in (False, True):
        guide = toy_guide(guidance, regions, whole_batch=whole_batch)
        moved = x
        for index in range(4):
            moved = guide.refine(moved, torch.tensor(500.0), 0.2 + 0.2 * index, index)
        ends.append(moved)
        reports.append([guide.report(i) for i in range(4)])
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-6)
    assert not torch.equal(ends[0], x)
    for shrinking, whole in zip(*reports, strict=True):
        assert (shrinking.steps, shrinking.iterations, shrinking.why_not is None) == (
            whole.steps,
            whole.iterations,
            whole.why_not is None,
        )
        torch.testing.assert_close(shrinking.loss, whole.loss)
        torch.testing.assert_close(shrinking.mass, whole.mass)


@pytest.mark.parametrize("whole_batch", [False, True])
def test_a_stopped_image_is_looked_at_no_more(whole_batch: bool) -> None:
    """`Evaluation` holds NaN for images that had stopped, and a report's loss is that of the evaluation that stopped
    it, whether or not stopped images stay in the batch.
    """
    guidance = Guidance(scale=40.0, threshold=0.25, iterations=6, steps=1)
    guide = toy_guide(guidance, [[region] for region in BOXES], whole_batch=whole_batch)
    guide.refine(torch.randn(4, 4, 4, 6), torch.tensor(500.0), 0.4, 0)
    looks = guide.seen[0]
    for i in range(4):
        stopped = [k for k, look in enumerate(looks) if not look.moved[i]]
        if stopped:
            assert not looks[stopped[0]].loss[i].isnan()
            assert all(look.loss[i].isnan() for look in looks[stopped[0] + 1 :])
    assert sum(not look.moved.all() for look in looks) >= 2


@pytest.mark.parametrize("whole_batch", [False, True])
def test_an_image_without_boxes_is_not_guided(whole_batch: bool) -> None:
    guidance = Guidance(scale=40.0, threshold=0.25, iterations=2, steps=1)
    guide = toy_guide(guidance, [[BOXES[0]], []], whole_batch=whole_batch)
    x = torch.randn(2, 4, 4, 6)
    found = guide.refine(x, torch.tensor(500.0), 0.4, 0)
    assert torch.equal(found[1], x[1])
    assert not torch.equal(found[0], x[0])
    assert str(guide.report(1)) == "guidance did not act: there are no boxes"


def test_stopping_is_judged_afresh_at_each_step() -> None:
    guide = toy_guide(Guidance(scale=40.0, threshold=0.3, iterations=9, steps=2), [[BOXES[0]]])
    x = torch.randn(1, 4, 4, 6)
    moved = guide.refine(x, torch.tensor(900.0), 0.1, 0)
    assert toy_loss(moved[0], BOXES[0]) <= 0.3
    assert torch.equal(guide.refine(moved, torch.tensor(800.0), 0.2, 1), moved)  # still under the threshold
    again = guide.refine(x, torch.tensor(800.0), 0.2, 1)  # the latents are bad again
    assert not torch.equal(again, x)
    assert torch.equal(guide.refine(x, torch.tensor(700.0), 0.3, 2), x)  # after the last guided step


@pytest.mark.parametrize("whole_batch", [False, True])
def test_an_image_that_is_no_number_leaves_the_others_alone(whole_batch: bool) -> None:
    guidance = Guidance(scale=40.0, threshold=0.3, iterations=3, steps=1)
    x = torch.randn(2, 4, 4, 6)
    expected = toy_guide(guidance, [[BOXES[0]], [BOXES[1]]]).refine(x, torch.tensor(500.0), 0.4, 0)
    x[1] = math.nan
    found = toy_guide(guidance, [[BOXES[0]], [BOXES[1]]], whole_batch=whole_batch).refine(
        x, torch.tensor(500.0), 0.4, 0
    )
    torch.testing.assert_close(found[0], expected[0])
    assert found[1].isnan().all()


def test_thresholds_and_scales_of_each_step_are_used() -> None:
    guidance = Guidance(scale=(10.0, 30.0), threshold=(0.0, 10.0), iterations=(2, 3), steps=2)
    guide = toy_guide(guidance, [[BOXES[0]]])
    x = torch.randn(1, 4, 4, 6)
    expected, seen = by_hand(x[0], BOXES[0], 10.0 * 0.75, 0.0, 2)
    found = guide.refine(x, torch.tensor(500.0), 0.25, 0)
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(guide.refine(x, torch.tensor(500.0), 0.25, 1), x)  # no loss is above 10
    assert [look.loss.item() for look in guide.seen[0]] == pytest.approx(seen)
    assert [look.moved.item() for look in guide.seen[1]] == [False]


# ---- the rule, on the tiny network


def prepared(model: Model, guidance: Guidance, h: int = 8, w: int = 8) -> tuple[Guide, Tensor]:
    """Two images with two and one objects, and their latents."""
    there = model.unet.positions(h, w)
    regions = [[BOXES[0], BOXES[1]], [BOXES[2]]]
    layout = make_layout(regions, [4, 4], 77, {at.grid for at in there.values()})
    bound = replace(guidance, objective=guidance.objective.bound(there, guidance.sites))
    context = torch.randn(2, 77, 64)
    return Guide(bound, model.unet.forward, context, layout, [["a", "b"], ["c"]]), torch.randn(2, 4, h, w)


def test_a_look_does_not_ask_how_the_latents_came_about(tiny_model: Model) -> None:
    """Otherwise the compiler would include second derivatives."""
    guide, x = prepared(tiny_model, Guidance())
    gradient, found = guide.look(x.requires_grad_(), torch.tensor(600.0), 0.4, range(2), 0, None)
    assert gradient is not None
    assert not any(value.requires_grad for value in (gradient, *found))


@pytest.mark.parametrize("whole_batch", [False, True])
def test_a_look_that_moves_nothing_runs_no_pass_back(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch, whole_batch: bool
) -> None:
    """Half of all looks, in a run: each step's last. One per move of the slower image is left."""
    guide, x = prepared(tiny_model, Guidance(scale=300.0, iterations=4, steps=1))
    guide.whole_batch = whole_batch
    first = evaluate(
        x,
        guide.forward,
        guide.guidance.objective,
        guide.record,
        (),
        torch.tensor(600.0),
        guide.context,
        guide.layout,
        guide.inputs,
    )[1][0]
    guide.guidance = replace(guide.guidance, threshold=float(first.max()) * 0.999)
    calls = []
    real = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *given, **more: calls.append(given) or real(*given, **more))
    guide.refine(x, torch.tensor(600.0), 0.36, 0)
    looks = guide.seen[0]
    assert len(calls) == sum(bool(look.moved.any()) for look in looks) > 0
    assert not looks[-1].moved.any() or len(looks) == 4
    guide.guidance = replace(guide.guidance, threshold=float(first.max()) * 1.001)
    assert torch.equal(guide.refine(x, torch.tensor(600.0), 0.36, 1 - 1), x)
    assert len(calls) == sum(bool(look.moved.any()) for look in guide.seen[0])


@pytest.mark.parametrize("name", PLACED)
@pytest.mark.parametrize("rule", ["variance", "plain", "unit"])
def test_one_move_equals_the_rule_by_hand(tiny_model: Model, name: str, rule: str) -> None:
    guidance = Guidance(OBJECTIVES[name], scale=300.0, threshold=0.0, iterations=1, steps=1, step_rule=rule)
    guide, x = prepared(tiny_model, guidance)
    found = guide.refine(x, torch.tensor(600.0), 0.36, 0)
    leaf = x.clone().requires_grad_()
    record = replace(guide.record, stop=False)
    _, maps = tiny_model.unet(leaf, torch.tensor(600.0), guide.context, record, (), guide.layout.inputs())
    losses = guide.guidance.objective(maps, guide.layout)
    expected = x.clone()
    for i in range(2):
        (gradient,) = torch.autograd.grad(losses[i], leaf, retain_graph=True)
        assert gradient[i].abs().max() > 0
        assert gradient[1 - i].abs().max() == 0
        if rule == "plain":
            expected[i] -= 300.0 * gradient[i]
        elif rule == "variance":
            expected[i] -= 300.0 * (1 - 0.36) * gradient[i]
        else:  # a root mean square of one
            expected[i] -= 300.0 * (1 - 0.36) * gradient[i] / gradient[i].square().mean().sqrt()
    assert relative_error(found - x, expected - x) <= 1e-4
    torch.testing.assert_close(guide.seen[0][0].loss, losses.detach(), rtol=1e-5, atol=1e-6)


def test_nothing_runs_behind_the_last_recorded_site(tiny_model: Model) -> None:
    guide, x = prepared(tiny_model, Guidance(scale=10.0, threshold=0.0, iterations=2, steps=1))
    ran: list[str] = []
    modules = tiny_model.unet.named_modules()
    hooks = [module.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, module in modules]
    guide.refine(x, torch.tensor(600.0), 0.4, 0)
    for hook in hooks:
        hook.remove()
    key = Site("up", 1, 2, "cross").key  # the last of layout_loss
    assert ran.count(f"{key}.to_out.0") == 2
    leaves = [name for name in ran if name and not key.startswith(name)]
    assert leaves[-1] == f"{key}.to_out.0"
    assert not any(name.startswith(("up_blocks.2", "conv_out", "up_blocks.1.upsamplers")) for name in ran)
    assert {"up_blocks.0.resnets.0", "mid_block.resnets.1"} <= set(ran)


def test_weights_get_no_gradient_and_stay_as_they_are(tiny_model: Model) -> None:
    before = {name: value.clone() for name, value in tiny_model.unet.state_dict().items()}
    minidiff.generate("a cat", model=tiny_model, steps=3, seed=1, boxes=CAT, guidance=STRONG, output="latents")
    after = tiny_model.unet.state_dict()
    for name, value in tiny_model.unet.named_parameters():
        assert value.grad is None
        assert not value.requires_grad
        assert torch.equal(after[name], before[name])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_guidance_works_in_the_callers_modes(tiny_model: Model, mode: type) -> None:
    shared = {"model": tiny_model, "steps": 3, "seed": 1, "boxes": CAT, "guidance": STRONG, "output": "latents"}
    expected = minidiff.generate("a cat", **shared)
    with mode():
        found = minidiff.generate("a cat", **shared)
    # In inference mode the gradient comes from torch.func, which adds in another order.
    torch.testing.assert_close(found.latents, expected.latents, rtol=1e-4, atol=1e-4)
    assert mode is torch.inference_mode or torch.equal(found.latents, expected.latents)


def test_latents_that_come_out_hold_no_graph(tiny_model: Model) -> None:
    for step in minidiff.sample_steps("a cat", model=tiny_model, steps=2, seed=1, boxes=CAT, guidance=STRONG):
        assert torch.is_grad_enabled()
        assert not step.latents.requires_grad
        assert all(not look.loss.requires_grad and not look.mass.requires_grad for look in step.report)


# ---- batches


PROMPTS = [
    "a cat",
    "two dogs and a ball",
    "a red circle",
    "a blue square on a table",
    "a house",
    "a bird in a tree",
    "the sea",
    "one apple",
]
LAYOUTS: list[dict | None] = [
    {"cat": (0.1, 0.1, 0.7, 0.6)},
    {"dogs": (0, 0, 0.5, 0.75), "ball": {"boxes": (0.5, 0.25, 1, 0.85), "weight": 0.7}},
    {"red circle": (0.2, 0.3, 0.7, 0.95)},
    {"square": (0.3, 0.05, 0.9, 0.7), "table": (0, 0.4, 1, 1)},
    {"house": [(0.25, 0.25, 0.6, 0.75), (0.5, 0.3, 0.95, 0.7)]},
    {"bird": (0, 0, 0.6, 0.6), "tree": (0.4, 0.1, 1, 0.8), "a": (0, 0, 0.3, 1)},
    None,
    {"apple": (0.3, 0.2, 0.75, 0.9)},
]


@pytest.mark.slow
def test_a_batch_of_eight_equals_eight_single_runs(tiny_model: Model) -> None:
    guidance = Guidance(scale=2000.0, threshold=0.42, iterations=5, steps=3)
    shared = {"model": tiny_model, "steps": 4, "sampler": "ddim", "guidance": guidance}
    run = minidiff.sample_steps(PROMPTS, seed=1, boxes=LAYOUTS, output="latents", **shared)
    steps = list(run)
    looks = torch.stack([look.loss for step in steps for look in step.report])
    # with a loss at the threshold, rounding would decide
    assert (looks - 0.42).abs()[~looks.isnan()].min() > 1e-4
    batch = run.result()
    for i in range(8):
        own = shared if LAYOUTS[i] else {**shared, "guidance": None}
        alone = minidiff.generate(PROMPTS[i], seed=1 + i, boxes=LAYOUTS[i], output="latents", **own)
        assert relative_error(batch.latents[i], alone.latents[0]) <= 1e-4
        report = batch.reports[i]
        if LAYOUTS[i] is None:
            assert alone.reports is None
            assert report.iterations == ()
        else:
            assert report.iterations == alone.reports[0].iterations
            torch.testing.assert_close(report.mass, alone.reports[0].mass, rtol=1e-4, atol=1e-5)
    counts = {report.iterations for report in batch.reports}
    assert len(counts) >= 4  # else all stop at the same evaluation
    assert (0, 0, 0) in counts
    assert any(0 < report.iterations[0] < 5 for report in batch.reports if report.iterations)


@pytest.mark.parametrize(
    "name", [name if name in ("layout", "boxdiff") else pytest.param(name, marks=pytest.mark.slow) for name in PLACED]
)
def test_an_image_of_a_batch_equals_the_image_alone_under_every_objective(tiny_model: Model, name: str) -> None:
    guidance = Guidance(OBJECTIVES[name], scale=20.0, threshold=0.0, iterations=2, steps=2)
    shared = {"model": tiny_model, "steps": 3, "sampler": "euler", "guidance": guidance, "output": "latents"}
    some = [1, 4, 5]
    batch = minidiff.generate([PROMPTS[i] for i in some], seed=1, boxes=[LAYOUTS[i] for i in some], **shared)
    plain = minidiff.generate([PROMPTS[i] for i in some], seed=1, **{**shared, "guidance": "none"})
    for k, i in enumerate(some):
        alone = minidiff.generate(PROMPTS[i], seed=1 + k, boxes=LAYOUTS[i], **shared)
        assert relative_error(batch.latents[k], alone.latents[0]) <= 1e-4
        assert relative_error(batch.latents[k], plain.latents[k]) > 1e-3


def test_images_of_a_prompt_share_its_boxes(tiny_model: Model) -> None:
    shared = {"model": tiny_model, "steps": 3, "sampler": "lms", "guidance": STRONG, "output": "latents"}
    prompts, boxes = ["a cat", "two dogs"], [CAT, {"dogs": (0, 0.5, 1, 1)}]
    batch = minidiff.generate(prompts, boxes=boxes, seed=5, images_per_prompt=2, **shared)
    for i in range(4):
        alone = minidiff.generate(prompts[i // 2], boxes=boxes[i // 2], seed=5 + i, **shared)
        assert relative_error(batch.latents[i], alone.latents[0]) <= 1e-4
    assert [report.names for report in batch.reports] == [("cat",), ("cat",), ("dogs",), ("dogs",)]


# ---- when it is off


@pytest.mark.parametrize(
    "options",
    [
        {"boxes": CAT, "guidance": "none"},
        {"boxes": CAT, "guidance": Guidance(iterations=0)},
        {"boxes": CAT, "guidance": Guidance(steps=0)},
        {"boxes": CAT, "guidance": Guidance(scale=0)},
        {"boxes": CAT, "guidance": Guidance(threshold=10.0)},
    ],
    ids=[
        "none",
        "no iterations",
        "no steps",
        "no scale",
        "high threshold",
    ],
)
@pytest.mark.parametrize("sampler", ["pndm", "euler_ancestral"])
def test_no_guidance_changes_no_bit(tiny_model: Model, sampler: str, options: dict) -> None:
    shared = {"model": tiny_model, "steps": 3, "sampler": sampler, "seed": 1, "output": "latents"}
    plain = minidiff.generate("a cat", **shared)
    found = minidiff.generate("a cat", **shared, **options)
    assert torch.equal(found.latents, plain.latents)


def test_an_image_without_boxes_in_a_batch_is_not_moved(tiny_model: Model) -> None:
    shared = {"model": tiny_model, "steps": 3, "sampler": "ddim", "seed": 1, "output": "latents"}
    plain = minidiff.generate(["a cat", "a dog", "a cat"], **shared)
    found = minidiff.generate(["a cat", "a dog", "a cat"], boxes=[CAT, None, {}], guidance=STRONG, **shared)
    assert torch.equal(found.latents[1:], plain.latents[1:])
    assert relative_error(found.latents[:1], plain.latents[:1]) > 1e-2


def test_a_phrase_without_a_place_is_enough_where_no_box_is_read(tiny_model: Model) -> None:
    shared = {
        "model": tiny_model,
        "steps": 1,
        "spacing": "trailing",
        "seed": 1,
        "output": "latents",
        "boxes": {"cat": None},
    }
    found = minidiff.generate(
        "a cat", guidance=Guidance(minidiff.attend_and_excite_loss, scale=500.0, threshold=0.0), **shared
    )
    assert relative_error(found.latents, minidiff.generate("a cat", guidance="none", **shared).latents) > 1e-4
    (report,) = found.reports
    assert report.mass.isnan().all() and "inside" not in str(report) and "guidance moved" in str(report)
    said = found.plain()["images"][0]["report"]
    assert said["names"] == ["cat"] and said["mass"][0] == [None] and said["loss"] == report.loss.tolist()
    assert json.loads(json.dumps(found.plain(), allow_nan=False)) == found.plain()
    assert found.parameters[0]["boxes"] == {"cat": {"weight": 1.0, "boxes": None}}
    with pytest.raises(
        ValueError, match=r"boxes\['cat'\] has no box or mask, which guidance needs; .*attend_and_excite"
    ):
        minidiff.generate("a cat", guidance="layout", **shared)


# ---- samplers, sizes, options


@pytest.mark.parametrize(
    "sampler",
    [pytest.param(name, marks=[pytest.mark.slow] if name.endswith("_cfg_pp") else []) for name in SAMPLERS],
)
def test_every_sampler_is_guided(tiny_model: Model, sampler: str) -> None:
    shared = {"model": tiny_model, "steps": 5, "sampler": sampler, "seed": 1, "output": "latents", "boxes": CAT}
    found = minidiff.generate("a cat", guidance=STRONG, **shared)
    plain = minidiff.generate("a cat", guidance="none", **shared)
    assert found.latents.isfinite().all()
    assert relative_error(found.latents, plain.latents) > 1e-2
    assert found.reports[0].steps == (0, 1)
    assert sum(found.reports[0].iterations) == (6 if sampler == "pndm" else 4)  # pndm calls its first step twice
    assert found.reports[0].mass[0, 0] > found.reports[0].first_mass[0]


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if not name.endswith("_cfg_pp")])
def test_one_rule_moves_what_the_network_sees_with_every_sampler(tiny_model: Model, sampler: str) -> None:
    """x_vp - scale * (1 - abar) * grad, with abar of the sampler's own sigma."""
    guidance = Guidance(scale=500.0, threshold=0.0, iterations=1, steps=1)
    shared = {"model": tiny_model, "steps": 1, "sampler": sampler, "spacing": "trailing", "seed": 1, "boxes": CAT}
    seen: list[tuple[Tensor, Tensor]] = []
    # guidance calls forward directly, so the hook sees only the sampler's calls
    handle = tiny_model.unet.register_forward_pre_hook(lambda _, args: seen.append((args[0][-1:], args[1])))
    (plain,) = minidiff.sample_steps("a cat", guidance="none", **shared)
    (step,) = minidiff.sample_steps("a cat", guidance=guidance, **shared)
    handle.remove()
    (x, t), (moved, _) = seen
    guide, _ = prepared(tiny_model, guidance)
    find = tiny_model.text.all_spans("a cat", "cat")
    layout = make_layout([[PlacedObject("cat", find, (CAT["cat"],))]], [2], 77, list(guide.layout.masks))
    objective = guide.guidance.objective
    record = replace(objective.record, stop=False)
    leaf = x.clone().requires_grad_()
    context = tiny_model.text.encode(["a cat"])
    (loss,) = objective(tiny_model.unet(leaf, t, context, record, (), layout.inputs())[1], layout)
    (gradient,) = torch.autograd.grad(loss, leaf)
    expected = -500.0 * (1 - 1 / (1 + step.sigma**2)) * gradient
    assert relative_error(moved - x, expected) <= 1e-3
    # the update reaches the sampler's state, not only the network's input: at this noise the output hardly changes
    assert relative_error(step.latents, plain.latents) > 1e-3


def test_what_is_moved_is_the_samplers_state(tiny_model: Model) -> None:
    """With a network that predicts 0, the displacement is preserved: x after the step is displaced."""
    guidance = Guidance(scale=500.0, threshold=0.0, iterations=1, steps=1)
    handle = tiny_model.unet.conv_out.register_forward_hook(lambda _, __, out: torch.zeros_like(out))
    displaced = {}
    latents = torch.randn(1, 4, 8, 8)
    for sampler in ("ddim", "pndm", "euler", "lms", "dpmpp_2m"):
        shared = {"model": tiny_model, "steps": 1, "sampler": sampler, "spacing": "trailing", "latents": latents}
        (moved,) = minidiff.sample_steps("a cat", boxes=CAT, guidance=guidance, **shared)
        (plain,) = minidiff.sample_steps("a cat", boxes=CAT, guidance="none", **shared)
        displaced[sampler] = moved.denoised - plain.denoised
        # at sigma 0 the latents are the clean ones; pndm and ddim end at the first training level
        assert relative_error(moved.latents - plain.latents, displaced[sampler]) <= 1e-2
    handle.remove()
    for sampler, one in displaced.items():
        # samplers that start at sqrt(1 + sigma^2) have latents 0.2 % larger than the others
        assert relative_error(one, displaced["ddim"]) <= 2e-2, sampler


@pytest.mark.parametrize(("width", "height"), [(48, 24), (20, 44), (32, 4)])
def test_sizes_that_are_not_square_or_even(tiny_model: Model, width: int, height: int) -> None:
    shared = {"model": tiny_model, "steps": 2, "seed": 1, "sampler": "ddim", "output": "latents", "boxes": CAT}
    there = tiny_model.unet.positions(8, 8)
    for objective in OBJECTIVES.values():
        guidance = Guidance(objective, threshold=0.0, iterations=1, steps=1)
        found = minidiff.generate("a cat", width=width, height=height, guidance=guidance, **shared)
        assert found.latents.shape == (1, 4, height // 4, width // 4)
        assert found.latents.isfinite().all()
        if any(site.kind == "cross" for site in objective.bound(there).sites):  # else no mass is known
            assert 0 <= found.reports[0].mass.min() <= found.reports[0].mass.max() <= 1


@pytest.mark.parametrize(
    "name",
    [name if name in ("layout", "boxdiff", "rnb") else pytest.param(name, marks=pytest.mark.slow) for name in PLACED],
)
@pytest.mark.parametrize(
    ("prompt", "boxes"),
    [
        ("a cat", {"cat": (0, 0, 1, 1)}),
        ("a cat", {"cat": (0.49, 0.49, 0.5, 0.5)}),
        ("a cat", {"cat": (0.999, 0.999, 1, 1), "a": (0, 0, 0.001, 1)}),
        ("a cat and a cat", {"cat": (0, 0, 0.5, 1)}),
        ("a b c d e f g h", {word: (0.1 * i, 0.05 * i, 0.1 * i + 0.3, 1) for i, word in enumerate("abcdefgh")}),
        ("a cat and a dog", {"cat": (0.2, 0.2, 0.8, 0.8), "dog": (0.2, 0.2, 0.8, 0.8)}),
    ],
    ids=["whole", "tiny", "corner", "twice", "eight", "same"],
)
def test_layouts_at_the_limits_are_guided_through_the_network(
    tiny_model: Model, name: str, prompt: str, boxes: dict
) -> None:
    guidance = Guidance(OBJECTIVES[name], threshold=0.0, iterations=1, steps=1)
    shared = {"model": tiny_model, "steps": 2, "sampler": "ddim", "seed": 1, "width": 48, "boxes": boxes}
    found = minidiff.generate(prompt, guidance=guidance, output="latents", **shared)
    plain = minidiff.generate(prompt, guidance="none", output="latents", **shared)
    assert found.latents.isfinite().all()
    assert found.reports[0].loss.isfinite().all()
    assert found.reports[0].mass.shape == (1, len(boxes))
    whole = list(boxes.values()) == [(0, 0, 1, 1)]
    still = (
        "layout",
        "rnb",
        "tradiffusion",
        "self_refocusing",
        "bounded_attention",
    )  # no improvement is possible there
    if not (whole and name in still):
        assert not torch.equal(found.latents, plain.latents)


def test_the_negative_prompt_has_no_part_in_the_guided_pass(tiny_model: Model) -> None:
    shared = {"model": tiny_model, "steps": 2, "sampler": "ddim", "seed": 1, "boxes": CAT, "guidance": STRONG}
    looks = {}
    for negative, scale in (("", 7.5), ("blurry, text", 7.5), ("", 1.0)):
        step, *_ = minidiff.sample_steps("a cat", negative_prompt=negative, guidance_scale=scale, **shared)
        looks[negative, scale] = torch.cat([look.loss for look in step.report])
    for found in looks.values():
        assert torch.equal(found, looks["", 7.5])
    rows: list[int] = []
    handle = tiny_model.unet.conv_in.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    minidiff.generate("a cat", output="latents", **shared)
    handle.remove()
    assert rows == [1, 1, 2, 1, 1, 2]


def test_token_positions_go_with_a_context(tiny_model: Model) -> None:
    shared = {"model": tiny_model, "steps": 2, "sampler": "ddim", "seed": 1, "guidance": STRONG, "output": "latents"}
    prompt = "a cat and a red ball"
    tokens = tiny_model.text.all_spans(prompt, "red ball")
    assert len(tokens) == 2
    expected = minidiff.generate(prompt, boxes={"red ball": (0.5, 0.5, 1, 1)}, **shared)
    context = tiny_model.text.encode([prompt])
    for key in (tokens, f"tokens:{tokens[0]},{tokens[1]}"):
        found = minidiff.generate(context=context, boxes={key: (0.5, 0.5, 1, 1)}, **shared)
        torch.testing.assert_close(found.latents, expected.latents, rtol=1e-5, atol=1e-5)
        assert found.reports[0].names == (f"tokens:{tokens[0]},{tokens[1]}",)
    with pytest.raises(ValueError, match="boxes has the key 'red ball' but there is no prompt; expected token posi"):
        minidiff.generate(context=context, boxes={"red ball": (0.5, 0.5, 1, 1)}, **shared)


def test_the_sites_can_be_chosen(tiny_model: Model) -> None:
    shared = {"model": tiny_model, "steps": 1, "sampler": "ddim", "spacing": "trailing", "seed": 1, "boxes": CAT}
    coarse = Guidance(scale=10.0, threshold=0.0, iterations=1, sites=minidiff.cross & minidiff.place("mid"))
    ran: list[str] = []
    modules = tiny_model.unet.named_modules()
    hooks = [m.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, m in modules]
    steps = minidiff.sample_steps("a cat", guidance=coarse, **shared)
    (step,) = steps
    for hook in hooks:
        hook.remove()
    # the guided pass ends in the mid block, before the sampler's own call starts
    assert ran.count("mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0") == 2
    assert ran.count("up_blocks.0.resnets.0") == 1
    assert step.report[0].moved.all()
    with pytest.raises(ValueError, match="no attention site matches .*; expected a choice from down.0.0.self"):
        minidiff.sample_steps("a cat", guidance=replace(coarse, sites=minidiff.level(7)), **shared)


def test_an_objective_may_read_any_kind_of_attention(tiny_model: Model) -> None:
    """A user's objective on self-attention maps [B,H,h,w,h*w], or on kept columns, works like any other."""
    shared = {"model": tiny_model, "steps": 2, "sampler": "ddim", "seed": 1, "boxes": CAT, "output": "latents"}
    plain = minidiff.generate("a cat", guidance="none", **shared)
    for objective in (of_columns, of_pixels, of_pixels + minidiff.layout_loss):
        guidance = Guidance(objective, scale=1000.0, threshold=0.0, iterations=1, steps=1)
        found = minidiff.generate("a cat", guidance=guidance, **shared)
        assert found.latents.isfinite().all()
        assert not torch.equal(found.latents, plain.latents)


@minidiff.objective(keep=minidiff.COLUMNS)
def of_columns(maps: Maps, layout: Layout) -> Tensor:
    """[B]"""
    return torch.stack([kept.square().mean(dim=(1, 2, 3, 4)) for kept in maps.values()]).mean(dim=0)


@minidiff.objective(sites=minidiff.self_ & minidiff.level(0))
def of_pixels(maps: Maps, layout: Layout) -> Tensor:
    """[B]"""
    return torch.stack([probs.square().mean(dim=(1, 2, 3, 4)) for probs in maps.values()]).mean(dim=0)


# ---- reports


def test_reports_say_what_was_done(tiny_model: Model) -> None:
    shared = {"model": tiny_model, "sampler": "ddim", "seed": 1}
    boxes = [{"cat": (0, 0, 0.5, 1), "ball": (0.5, 0.4, 1, 0.9)}, None, {"dogs": (0.2, 0.2, 0.7, 0.9)}]
    prompts = ["a cat and a ball", "a house", "two dogs"]
    guidance = Guidance(scale=1000.0, threshold=0.0, iterations=(3, 1, 2), steps=3)
    run = minidiff.sample_steps(prompts, boxes=boxes, guidance=guidance, steps=5, output="latents", **shared)
    *steps, last = run
    first, none, third = run.result().reports
    assert first.names == ("cat", "ball")
    assert first.steps == third.steps == (0, 1, 2)
    assert first.iterations == third.iterations == (3, 1, 2)
    assert first.loss.shape == (3,)
    assert first.object_loss.shape == first.mass.shape == (3, 2)
    assert first.first_mass.shape == (2,)
    assert third.mass.shape == (3, 1)
    for report in (first, third):
        assert report.why_not is None
        assert min(report.mass.min(), report.first_mass.min()) >= 0
        assert max(report.mass.max(), report.first_mass.max()) <= 1
        torch.testing.assert_close(report.loss, report.object_loss.mean(dim=1))
        assert str(report).startswith("guidance moved 6 times in 3 steps; ")
    before, after = float(first.first_mass[1]), float(first.mass[-1, 1])
    assert f"ball: {before:.0%} -> {after:.0%} of its attention inside" in str(first)
    assert none.names == ()
    assert str(none) == "guidance did not act: there are no boxes"
    # each step's own evaluations
    counts = [len(step.report) for step in (*steps, last)]
    assert counts == [3, 1, 2, 0, 0]
    look = steps[0].report[0]
    assert look.loss.shape == look.moved.shape == (3,)
    assert look.loss[1].isnan()
    assert look.moved.tolist() == [True, False, True]
    assert look.object_loss.shape == look.mass.shape == (3, 2)
    torch.testing.assert_close(steps[0].report[0].mass[0], first.first_mass)
    torch.testing.assert_close(steps[0].report[-1].mass[0], first.mass[0])


def test_a_report_says_why_nothing_was_moved(tiny_model: Model) -> None:
    shared = {"model": tiny_model, "steps": 2, "seed": 1, "output": "latents", "boxes": CAT}
    (idle,) = minidiff.generate("a cat", guidance=Guidance(iterations=0), **shared).reports
    assert str(idle) == "guidance did not act: iterations, steps or scale is 0"
    (content,) = minidiff.generate("a cat", guidance=Guidance(threshold=(0.9, 0.8), steps=2), **shared).reports
    assert content.iterations == (0, 0)
    text = f"guidance did not act: its loss was at most {content.loss.max():.3g}, its threshold at least 0.8"
    assert str(content) == text
    with_none = minidiff.generate(["a cat", "a dog"], **{**shared, "boxes": [CAT, None]}).reports
    assert str(with_none[1]) == "guidance did not act: there are no boxes"
    assert minidiff.generate("a cat", guidance="none", **shared).reports is None
    assert minidiff.generate("a cat", **{**shared, "boxes": None}).reports is None


def test_a_scale_of_zero_is_no_move(tiny_model: Model) -> None:
    shared = {"model": tiny_model, "steps": 2, "seed": 1, "output": "latents", "boxes": CAT}
    (report,) = minidiff.generate("a cat", guidance=Guidance(scale=0, threshold=0), **shared).reports
    assert str(report) == "guidance did not act: iterations, steps or scale is 0"


def test_a_report_before_the_run_says_so(tiny_model: Model) -> None:
    guide, _ = prepared(tiny_model, Guidance())
    assert str(guide.report(0)) == "guidance did not act: no step has been guided yet"


def test_the_mass_inside_is_that_of_the_recorded_maps(tiny_model: Model) -> None:
    guide, x = prepared(tiny_model, Guidance(scale=10.0, threshold=0.0, iterations=1, steps=1))
    guide.refine(x, torch.tensor(600.0), 0.4, 0)
    record = Record(guide.guidance.objective.sites, minidiff.ALL, rows="all")
    _, maps = tiny_model.unet(x, torch.tensor(600.0), guide.context, record)
    for image, regions in enumerate([[BOXES[0], BOXES[1]], [BOXES[2]]]):
        for o, region in enumerate(regions):
            shares = []
            for probs in maps.values():
                mask = region.coverage(tuple(probs.shape[2:4])).float()
                of_token = probs[image, ..., region.tokens[0]]
                shares.append(((mask * of_token).sum((1, 2)) / of_token.sum((1, 2))).mean())
            torch.testing.assert_close(guide.seen[0][0].mass[image, o], torch.stack(shares).mean())


def test_a_guided_image_is_made_again_from_its_parameters(tiny_model: Model) -> None:
    guidance = Guidance(minidiff.layout_loss + 0.5 * minidiff.boxdiff_loss, scale=(900.0, 300.0), threshold=0, steps=2)
    result = minidiff.generate(
        PROMPTS[:2], model=tiny_model, steps=3, seed=1, boxes=LAYOUTS[:2], guidance=guidance, output="latents"
    )
    for i, parameters in enumerate(result.parameters):
        again = minidiff.generate(**json.loads(json.dumps(parameters)) | {"model": tiny_model, "output": "latents"})
        assert relative_error(again.latents[0], result.latents[i]) <= 1e-4
        assert again.reports[0].iterations == result.reports[i].iterations


def test_bad_boxes_and_guidance_are_named_before_the_network_runs(tiny_model: Model) -> None:
    ran: list[object] = []
    handle = tiny_model.unet.register_forward_pre_hook(lambda *_: ran.append(1))
    for options, message in (
        ({"boxes": {"dog": (0, 0, 1, 1)}}, "phrase 'dog' is not in the prompt 'a cat'.* The prompt's words: a, cat"),
        ({"boxes": [CAT, CAT]}, "boxes holds 2 layouts for 1 prompts; expected one for all, or one per prompt"),
        ({"boxes": CAT, "guidance": "worst"}, "guidance is 'worst'; expected one of .*layout"),
        ({"boxes": CAT, "guidance": {"scale": -1}}, "scale is -1"),
        ({"guidance": "worst"}, "guidance is 'worst'"),  # without boxes too
    ):
        with pytest.raises(ValueError, match=message):
            minidiff.generate("a cat", model=tiny_model, steps=2, **options)
    handle.remove()
    assert not ran


# ---- compiled


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """Counts the graphs of torch.compile, without the slow code generation."""
    counting, original = CompileCounterWithBackend("aot_eager"), torch.compile
    torch._dynamo.reset()

    def compile(function: object, fullgraph: bool, dynamic: bool) -> object:
        return original(function, fullgraph=fullgraph, dynamic=dynamic, backend=counting)

    monkeypatch.setattr(torch, "compile", compile)
    yield counting
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_run_is_one_graph_for_steps_and_one_for_guidance(
    tiny_folder: Path, tiny_model: Model, counter: CompileCounterWithBackend
) -> None:
    """fullgraph=True raises at a graph break. New prompts, boxes, scales, thresholds and stops need no new graph."""
    compiled = minidiff.load(tiny_folder, dtype="float32", device="cpu", compile=True)
    runs = [
        (
            ["a cat and a ball", "two dogs"],
            [{"cat": (0, 0, 0.5, 0.5), "ball": (0.5, 0.5, 1, 1)}, {"dogs": (0, 0, 1, 0.5)}],
        ),
        (
            ["the big house", "a tree"],
            [{"big house": (0.6, 0.6, 1, 1)}, {"tree": (0, 0, 0.5, 1), "a": (0.2, 0, 0.4, 1)}],
        ),
    ]
    graphs = []
    for (prompts, boxes), guidance in zip(
        runs,
        (
            Guidance(scale=500.0, threshold=0.35, iterations=3, steps=4),
            Guidance(scale=(900.0, 200.0), threshold=0.45, steps=2),
        ),
        strict=True,
    ):
        shared = {"steps": 20, "sampler": "ddim", "seed": 1, "boxes": boxes, "guidance": guidance}
        run = minidiff.sample_steps(prompts, model=compiled, output="latents", **shared)
        graphs += [counter.frame_count for _ in run]
        expected = minidiff.generate(prompts, model=tiny_model, output="latents", **shared)
        assert relative_error(run.result().latents, expected.latents) <= 1e-4
        found, eager = run.result().reports, expected.reports
        assert [report.iterations for report in found] == [report.iterations for report in eager]
        assert len({report.iterations for report in found}) == 2  # the images stop at different evaluations
    assert graphs == [2] * 40


@pytest.mark.parametrize("name", ["attend_and_excite", "boxdiff", "layout"])
def test_float16_keeps_small_gradients(tiny_model: Model, name: str) -> None:
    """Without the scale half of them are zeros: a loss of 1e-3 in an image of 8x8 has gradients below 6e-8."""
    there = tiny_model.unet.positions(8, 8)
    bound = (OBJECTIVES[name] * 1e-3).bound(there)
    layout = make_layout([[BOXES[0], BOXES[1]]], [4], 77, {at.grid for at in there.values()})
    half = copy.deepcopy(tiny_model.unet).half()
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor(400.0), torch.randn(1, 77, 64)
    exact, _ = evaluate(x, tiny_model.unet.forward, bound, bound.record, (), t, context, layout, layout.inputs())
    found, _ = evaluate(x, half.forward, bound, bound.record, (), t, context.half(), layout, layout.inputs())
    assert exact is not None and found is not None
    assert relative_error(found, exact) < 0.05


def test_a_float16_gradient_too_large_for_the_scale_is_taken_without_it(tiny_model: Model) -> None:
    there = tiny_model.unet.positions(8, 8)
    layout = make_layout([[BOXES[0]]], [4], 77, {at.grid for at in there.values()})
    half = copy.deepcopy(tiny_model.unet).half()
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor(400.0), torch.randn(1, 77, 64).half()
    for weight in (1.0, 1e6):
        bound = (OBJECTIVES["layout"] * weight).bound(there)
        gradient, _ = evaluate(x, half.forward, bound, bound.record, (), t, context, layout, layout.inputs())
        assert gradient is not None and gradient.isfinite().all() and gradient.abs().max() > 0


def test_passes_are_the_runs_most_where_a_step_has_two_calls(tiny_model: Model) -> None:
    """PNDM's first step guides twice."""
    how = Guidance(minidiff.layout_loss, passes=4, threshold=0.0)
    boxes = {"cat": (0.1, 0.1, 0.6, 0.7)}
    given = {"model": tiny_model, "boxes": boxes, "guidance": how, "steps": 3, "seed": 1, "sampler": "pndm"}
    (report,) = minidiff.generate("a cat", **given).reports  # type: ignore[arg-type, misc]
    assert report.iterations == (2, 1, 1)


def test_passes_of_two_calls_are_counted_for_each_image() -> None:
    """The first image is done in the first call, not in the second; the other one takes all it may in the first."""
    losses = [[0.0, 1.0, 1.0, 1.0, 1.0], [1.0] * 5]

    def iterations(some: list[list[float]]) -> list[tuple[int, ...]]:
        layout = make_layout([read_objects({"a": (0, 0, 0.5, 0.5)})] * len(some), [3] * len(some), 5, [(4, 4)])
        how = Guidance(minidiff.layout_loss, threshold=0.5, passes=4, steps=1, sites={SITE}).of_run(1, {})
        guide = Guide(how, lambda *_: (None, {}), torch.zeros(len(some), 5, 8), layout, [["a"]] * len(some))
        left = list(map(iter, some))

        def look(x: Tensor, t: Tensor, abar: float, rows: list[int], index: int, limits: Tensor) -> object:
            loss = torch.tensor([next(left[row]) for row in rows])
            return torch.ones_like(x) if (loss > limits).any() else None, (loss, loss[:, None], loss[:, None])

        guide.look = look  # type: ignore[method-assign, assignment]
        for _ in range(2):
            guide.refine(torch.zeros(len(some), 4, 2, 2), torch.tensor(1.0), 0.5, 0)
        return [guide.report(i).iterations for i in range(len(some))]

    assert iterations(losses) == [(3,), (4,)] == [*iterations(losses[:1]), *iterations(losses[1:])]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("conform", "conform_loss acts between phrases, and boxes hold one only"),
        (minidiff.layout_loss + minidiff.self_cross_loss, "self_cross_loss acts between phrases"),
        ("relation", "relation_loss has no relations, so it changes nothing"),
    ],
)
def test_guidance_that_has_nothing_to_do_is_warned_of(tiny_model: Model, how: object, message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        minidiff.sample_steps("a cat", boxes=CAT, guidance=how, model=tiny_model, steps=2)
