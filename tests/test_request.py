"""Request: all arguments of a call as one value, checked without a model, and convertible to JSON."""

import inspect
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

import minidiff
from minidiff.asked import asked
from minidiff.request import FIELDS, Request

BOX = {"cat": (0.1, 0.1, 0.6, 0.7)}
WRONG = {
    "prompt": [7, ["a", None], [], b"a"],
    "model": [3, None, ["a"]],
    "negative_prompt": [7, ["a", "b"]],
    "syntax": ["A1111", "compel", None, 3],
    "emphasis": ["a1111", "strong", 3, ["a1111"]],
    "width": [0, -8, 8.0, "8", True, np.array([8]), float("inf")],
    "height": [0, 10.5, "8"],
    "steps": [0, 2.5, "2", np.float32(2)],
    "timesteps": [5, "9,1", [1, "x"], [], range(10**6), {9: 1}],
    "sigmas": [5, [float("nan"), 0], torch.zeros(2, 2)],
    "guidance_scale": [0.5, float("nan"), "7", True, 10**400],
    "guidance_rescale": [-0.1, 2, None],
    "guidance_interval": [5, (1,), (5.42, 0.28), (-1, 2), (1, 1), "0.2,5", (1, 2, 3)],
    "cache_interval": [0, 1.5, None, "3"],
    "clip_skip": [-1, 1.5, "1"],
    "sampler": [3, "nope", minidiff.DDIM],
    "schedule": [1, "yes"],
    "spacing": ["even", 3],
    "eta": [2, "1", None],
    "seed": [-1, 2**64, 1.5, "1", [1, 2], True],
    "vary": [3, (3,), (3, 2), (-1, 0.5), ([1, 2], 0.5), "3", {3: 1}],
    "tries": [0, 1.5, 2, 10**9],
    "images_per_prompt": [0, 1.5, 10**9],
    "latents": [3, torch.zeros(4, 8, 8), torch.zeros(1, 4, 8, 8, dtype=torch.int64), torch.full((1, 4, 8, 8), np.nan)],
    "image": [7, "no/such.png", [], [None], {"tensor": {}}, np.zeros((4, 4)), [[1]]],
    "strength": [0, 1.5, "1", 0.5],  # 0.5 is right, with an image
    "mask": [3, "no/such.png", torch.ones(4, 4)],
    "fit": ["fill", 3, None],
    "paste": [1, "yes", None],
    "negative_context": [3, torch.zeros(77, 64)],
    "boxes": [3, "cat", {"cat": 3}, {"cat": (0, 0, 2, 1)}, [None, None], {"cat": (0, 0, 0, 0)}],
    "regions": [3, "a fox", ["a fox"], [{"prompt": "a fox"}], {"prompt": "a fox", "box": (0, 0, 1, 1)}],
    "base_weight": [-1, "1", None, 0.5],
    "regions_apart": [-1, 1.5, "1", 0.5],
    "relations": [
        *("cat left of dog", 3, ["cat near dog"], ["cat left of"], [("cat", "left of", "cat")], [("cat", "by", "dog")]),
        *([None, None], [["cat left of dog"], 3], ["a left of b right of c"]),
    ],
    "guidance": [7.5, "magic", {"scale": 3, "wrong": 1}, 3],
    "image_prompt": [7, [], {"image": 3}, {"a": 3}, "no/such.png", "~nobody/a.png", [[1]], [{"tensor": "a"}]],
    "image_prompt_scale": ["1", None, float("nan"), ["1"], [], {1: 1}, 0.5],
    "edits": [3, [3], abs],
    "inputs": [3, {"a": 3}, {3: torch.zeros(1)}],
    "attention": ["yes", 3, minidiff.cross],
    "reduce": ["sum", 3],
    "output": ["jpeg", 3],
    "progress": ["yes", 1],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_value_that_does_not_fit_is_refused_by_the_fields_name(name: str, value: object) -> None:
    with pytest.raises(ValueError) as caught:
        Request(**{"prompt": "a cat", "boxes": BOX if name == "guidance" else None, name: value})
    message = str(caught.value)
    assert name in message or (name == "guidance" and "objective" in message)
    assert "\n" not in message and len(message) < 500


def test_every_field_is_tried_above_and_described() -> None:
    assert set(WRONG) | {"context"} == set(FIELDS)
    assert all(f"{name}" in (Request.__doc__ or "") for name in FIELDS)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("width", np.int64(64), 64),
        ("steps", torch.tensor(3), 3),
        ("seed", 2**64 - 1, 2**64 - 1),
        ("seed", np.array([5]), (5,)),
        ("guidance_scale", np.float32(2), 2.0),
        ("timesteps", torch.tensor([900, 100]), (900.0, 100.0)),
        ("guidance", False, "none"),
        ("edits", minidiff.reweight(), (minidiff.reweight(),)),
    ],
)
def test_values_of_other_libraries_come_in_one_form(name: str, value: object, expected: object) -> None:
    found = getattr(Request(**{"prompt": "a", name: value}), name)
    assert found == expected and type(found) is type(expected)


ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["cat", "a cat", "ddim", "none", "pil", "mean", torch.zeros(2), np.zeros(3), object(), abs]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3) | st.just("boxes"), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(FIELDS), ANY, max_size=4))
def test_any_value_of_any_field_is_taken_or_refused_in_one_line(values: dict[str, object]) -> None:
    try:
        Request(**{"prompt": "a cat", **values})
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
        assert any(name in str(error) for name in (*FIELDS, "objective", "scale"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(JSON | st.dictionaries(st.sampled_from([*FIELDS, "stepz"]), JSON, max_size=3))
def test_any_json_is_a_request_or_a_value_error(values: object) -> None:
    try:
        found = Request.from_plain(values, origin="x.json")  # type: ignore[arg-type]
    except ValueError as error:
        assert str(error).startswith("x.json: ") and "\n" not in str(error)
    else:
        assert found.prompt or found.prompt == "" or found.prompt == ()


def test_a_request_comes_back_from_its_json() -> None:
    request = Request(
        ["a cat", "a cat and a dog"],
        model="owner/name",
        negative_prompt="blur",
        width=64,
        timesteps=[900, 500.5],
        sampler="DPM++ 2M Karras",
        seed=[3, 4],
        boxes=[BOX, {"dog": {"boxes": [(0, 0, 0.5, 0.5)], "weight": 2.0}}],
        guidance={"objective": {"layout": 1.0}, "scale": 3},
        attention=True,
        reduce="last",
    )
    text = json.dumps(request.plain())
    again = Request.from_plain(json.loads(text))
    assert json.dumps(again.plain()) == text
    assert (again.seed, again.timesteps, again.model) == ((3, 4), (900.0, 500.5), "owner/name")
    assert Request("a").plain() == {"prompt": "a", "model": "minidiff/shapes", "guidance_rescale": 0.0, "eta": 0.0}
    masked = Request("a cat", boxes={"cat": np.ones((4, 4), bool)}).plain()
    with pytest.raises(ValueError, match=r"x.png: .*boxes\['cat'\]"):
        Request.from_plain(masked, origin="x.png")
    with pytest.raises(ValueError, match="x.json: there is no argument 'stepz'; did you mean 'steps'?"):
        Request.from_plain({"prompt": "a", "stepz": 3}, origin="x.json")


def test_boxes_and_samplers_of_any_form_are_json() -> None:
    forms = [np.array(BOX["cat"]), torch.tensor([BOX["cat"], BOX["cat"]]), [BOX["cat"]]]
    for boxes in ({"cat": forms[0], 2: forms[1], (2, 3): forms[2]}, [{"cat": forms[1]}]):
        plain = Request("a cat", boxes=boxes, sampler=minidiff.Euler(levels="karras")).plain()
        again = Request.from_plain(json.loads(json.dumps(plain)))
        assert again.plain() == plain
        assert (again.sampler, again.schedule) == ("euler", "karras")
    assert set(Request("a cat", boxes={2: forms[0], (2, 3): forms[0]}).plain()["boxes"]) == {"tokens:2", "tokens:2,3"}


def test_an_image_of_a_batch_has_a_request_of_its_own() -> None:
    latents = torch.arange(4.0)[:, None, None, None].expand(4, 4, 8, 8)
    request = Request(
        ["a", "b"], negative_prompt=["c", "d"], images_per_prompt=2, seed=[5, 6, 7, 8], boxes=[None, {"b": BOX["cat"]}],
        latents=latents,
    )  # fmt: skip
    one = request.alone(3)
    assert (one.prompt, one.negative_prompt, one.seed, one.boxes) == ("b", "d", 8, {"b": BOX["cat"]})
    assert (one.images, float(one.latents[0, 0, 0, 0])) == (1, 3.0)


# ---- functions of a request


@asked(Request)
def width_of(request: Request) -> int | None:
    """The width."""
    return request.width


def test_functions_take_a_request_its_fields_or_both() -> None:
    assert width_of("a", width=8) == 8
    assert width_of(Request("a", width=8)) == 8
    assert width_of(Request("a", width=8), width=16) == 16
    with pytest.raises(ValueError, match="width is 0"):
        width_of(Request("a"), width=0)
    signature = inspect.signature(minidiff.generate)
    assert list(signature.parameters) == [field.name for field in fields(Request)]
    assert "guidance_scale: w in eps_uncond" in (minidiff.generate.__doc__ or "")


@pytest.mark.parametrize(
    ("keyword", "message"),
    [
        ("num_inference_steps", "there is no argument 'num_inference_steps'; its name here is 'steps'"),
        ("callback_on_step_end", "loop over"),
        ("widht", "did you mean 'width'?"),
        ("foo", "there is no argument 'foo'$"),
    ],
)
def test_a_wrong_keyword_names_ours(keyword: str, message: str) -> None:
    with pytest.raises(TypeError, match=rf"generate\(\): .*{message}"):
        minidiff.generate("a", **{keyword: 3})
    with pytest.raises(TypeError, match="one positional argument"):
        minidiff.generate("a", "b")


def test_wrong_values_wait_for_no_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(source: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("minidiff.run.load", load)
    with pytest.raises(ValueError, match="steps is 0"):
        minidiff.generate("a", steps=0)


def test_guidance_needs_something_to_follow() -> None:
    with pytest.raises(ValueError, match="guidance is 'layout' but there are no boxes to follow"):
        Request("a cat", guidance="layout")
    assert Request("a cat", guidance="none").guidance == "none"


def test_sizes_that_no_memory_holds_are_refused(tiny_model: minidiff.Model) -> None:
    with pytest.raises(ValueError, match=r"1 images of 1000000000x32 pixels would take at least [\d,]+ GiB, and cpu"):
        minidiff.generate("a cat", model=tiny_model, width=10**9)


CLIENT = """
import minidiff
from minidiff import Record, Request, cross

layout = {"red circle": (0.1, 0.1, 0.5, 0.5)}
result: minidiff.Result = minidiff.generate("a red circle", boxes=layout, steps=4, seed=7)
request = Request("a red circle", width=64, attention=Record(cross))
run = minidiff.sample_steps(request)
count: int = len(run)
for step in run:
    shape: tuple[int, ...] = tuple(step.latents.shape)
wide = minidiff.generate(request, width=128)
seeds: tuple[int | None, ...] = wide.seeds
model: minidiff.Model = minidiff.load("folder", dtype="float32")
guidance = minidiff.Guidance(minidiff.layout_loss + 0.5 * minidiff.boxdiff_loss, scale=30, steps=10)
sampler = minidiff.Euler(levels="karras")
minidiff.generate(["a", "b"], model=model, boxes=[layout, None], guidance=guidance, sampler=sampler)
again = Request.from_plain({"prompt": "a cat", "seed": 3})
minidiff.generate(again).save("cat.png")
"""


@pytest.mark.slow
def test_a_client_passes_mypy_strict(tmp_path: Path) -> None:
    (tmp_path / "client.py").write_text(CLIENT)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "client.py"]
    # like an install from a wheel: mypy does not follow setuptools' editable installs
    environment = os.environ | {"PYTHONPATH": str(Path(minidiff.__file__).parents[1])}
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert (found.returncode, found.stdout) == (0, "Success: no issues found in 1 source file\n")
    wrong = CLIENT.replace("steps=4", "stepz=4").replace("width=64", 'width="64"')
    (tmp_path / "client.py").write_text(wrong)
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert found.stdout.count("error:") == 2


def test_pictures_may_be_masks() -> None:
    mask = Image.new("L", (8, 8), 255)
    assert Request("a cat", boxes={"cat": mask}).layouts == [{"cat": mask}]
