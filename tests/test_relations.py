"""Relations are read from all forms, become a tensor, and steer where things go without any box."""

import itertools
import json
import warnings

import pytest
import torch
from hypothesis import given, strategies as st

import minidiff
from minidiff.guidance.layout import PlacedObject, make_layout
from minidiff.guidance.relations import Relation, planned, read_relations, relation_tensor
from minidiff.request import Request
from minidiff.vocabulary import RELATIONS

LEFT = Relation("cat", "left of", "hat")


@pytest.mark.parametrize("value", [[("cat", "left of", "hat")], ["cat left of hat"], (["cat", "left of", "hat"],)])
def test_all_forms_of_a_relation_are_one(value: object) -> None:
    assert read_relations(value) == (LEFT,)


def test_relations_belong_to_all_prompts_or_to_each() -> None:
    both = Request(["a cat and a hat"] * 2, relations=["cat left of hat"])
    assert both.related == ((LEFT,), (LEFT,))
    each = Request(["a", "a cat and a hat"], relations=[None, ["cat left of hat"]])
    assert each.related == ((), (LEFT,))
    assert Request.from_plain(json.loads(json.dumps(each.plain()))).related == each.related
    assert each.alone(1).related == ((LEFT,),)
    assert each.alone(0).relations is None
    assert Request("a", relations=[]).relations is None


def test_the_tensor_holds_the_sign_of_each_quantity_between_all_of_a_name() -> None:
    names = [["cat", "hat", "hat"], ["cat"]]
    found = relation_tensor(names, [[LEFT, Relation("hat", "larger than", "cat")], [LEFT]])
    expected = torch.zeros(2, 3, 3, 3)
    expected[0, 0, 1:, 0] = -1
    expected[0, 1:, 0, 2] = 1
    assert torch.equal(found, expected)
    assert {RELATIONS[name][0] for name in ("above", "below")} == {1}


