"""What a notebook shows of results, reports and maps, and of progress."""

import base64
import io
import re

import pytest
from PIL import Image

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
