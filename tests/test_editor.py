"""minidiff.Boxes: what is drawn with the mouse is what generate(boxes=) takes."""

import base64
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import minidiff

widgets = pytest.importorskip("jupyter_bbox_widget", reason="no jupyter-bbox-widget: pip install 'minidiff[notebook]'")
PICTURE = Image.new("RGB", (64, 32), "white")
PROMPT = "a red circle and a blue square"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def test_boxes_come_back_as_they_went_in() -> None:
    boxes = {"red circle": (0.05, 0.1, 0.45, 0.5), "blue square": [(0, 0, 0.3, 1), (0.7, 0, 1, 1)]}
    editor = minidiff.Boxes(PICTURE, PROMPT, boxes)
    assert editor.value == {"red circle": [boxes["red circle"]], "blue square": boxes["blue square"]}
    assert editor.widget.classes[:3] == ["red circle", "blue square", "red"]
    assert repr(editor) == f"<Boxes: {editor.value}>"
    minidiff.Request(PROMPT, boxes=editor.value)


def test_weights_objects_of_one_phrase_and_what_is_no_box_come_back() -> None:
    third = 1 / 3
    boxes = {
        "cat": [{"box": (0, 0, third, 1)}, {"boxes": [(0.5, 0, 1, 0.5), (0.5, 0.6, 1, 1)], "weight": 1.5}],
        "red hat": {"box": (0.1, 0.2, third, 0.4), "weight": 0.1 + 0.2, "order": 2},
        "player #2": (0, 0, 0.5, 0.5),
        "dog": None,
        "ball": minidiff.Stroke([(0.2, 0.2), (0.8, 0.8)], width=0.2),
        "sky": np.eye(8),
    }
    editor = minidiff.Boxes(PICTURE, ["cat"], boxes)
    assert editor.widget.classes == ["cat", "cat #2 x1.5", f"red hat x{0.1 + 0.2!r}", "player #2"]

    def plain(layout: object) -> object:
        return minidiff.Request("a", boxes=layout).plain()["boxes"]

    value = editor.value
    assert plain(value) == plain(boxes)
    assert value["player #2"] == [(0, 0, 0.5, 0.5)] and value["cat"][0]["boxes"] == ((0, 0, third, 1),)
    drawn = {"x": 0, "y": 0, "width": 256, "height": 256, "label": "cat #3 x2"}
    editor.widget.bboxes = [*editor.widget.bboxes, drawn]
    assert editor.value["cat"][2] == {"weight": 2.0, "boxes": ((0.0, 0.0, 0.5, 1.0),)}
    for boxes, expected in ((None, [(0.0, 0.0, 0.5, 1.0)]), ({"bmw": {"box": (0, 0, 1, 1), "weight": 5}}, None)):
        editor = minidiff.Boxes(PICTURE, "a BMW X5", boxes)
        editor.widget.bboxes = [*editor.widget.bboxes, {**drawn, "label": "bmw x5"}]
        assert editor.value.get("bmw x5") == expected  # a phrase of the prompt, or a label that was there


def test_objects_whose_names_look_like_labels_of_others_stay_apart() -> None:
    left, right, low = (0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5), (0, 0.5, 1, 1)
    heavy = [{"box": left}, {"box": right, "weight": 1.5}]
    for boxes in (
        {"cat": [{"box": left}, {"box": right}], "cat #2": low},
        {"cat": heavy, "cat #2": {"box": low, "weight": 1.5}},
        {"cat": {"box": left, "weight": 1.5}, "cat x1.5": low},
    ):
        editor = minidiff.Boxes(PICTURE, ["cat"], boxes)
        assert len({drawn["label"] for drawn in editor.widget.bboxes}) == len(editor.widget.bboxes)
        value, wanted = (minidiff.Request("a", boxes=one).plain()["boxes"] for one in (editor.value, boxes))
        assert value == wanted


