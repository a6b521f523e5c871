"""The browser page's parts: its form, its runs, the code that it copies, and its handlers, without a browser."""

import argparse
import dataclasses
import functools
import importlib.util
import json
import shlex
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import minidiff
from minidiff.cli.flags import parser
from minidiff.cli.main import given_fields
from minidiff.cli.page import copied, form
from minidiff.cli.page.preview import fit_preview
from minidiff.cli.page.start import sources
from minidiff.cli.page.studio import BOXES, PICTURE, Source, Studio, sheet, weighted
from minidiff.guidance.guide import Guidance
from minidiff.request import FIELDS, Request

PROMPT = "a red circle and a blue square"
PLACES = [("red circle", (0.05, 0.1, 0.45, 0.5)), ("blue square", (0.55, 0.5, 1 / 3 + 0.6, 0.9))]
ENTERED = {
    "prompt": PROMPT,
    "negative_prompt": "grey",
    "guidance": "boxdiff",
    "tries": "2",
    "seed": "18446744073709551615",
    "steps": "4",
    "sampler": "dpmpp_2m",
    "guidance_scale": "2.5",
    "width": "96",
    "height": "64",
    "images_per_prompt": "",
    "schedule": "karras",
    "spacing": "trailing",
    "syntax": "a1111",
    "emphasis": "compel",
    "clip_skip": "0",
    "strength": None,
    "fit": "",
    "attention": True,
}
VALUES = form.read(ENTERED, PLACES, '{"guidance_rescale": 0.5}')


def test_every_control_is_a_field_and_every_choice_is_checked_by_request() -> None:
    assert form.CONTROLS.keys() <= set(FIELDS)
    for name, kind in form.CONTROLS.items():
        for value in kind if isinstance(kind, tuple) else ():
            more = {"syntax": "a1111"} if name == "emphasis" else {}
            boxes = {"boxes": {"red": [0, 0, 1, 1]}} if name == "guidance" else {}
            assert getattr(Request(PROMPT, **{name: value}, **more, **boxes), name) == value
    assert form.default("seed") == "random" and form.default("prompt") == ""


def test_boxes_are_named_by_the_phrases_of_the_prompt() -> None:
    assert form.phrases("a red circle, and the old man's boat")[:3] == ["old man's boat", "red circle", "old man's"]
    assert not {"and", "the", "a red", "circle and"} & set(form.phrases(PROMPT))
    assert form.words("A cat, a dog") == ["a", "cat", "dog"]


def test_what_a_picture_says_fills_the_form_that_made_it() -> None:
    filled, places, more = form.fill(Request.from_plain(VALUES).plain())
    assert {name: value or None for name, value in filled.items()} == {n: v or None for n, v in ENTERED.items()}
    assert places == PLACES and json.loads(more) == {"guidance_rescale": 0.5}
    assert form.read(filled, places, more) == VALUES


def test_what_has_no_control_is_kept_as_json() -> None:
    fields = {"prompt": PROMPT, "boxes": {"red": {"stroke": [[0, 0], [1, 1]]}}, "timesteps": [900, 500]}
    guidance = {"objective": {"layout": 1.0, "boxdiff": 0.5}, "steps": 3}
    filled, places, more = form.fill({**fields, "guidance": guidance})
    assert not places and form.read(filled, places, more) == {**fields, "guidance": guidance}
    assert form.preset(Guidance.read("rnb").plain()) == "rnb"


def test_weights_and_objects_of_one_phrase_are_labels_of_the_board() -> None:
    boxes = {
        "cat": [{"weight": 1.0, "boxes": [[0, 0, 0.5, 1]]}, {"weight": 1.5, "boxes": [[0.5, 0, 1, 1], [0, 0, 0.1, 1]]}],
        "red hat": {"weight": 0.5, "boxes": [[0, 0, 1 / 3, 1]]},
    }
    _, places, more = form.fill({"boxes": boxes})
    assert [label for label, _ in places] == ["cat", "cat #2 x1.5", "cat #2 x1.5", "red hat x0.5"] and not more
    board = form.to_annotations(places, (1000, 1000))
    assert form.read({}, form.from_annotations(board, (1000, 1000), places), "") == {"boxes": boxes}
    drawn = [("bmw x5", (0.0, 0.0, 0.5, 1.0)), ("bmw x5 x2", (0.5, 0.0, 1.0, 1.0))]
    given = form.read({"prompt": "a BMW X5"}, drawn, "")
    assert given["boxes"] == {
        "bmw x5": [{"weight": 1.0, "boxes": [[0, 0, 0.5, 1]]}, {"weight": 2.0, "boxes": [[0.5, 0, 1, 1]]}]
    }
    assert form.fill({**given, "boxes": {"bmw": {"weight": 5.0, "boxes": [[0, 0, 1, 1]]}}})[1] == []
    for other in ({"cat #2": [0, 0, 1, 1]}, {"cat": None}, {"tokens:2": [0, 0, 1, 1]}):
        _, places, more = form.fill({"boxes": other})
        assert not places and json.loads(more) == {"boxes": other}


