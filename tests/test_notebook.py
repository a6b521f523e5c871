"""What a notebook shows of results, reports and maps, and of progress."""

import base64
import io
import re
import sys
import types
from pathlib import Path

import pytest
from PIL import Image
from test_readme import BLOCKS

import minidiff


@pytest.fixture(scope="module")
def result() -> minidiff.Result:
    """One guided step, with maps."""
    boxes = {"red circle": (0.1, 0.1, 0.9, 0.9)}
    return minidiff.generate(
        "a red circle", boxes=boxes, attention=True, reduce="per_step", steps=1, width=16, height=16, seed=1
    )


def test_a_guided_result_shows_its_picture_with_boxes_and_report(result: minidiff.Result) -> None:
    shown = result._repr_html_()
    assert shown is not None and "red circle: " in shown and "guidance moved" in shown
    (data,) = re.findall(r"base64,([^\"]+)", shown)
    picture = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
    expected = minidiff.draw.boxes(result.image, {"red circle": (0.1, 0.1, 0.9, 0.9)})
    assert picture.tobytes() == expected.tobytes()


def test_a_report_escapes_what_users_wrote(result: minidiff.Result) -> None:
    from dataclasses import replace

    assert result.reports is not None
    report = replace(result.reports[0], names=("<script>",))
    assert "<script>" not in report._repr_html_() and "&lt;script&gt;" in report._repr_html_()
    assert replace(report, why_not="a < b")._repr_html_() == "guidance did not act: a &lt; b"


def test_maps_show_each_word(result: minidiff.Result) -> None:
    assert result.attention is not None
    shown = result.attention._repr_png_()
    assert shown is not None and Image.open(io.BytesIO(shown)).width > 3 * 24


def test_without_reports_the_png_shows() -> None:
    plain = minidiff.generate("a red circle", steps=1, width=16, height=16, seed=1)
    assert plain._repr_html_() is None and plain._repr_png_() is not None


NOTEBOOK = """
import minidiff
prompt = "a red circle and a blue square"
editor = minidiff.Boxes(minidiff.generate(prompt, seed=1), boxes={"red circle": (0.05, 0.1, 0.45, 0.5)})
editor                                                   # draw; in the next cell:
minidiff.generate(prompt, boxes=editor.value, seed=1)    # the picture with its boxes, and what guidance did
"""


def test_the_notebook_is_readme_s() -> None:
    lines = [block for block in BLOCKS if "minidiff.Boxes(" in block]
    assert lines == [NOTEBOOK.strip()]


@pytest.mark.slow
def test_a_notebook_shows_an_editor_a_bar_a_picture_and_a_report(tmp_path: Path) -> None:
    """README's, with fewer steps and pixels."""
    client = pytest.importorskip("nbclient", reason="a notebook needs nbclient and ipykernel")
    pytest.importorskip("jupyter_bbox_widget", reason="no jupyter-bbox-widget: pip install 'minidiff[notebook]'")
    import nbformat

    first, second = NOTEBOOK.replace("seed=1", "seed=1, steps=2, width=32, height=32").split(
        "# draw; in the next cell:"
    )
    v4 = nbformat.v4
    book = v4.new_notebook(cells=[v4.new_code_cell(text) for text in (first, second)])
    client.NotebookClient(book, timeout=120, resources={"metadata": {"path": tmp_path}}).execute()
    (drawing, editor), (guiding, result) = (cell.outputs for cell in book.cells)
    widgets = book.metadata["widgets"]["application/vnd.jupyter.widget-state+json"]["state"]

    def widget(output: dict) -> dict:
        return widgets[output["data"]["application/vnd.jupyter.widget-view+json"]["model_id"]]["state"]

    assert widget(editor)["classes"][0] == "red circle" and len(widget(editor)["bboxes"]) == 1
    for bar in (drawing, guiding):
        _, scale, text = (widgets[name.removeprefix("IPY_MODEL_")]["state"] for name in widget(bar)["children"])
        assert scale["value"] == scale["max"] == 2 and "2/2" in text["value"]
    assert "guidance moved" in result["data"]["text/html"] and "<img src=" in result["data"]["text/html"]
    (data,) = re.findall(r"base64,([^\"]+)", result["data"]["text/html"])
    assert Image.open(io.BytesIO(base64.b64decode(data))).size[0] >= 32


@pytest.mark.parametrize(
    ("asked", "there", "shown"),
    [(None, "", ""), (None, "terminal", "2/2"), (None, "ipykernel", "2/2"), (False, "terminal", ""), (True, "", "2/2")],
)
def test_a_bar_shows_in_a_terminal_and_in_a_notebook(
    asked: bool | None, there: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return there == "terminal"

    stream = Stream()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    if there == "ipykernel":
        monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    result = minidiff.generate("a red circle", steps=2, width=8, height=8, seed=1, progress=asked)
    assert shown in stream.getvalue() and bool(shown) == bool(stream.getvalue())
    assert "progress" not in result.parameters[0]