def test_a_drawn_box_is_in_parts_of_the_picture() -> None:
    """As the front end writes it: pixels of the enlarged picture, beyond its edges too."""
    editor = minidiff.Boxes(np.asarray(PICTURE), ["ball"])
    assert editor.value == {}
    click = {"x": 9, "y": 9, "width": 0, "height": 5, "label": "ball"}  # no box to follow
    editor.widget.bboxes = [{"x": 128, "y": 64, "width": 256, "height": 300.5, "label": "ball"}, click]
    assert editor.value == {"ball": [(0.25, 0.25, 0.75, 1.0)]}


def test_a_result_brings_its_phrases_and_boxes() -> None:
    boxes = {"red circle": (0.1, 0.1, 0.9, 0.9)}
    result = minidiff.generate("a red circle", boxes=boxes, guidance="none", steps=1, width=16, height=16)
    assert minidiff.Boxes(result).value == {"red circle": [(0.1, 0.1, 0.9, 0.9)]}


def test_what_cannot_be_drawn_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="phrases is None; expected what boxes can be named"):
        minidiff.Boxes(PICTURE)
    with pytest.raises(ValueError, match="image cannot be read"):
        minidiff.Boxes("none.png", PROMPT)
    monkeypatch.setitem(sys.modules, "jupyter_bbox_widget", None)
    with pytest.raises(ValueError, match=r"pip install 'minidiff\[notebook\]'"):
        minidiff.Boxes(PICTURE, PROMPT)


PAGE = """<style>CSS</style><body style="margin: 0"><div id="there"></div><script type="module">
const state = STATE, listeners = {};
state.image_bytes = Uint8Array.from(atob(state.image_bytes), (c) => c.charCodeAt(0));
window.state = state;
const model = {
  get: (name) => state[name], save_changes() {}, send() {}, off() {}, widget_manager: {},
  set(name, value, how) {
    state[name] = value;
    if (!how?.silent) (listeners['change:' + name] || []).forEach((f) => f());
  },
  on(name, f) { (listeners[name] ||= []).push(f); },
};
const widget = (await import('./main.mjs')).default;
await (typeof widget === 'function' ? await widget() : widget).render({ model, el: document.querySelector('#there') });
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("playwright") or CHROMIUM is None, reason="no Playwright or Chromium")
def test_a_box_is_drawn_with_the_mouse(tmp_path: Path) -> None:
    """By the widget's own code in Chromium, where a notebook would keep its values."""
    from playwright.sync_api import sync_playwright

    editor = minidiff.Boxes(PICTURE, ["red circle", "blue square"])
    state = editor.widget.get_state()
    state = {name: state[name] for name in editor.widget.keys if not name.startswith("_") and name in state}
    state = {name: value for name, value in state.items() if isinstance(value, str | int | list)}
    state["image_bytes"] = base64.b64encode(editor.widget.image_bytes).decode()
    page = PAGE.replace("CSS", str(widgets.BBoxWidget._css)).replace("STATE", json.dumps(state))
    (tmp_path / "page.html").write_text(page)
    (tmp_path / "main.mjs").write_text(str(widgets.BBoxWidget._esm))
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--allow-file-access-from-files"]
        )
        page = browser.new_page(viewport={"width": 900, "height": 700})
        page.goto((tmp_path / "page.html").as_uri())
        page.get_by_text("blue square").click()
        there = page.locator("img").bounding_box()
        assert there is not None and there["width"] == 512
        page.mouse.move(there["x"] + 128, there["y"] + 64)
        page.mouse.down()
        page.mouse.move(there["x"] + 256, there["y"] + 192, steps=4)
        page.mouse.up()
        page.get_by_text("red circle").click()
        page.mouse.move(there["x"] + 448, there["y"] + 128)
        page.mouse.down()
        page.mouse.move(there["x"] + 320, there["y"] + 64, steps=4)
        page.mouse.up()
        editor.widget.bboxes = page.evaluate("state.bboxes")
        browser.close()
    assert {phrase: boxes for phrase, (boxes,) in editor.value.items()} == {
        "blue square": pytest.approx((0.25, 0.25, 0.5, 0.75), abs=0.01),
        "red circle": pytest.approx((0.625, 0.25, 0.875, 0.5), abs=0.01),
    }