@pytest.mark.parametrize(
    ("entered", "places", "more", "said"),
    [
        ({"steps": "many"}, [], "", "steps is 'many'; expected a whole number"),
        ({}, [("", (0, 0, 1, 1))], "", "a box has no phrase"),
        ({}, [], "[1]", "expected an object"),
        ({}, [], "{", "not JSON"),
        ({"steps": "3"}, [], '{"steps": 4}', "'steps', which has its own control"),
        ({}, [], '{"image": "/etc/passwd"}', "'image', which has its own control"),
    ],
)
def test_bad_entries_are_named(entered: dict, places: list, more: str, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("[", r"\[")):
        form.read(entered, places, more)


def test_boxes_on_the_board_stay_exact_until_they_are_moved() -> None:
    size = form.board_size(96, 64)
    assert size == (1000, 667) and form.board_size(None, 64) == (1000, 1000)
    board = form.to_annotations(PLACES, size)
    assert form.from_annotations(board, size, PLACES) == PLACES
    board[0]["xmin"] += 20  # the board holds the last box first
    assert form.from_annotations(board, size, PLACES) == [PLACES[0], ("blue square", (0.57, 0.501, 0.933, 0.9))]
    assert form.from_annotations([{"xmin": -3, "ymin": 0, "xmax": 2000, "ymax": 9}], size) == [("", (0, 0, 1, 0.013))]


# ---- what is copied


def parsed(line: str) -> argparse.Namespace:
    return parser().parse_args(shlex.split(line)[1:])