def test_a_phrase_that_the_text_lacks_has_no_relation() -> None:
    some = [[PlacedObject("cat", (1,)), PlacedObject("hat", ())]]
    assert make_layout(some, [3], 5, [(2, 2)], relations=[[LEFT]]).relations.count_nonzero() == 0


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(list(RELATIONS)), st.sampled_from("abcd"))))
def test_planned_boxes_hold_every_relation_that_can_hold(triples: list[tuple[str, str, str]]) -> None:
    """Against each relation by itself, where no chain of one kind leads back to its start."""
    relations = [Relation(*triple) for triple in triples if triple[0] != triple[2]]
    boxes = planned(relations)
    assert boxes.keys() == {name for first, _, second in relations for name in (first, second)}
    for x0, y0, x1, y1 in boxes.values():
        assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1
    for one, other in itertools.combinations(boxes.values(), 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    for quantity in range(3):
        own = [one for one in relations if RELATIONS[one.relation][0] == quantity]
        above = {(a, b) if RELATIONS[name][1] > 0 else (b, a) for a, name, b in own}
        for _ in "abcd":
            above |= {(a, d) for a, b in above for c, d in above if b == c}
        if not any(a == b for a, b in above):
            assert all(_holds(boxes, one) for one in own)


def _holds(boxes: dict[str, tuple[float, float, float, float]], relation: Relation) -> bool:
    quantity, sign = RELATIONS[relation.relation]
    first, second = (
        (x0 + x1, y0 + y1, (x1 - x0) * (y1 - y0))[quantity]
        for x0, y0, x1, y1 in (boxes[relation.first], boxes[relation.second])
    )
    return sign * (first - second) > 0


def test_a_prompt_without_boxes_gets_those_of_its_relations(tiny_model: minidiff.Model) -> None:
    asked = Request("a cat and a hat", model=tiny_model, relations=[LEFT], seed=1, steps=2, output="latents")
    found = minidiff.generate(asked)
    assert found.reports is not None and sum(found.reports[0].iterations) > 0
    recipe = json.loads(json.dumps(found.parameters[0]))
    assert {name: one["boxes"] for name, one in recipe["boxes"].items()} == {
        name: [list(box)] for name, box in planned([LEFT]).items()
    }
    assert recipe["relations"] == [list(LEFT)]
    again = minidiff.generate(Request.from_plain(recipe), model=tiny_model, output="latents")
    assert torch.equal(again.latents, found.latents)
    box = {"cat": (0.0, 0.0, 0.5, 0.5)}
    both = minidiff.sample_steps(
        ["a cat", "a cat and a hat"], model=tiny_model, boxes=[box, None], relations=[None, [LEFT]]
    )
    assert both.request.boxes == (box, planned([LEFT]))


def test_relations_that_nothing_follows_are_warned_of(tiny_model: minidiff.Model) -> None:
    with pytest.warns(UserWarning, match='relations have no effect with guidance="none"'):
        minidiff.sample_steps("a cat and a hat", model=tiny_model, relations=[LEFT], guidance="none", steps=2)


@pytest.mark.parametrize("guidance", ["none", "relation"])
def test_an_edit_that_follows_boxes_gets_those_of_relations(tiny_model: minidiff.Model, guidance: str) -> None:
    asked = {"model": tiny_model, "relations": [LEFT], "guidance": guidance, "edits": minidiff.dense_diffusion(steps=2)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = minidiff.sample_steps("a cat and a hat", steps=2, **asked)
    assert run.request.boxes == (planned([LEFT]),)


def test_images_without_relations_are_as_alone(tiny_model: minidiff.Model) -> None:
    boxes = {"cat": (0, 0, 0.5, 1), "hat": (0.5, 0, 1, 1)}
    shared = {"model": tiny_model, "boxes": boxes, "guidance": "layout", "steps": 2, "output": "latents", "seed": 1}
    both = minidiff.generate(["a cat and a hat"] * 2, relations=[None, ["hat left of cat"]], **shared)
    alone = minidiff.generate("a cat and a hat", **shared)
    torch.testing.assert_close(both.latents[:1], alone.latents, rtol=1e-3, atol=1e-3)
    for name in ("loss", "object_loss", "mass", "first_mass"):
        torch.testing.assert_close(
            getattr(both.reports[0], name), getattr(alone.reports[0], name), rtol=1e-3, atol=1e-4
        )
    first, second = (fields["guidance"]["objective"] for fields in both.parameters)
    assert set(first) == {"layout"} and set(second) == {"layout", "relation"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of relations that are not there
        again = minidiff.generate(Request.from_plain(both.parameters[0]), model=tiny_model, output="latents")
    torch.testing.assert_close(again.latents, both.latents[:1], rtol=1e-3, atol=1e-3)


def test_without_boxes_relations_alone_move_an_image(tiny_model: minidiff.Model) -> None:
    asked = Request(
        "a cat and a hat",
        model=tiny_model,
        relations=["cat left of hat"],
        guidance="relation",
        seed=1,
        steps=2,
        output="latents",
    )
    found = minidiff.generate(asked)
    assert found.reports is not None and sum(found.reports[0].iterations) > 0
    assert not torch.equal(found.latents, minidiff.generate(asked, relations=None, guidance=None).latents)
    recipe = json.loads(json.dumps(found.parameters[0]))
    assert recipe["relations"] == [["cat", "left of", "hat"]] and "boxes" not in recipe
    again = minidiff.generate(Request.from_plain(recipe), model=tiny_model, output="latents")
    assert torch.equal(again.latents, found.latents)


def test_with_boxes_both_objectives_count(tiny_model: minidiff.Model) -> None:
    boxes = {"cat": (0, 0, 0.5, 1), "hat": (0.5, 0, 1, 1)}
    asked = Request("a cat and a hat", model=tiny_model, boxes=boxes, relations=[LEFT], guidance="layout", steps=2)
    run = minidiff.sample_steps(asked)
    guidance = run.request.guidance
    assert isinstance(guidance, minidiff.Guidance)
    assert [term.name for term in guidance.objective.terms] == ["layout_loss", "relation_loss"]
    with pytest.raises(ValueError, match=r"boxes\['hat'\] has no box"):
        minidiff.sample_steps(asked, boxes={"cat": boxes["cat"]})
    with pytest.raises(ValueError, match="dog"):
        minidiff.sample_steps(asked, relations=["cat left of dog"])


def test_a_relation_that_holds_has_no_loss() -> None:
    some = [[PlacedObject("cat", (1,)), PlacedObject("hat", (2,))]]
    probs = torch.full((1, 4, 5, 4), 1e-6)
    probs[..., 0, 1] = probs[..., 4, 2] = 1
    site = minidiff.Site("up", 1, 0, "cross")
    layouts = [
        make_layout(some, [2], 4, [(4, 5)], relations=[[LEFT._replace(relation=name)]])
        for name in ("left of", "right of")
    ]
    assert minidiff.relation_loss({site: probs}, layouts[0]).item() == 0
    assert minidiff.relation_loss({site: probs}, layouts[1]).item() > 4