@pytest.mark.parametrize(
    "values",
    [
        VALUES,
        {
            "prompt": PROMPT,
            "negative_prompt": "-x",
            "paste": False,
            "images_per_prompt": 2,
            "seed": [1, 2],
            "vary": [3, 0.5],
        },
    ],
)
def test_the_command_line_and_the_python_ask_for_the_same(values: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    loras = (("a b=1.safetensors", 0.5, 0.25), ("c.safetensors", None, None))
    source = Source("folder", {"dtype": "float32", "safety": True, "words": {"w": "f"}}, loras, ("ip",), "encoder")
    args = parsed(copied.command(values, source, "made.png"))
    wanted = Request.from_plain(values).plain() | {"model": "folder"}
    said = Request(**given_fields(args)).plain()  # the command line's texts are lists
    assert args.png is None and {n: v[0] if v in ([PROMPT], ["-x"], ["grey"]) else v for n, v in said.items()} == wanted
    assert (args.dtype, args.safety, args.words, args.ip_adapter) == ("float32", True, {"w": "f"}, ["ip"])
    assert args.loras == [loras[0], ("c.safetensors", 1.0, None)]

    asked: dict = {}
    fake = SimpleNamespace(
        load=lambda *of, **how: asked.update(load=(of, how)) or "folder",
        LoRA=minidiff.LoRA,
        with_image_prompt=lambda model, *of: asked.update(adapter=of) or model,
        generate=lambda prompt, **how: asked.update(request=Request(prompt, **how)) or SimpleNamespace(save=asked.get),
    )
    monkeypatch.setitem(__import__("sys").modules, "minidiff", fake)
    exec(copied.python(values, source))
    assert asked["request"].plain() == wanted and asked["adapter"] == ("ip", "encoder")
    assert asked["load"][1]["loras"][0] == minidiff.LoRA("a b=1.safetensors", 0.5, 0.25)


@pytest.mark.parametrize(
    "more", [{"guidance": {"steps": 3}}, {"boxes": {"red": {"boxes": [[0, 0, 1, 1]], "weight": 2}}}, {"prompt": "-a"}]
)
def test_what_no_flag_can_say_is_taken_from_the_picture(more: dict) -> None:
    args = parsed(copied.command({"prompt": PROMPT, "image": "in.png", **more}, Source("folder"), "made.png"))
    assert (args.png, args.image, args.model, args.prompt) == ("made.png", ["in.png"], "folder", [])


def test_flags_choose_sources() -> None:
    args = parser().parse_args(
        ["page", "--model", "a", "--model", "b", "--lora", "c.safetensors=0.5", "--dtype", "int8"]
    )
    first, second = sources(args)
    assert (first.name, second.name, first.loading) == ("a", "b", {"dtype": "int8"}) and args.host == "127.0.0.1"
    assert weighted(first, [0.0]).loras == () and weighted(first, [0.7]).loras == (("c.safetensors", 0.7, None),)
    with pytest.raises(ValueError, match="expected both"):
        sources(parser().parse_args(["page", "--ip-adapter", "a"]))


# ---- runs

RUN = {"prompt": PROMPT, "seed": 3, "steps": 3, "attention": True, "boxes": {"red circle": [[0.05, 0.1, 0.45, 0.5]]}}


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return Studio(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def progress(studio: Studio) -> list:
    return list(studio.run(RUN, Source(), threading.Event()))


def test_a_run_shows_each_step_and_writes_what_generate_makes(progress: list, studio: Studio) -> None:
    assert [str(now) for now in progress] == [
        "loading the model",
        *(f"step {n} of 3" for n in (1, 2, 3)),
        "made in 3 steps",
    ]
    assert [len(now.looks) for now in progress] == [0, 1, 1, 0, 1]
    (made,) = progress[-1].made
    wanted = minidiff.generate(Request.from_plain(RUN), model=studio.model(Source()))
    assert made.look.image.tobytes() == wanted.image.tobytes() and made.seed == 3
    assert minidiff.read_parameters(made.file) == json.loads(json.dumps(wanted.parameters[0]))
    assert made.look.shares["red circle"] == pytest.approx(wanted.reports[0].mass[-1].item())
    torch.testing.assert_close(torch.from_numpy(made.look.maps["blue"]), wanted.attention["blue"][0])
    assert "red circle" in made.report and "--seed 3" in made.command


def test_the_best_of_several_tries_is_made_again_without_the_others(studio: Studio) -> None:
    values = {
        **RUN,
        "seed": 3,
        "guidance": "inside",
        "tries": 2,
        "steps": 2,
        "width": 32,
        "height": 32,
        "attention": False,
    }
    *_, last = studio.run(values, Source(), threading.Event())
    (made,) = last.made
    code = made.python.splitlines()[-1].removesuffix('.save("picture.png")')
    assert "tries=" not in code and f"seed=[{made.seed}]" in code
    assert f"--seed {made.seed}" in made.command
    generate = functools.partial(minidiff.generate, model=studio.model(Source()))
    again = eval(code, {"minidiff": SimpleNamespace(generate=generate)})
    assert again.image.tobytes() == made.look.image.tobytes()


def test_a_look_shows_the_picture_its_boxes_and_words(progress: list) -> None:
    look = progress[-1].looks[0]
    shown = {what: look.shown(what).tobytes() for what in (PICTURE, BOXES, "blue", "red")}
    assert len(set(shown.values())) == 4 and shown[PICTURE] == look.image.tobytes()
    with pytest.raises(ValueError, match="no heat map of 'green'"):
        look.shown("green")
    assert sheet([look, look], "green").width > look.image.width and sheet([], BOXES) is None


def test_without_guidance_the_share_is_that_of_the_attention(studio: Studio) -> None:
    *_, last = studio.run({**RUN, "guidance": "none", "steps": 1}, Source(), threading.Event())
    heat = last.looks[0].maps["red circle"]
    height, width = heat.shape
    box = minidiff.guidance.layout.box_coverage(torch.tensor(RUN["boxes"]["red circle"][0]), height, width).numpy()
    assert last.looks[0].shares["red circle"] == pytest.approx(float((heat * box).sum() / heat.sum()), rel=1e-5)


def test_two_objects_of_one_phrase_have_a_share_each(studio: Studio) -> None:
    places = [{"box": (0.05, 0.1, 0.45, 0.5)}, {"box": (0.5, 0.5, 0.6, 0.6)}]
    for guidance in ("none", "inside"):
        asked = {**RUN, "boxes": {"red circle": places}, "guidance": guidance, "steps": 1}
        *_, last = studio.run(asked, Source(), threading.Event())
        look = last.looks[0]
        assert [*look.layout] == [*look.shares] == ["red circle", "red circle #2"]
        assert look.shares["red circle"] != look.shares["red circle #2"]
    assert [*look.shares.values()] == pytest.approx(minidiff.generate(Request.from_plain(asked)).reports[0].mass[-1])


def test_words_such_as_picture_and_boxes_have_maps() -> None:
    assert not {PICTURE, BOXES} & {*form.words("a (picture) of (boxes)"), *form.phrases("a (picture) of (boxes)")}


def test_where_the_autoencoder_overflows_previews_are_decoded_and_never_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, judged = minidiff.load(), []

    def judge(images: list) -> tuple[bool, ...]:
        judged.append(images)
        return (False,) * len(images)

    class Overflowing(minidiff.Model):
        def encode(self, pixels: torch.Tensor) -> torch.Tensor:
            return super().encode(pixels) * torch.nan

    values = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    monkeypatch.setattr(Source, "load", lambda source: Overflowing(**{**values, "safety": judge}))
    asked = {"prompt": PROMPT, "steps": 2, "width": 32, "height": 32}
    seen = [one.looks[0].image for one in Studio(tmp_path).run(asked, Source(), threading.Event()) if one.looks]
    assert len(seen) == 2 and seen[0].getextrema() != ((0, 0),) * 3 and len(judged) == 1


def test_a_preview_is_near_the_decoded_picture(studio: Studio, progress: list) -> None:
    """On pictures that it was not fitted to; without its neighbours, a latent tells less (0.82)."""
    model = studio.model(Source())
    result = minidiff.generate(PROMPT, seed=3, model=model, output="latents")
    preview, wanted = fit_preview(model)(result.latents), model.decode(result.latents)
    assert preview.shape == wanted.shape
    alike = torch.corrcoef(torch.stack([preview.flatten(), wanted.flatten()]))[0, 1]
    assert alike > 0.9
    assert {*progress[1].looks[0].maps} == {"red circle"}  # a preview reads what is shown of it alone


def test_warnings_are_notes(studio: Studio) -> None:
    *_, last = studio.run({"prompt": "a zebra", "steps": 1, "seed": 1}, Source(), threading.Event())
    assert any("zebra" in note for note in last.notes) and len(last.notes) == len(set(last.notes))


def test_a_run_stops_before_the_next_step(studio: Studio) -> None:
    stop, seen = threading.Event(), []
    for now in studio.run({**RUN, "steps": 20}, Source(), stop):
        seen.append(now)
        if now.step == 2:
            stop.set()
    assert str(seen[-1]) == "stopped after 2 of 20 steps" and not seen[-1].made and len(seen) == 4


def test_one_model_is_in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Big:
        pass

    alive: list[weakref.ref] = []

    def load(source: Source) -> Big:
        assert not any(one() for one in alive)
        alive.append(weakref.ref(big := Big()))
        return big

    monkeypatch.setattr(Source, "load", load)
    monkeypatch.setattr("minidiff.cli.page.studio.fit_preview", lambda model: abs)
    studio = Studio(tmp_path)
    for name in ("a", "a", "b"):
        studio.model(Source(name))
    assert len(alive) == 2


# ---- the page's handlers

gradio = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("gradio", "gradio_image_annotation"))),
    reason="gradio is not installed: pip install 'minidiff[page]'",
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> object:
    from minidiff.cli.page.app import Page

    page = Page([Source()], tmp_path_factory.mktemp("page"))
    page.build()
    return page


def holds(page: object, **changed: object) -> dict:
    """What the page holds at its start, but for some fields."""
    given = {one: getattr(one, "value", None) for one in page.parts.values()}
    board = {"image": Image.new("RGB", (1000, 1000)), "boxes": []}
    start = {page.parts["stop"]: threading.Event(), page.parts["board"]: board, page.parts["start"]: None}
    return given | start | {page.parts[name]: value for name, value in changed.items()}


@gradio
def test_the_page_makes_shows_and_takes_back_a_picture(page: object) -> None:
    part = page.parts
    drawn = {"image": Image.new("RGB", (1000, 1000)), "boxes": form.to_annotations(PLACES[:1], (1000, 1000))}
    *_, last = page._run(holds(page, seed="3", steps="2", board=drawn, what="red"))
    made = last[part["chosen"]]
    assert (
        "made in 2 steps" in last[part["status"]] and last[part["view"]].tobytes() == made.look.shown("red").tobytes()
    )
    ((tile, text),) = last[part["gallery"]]
    assert text == "seed 3" and Path(tile).read_bytes() == made.file.read_bytes()
    assert page.folder not in Path(tile).parents  # which may hold what is not the page's: nothing of it is served
    wanted = minidiff.generate(PROMPT, seed=3, steps=2, boxes=dict(PLACES[:1]), attention=True)
    assert Image.open(made.file).tobytes() == wanted.image.tobytes()

    shown = page._show({part["chosen"]: made, part["what"]: "green"})
    assert 'role="alert"' in shown[part["status"]] and part["view"] not in shown
    event = SimpleNamespace(index=0)
    assert page._choose({part["made"]: [made], part["what"]: PICTURE}, event)[part["command"]] == made.command

    taken = page._take(holds(page, dropped=str(made.file), prompt=""))
    assert (taken[part["prompt"]], taken[part["seed"]], taken[part["places"]]) == (PROMPT, "3", PLACES[:1])
    assert taken[part["attention"]] is True and f"settings of {made.file.name}" in taken[part["status"]]


@gradio
def test_bad_input_is_a_message_of_the_page(page: object, tmp_path: Path) -> None:
    for changed, said in (({"width": "7"}, "width"), ({"prompt": ""}, "prompt"), ({"steps": "x"}, "whole number")):
        *_, last = page._run(holds(page, **changed))
        assert list(last) == [page.parts["status"]] and 'role="alert"' in (text := last[page.parts["status"]])
        assert said in text
    Image.new("RGB", (8, 8)).save(tmp_path / "<other>.png")
    (made,) = minidiff.generate(
        "a red circle", boxes={"red circle": minidiff.Point(0.5, 0.5)}, steps=1, guidance="none"
    ).save(tmp_path / "stroke.png")
    taken = page._take(holds(page, dropped=str(made)))
    assert "its boxes are in Further settings" in taken[page.parts["status"]] and not taken[page.parts["places"]]
    text, _ = page._take(holds(page, dropped=str(tmp_path / "<other>.png"))).values()
    assert "&lt;other&gt;.png has no parameters" in text and str(tmp_path) not in text


@gradio
def test_a_picture_to_start_from_and_its_painted_part_become_files(page: object) -> None:
    layer = Image.new("RGBA", (64, 64))
    layer.paste("white", (0, 0, 32, 64))
    start = {"background": Image.new("RGBA", (64, 64), "red"), "layers": [Image.new("RGBA", (64, 64)), layer]}
    files = page._pictures(holds(page, start=start))
    assert Image.open(files["image"]).getpixel((0, 0)) == (255, 0, 0, 255)
    assert [Image.open(files["mask"]).getpixel((x, 9)) for x in (0, 31, 32)] == [255, 255, 0]
    assert page._redraw(holds(page, start=start, width="64", height="32"))[page.parts["board"]].value


@gradio
def test_a_dropped_picture_sets_the_weights_of_loras_and_a_missing_one_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from minidiff.cli.page.app import Page

    model, style = minidiff.load(), tmp_path / "style.safetensors"
    key = next(name for name in model.unet.state_dict() if name.endswith("attn2.to_k.weight"))
    layer = f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}.diff"
    save_file({layer: torch.ones(model.unet.state_dict()[key].shape)}, style)
    source = Source(loras=((str(style), 0.4, None),))
    *_, last = Studio(tmp_path).run({"prompt": "a red circle", "steps": 1}, source, threading.Event())
    file = str(last.made[0].file)

    page = Page([weighted(source, [1.0])], tmp_path)
    page.build()
    assert page._take(holds(page, dropped=file))[page.parts["lora 0"]] == 0.4
    page = Page([Source()], tmp_path)
    page.build()
    assert "pass lora style" in page._take(holds(page, dropped=file))[page.parts["status"]]
