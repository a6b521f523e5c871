"""The page in a real browser: the installed Chromium, driven by Playwright."""

import base64
import importlib.util
import io
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import minidiff
from minidiff.cli.main import main
from minidiff.cli.page.studio import Source

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MISSING = [name for name in ("gradio", "gradio_image_annotation", "playwright") if not importlib.util.find_spec(name)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING or CHROMIUM is None),
        reason=f"no {', '.join(MISSING) or 'Chromium'}: pip install 'minidiff[page]' playwright; apt install chromium",
    ),
]
WATCH = """() => {
  window.seen = [];
  const look = () => {
    const text = document.querySelector('#status').innerText, image = document.querySelector('#view img');
    seen.push([text, image ? image.src : '']);
  };
  for (const id of ['#status', '#view']) {
    const what = { subtree: true, childList: true, characterData: true, attributes: true };
    new MutationObserver(look).observe(document.querySelector(id), what);
  }
}"""
DROP = """(encoded) => {
  const bytes = Uint8Array.from(atob(encoded), (c) => c.charCodeAt(0)), data = new DataTransfer();
  data.items.add(new File([bytes], 'made.png', { type: 'image/png' }));
  return data;
}"""


@pytest.fixture(scope="module")
def steps() -> list:
    """What runs told the page: (step, whether it was cancelled before)."""
    return []


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, steps: list) -> Iterator[str]:
    from minidiff.cli.page.app import Page, launch

    page = Page([Source()], tmp_path_factory.mktemp("made"))
    run = page.studio.run

    def watched(values: object, source: Source, stop: object, *more: object) -> Iterator:
        steps.clear()
        for now in run(values, source, stop, *more):
            steps.append((now, stop.is_set()))
            yield now

    page.studio.run = watched
    blocks, address = launch(page, wait=False)
    yield address
    blocks.close()


@pytest.fixture(scope="module")
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(browser: object, address: str, request: pytest.FixtureRequest) -> Iterator:
    tab = browser.new_page(viewport={"width": getattr(request, "param", 1280), "height": 900})
    tab.goto(address)
    tab.wait_for_selector("#board canvas")
    tab.evaluate(WATCH)
    yield tab
    tab.close()


def draw_box(tab: object, box: tuple, phrase: str) -> None:
    board = tab.locator("#board canvas")
    board.scroll_into_view_if_needed()
    at = board.bounding_box()
    side = min(at["width"], at["height"])
    left, top = at["x"] + (at["width"] - side) / 2, at["y"] + (at["height"] - side) / 2
    tab.mouse.move(left + box[0] * side, top + box[1] * side)
    tab.mouse.down()
    tab.mouse.move(left + box[2] * side, top + box[3] * side, steps=4)
    tab.mouse.up()
    tab.locator("#model-box-edit input").first.click()
    tab.get_by_role("option", name=phrase, exact=True).click()
    tab.locator("#model-box-edit").get_by_text("OK", exact=True).click()


def enter(tab: object, **fields: str) -> None:
    for name, text in fields.items():
        field = tab.locator(f"#field-{name} textarea, #field-{name} input").first
        field.fill(text)
        field.press("Tab")


def choose(tab: object, part: str, option: str) -> None:
    tab.locator(f"{part} input").click()
    tab.get_by_role("option", name=option, exact=True).click()


def generate(tab: object, steps: int) -> Path:
    """Press the button, wait for the end, and return the file that the page offers."""
    tab.locator("#go").click()
    tab.wait_for_function(f"document.querySelector('#status').innerText.startsWith('made in {steps} steps')")
    tab.locator("#go:enabled").wait_for()
    with tab.expect_download() as download:
        tab.locator("#file").click()
    return Path(download.value.path())


def shown(tab: object) -> dict[str, str]:
    """What the controls of fields show."""
    every = tab.locator("[id^=field-]")
    held = every.evaluate_all(
        "all => all.map(one => [one.id, one.querySelector('textarea, input')]).map(([id, i]) => "
        "[id, i.type == 'checkbox' ? String(i.checked) : i.value])"
    )
    return dict(held)


def test_two_boxes_are_drawn_and_the_picture_is_made_again(tab: object, steps: list, tmp_path: Path) -> None:
    tab.get_by_text("Model and more settings").click()
    draw_box(tab, (0.05, 0.1, 0.45, 0.5), "red circle")
    draw_box(tab, (0.55, 0.5, 0.95, 0.9), "blue square")
    enter(
        tab, seed="7", steps="8", guidance_scale="3", width="128", height="128", clip_skip="0", negative_prompt="green"
    )
    choose(tab, "#field-guidance", "inside")
    choose(tab, "#field-sampler", "dpmpp_2m")
    choose(tab, "#field-schedule", "karras")
    tab.locator("#more textarea").fill('{"guidance_rescale": 0.25}')
    file = generate(tab, 8)

    seen = tab.evaluate("seen")
    told = [int(found[1]) for text, _ in seen if (found := re.match(r"step (\d+) of 8", text))]
    assert told == sorted(told) and len(set(told)) >= 6  # gradio may drop one that is followed at once
    assert len({image for _, image in seen}) >= 6
    assert [now.step for now, _ in steps] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]

    made = minidiff.read_parameters(file)
    assert list(made["boxes"]) == ["red circle", "blue square"]
    assert made["boxes"]["blue square"]["boxes"][0] == pytest.approx([0.55, 0.5, 0.95, 0.9], abs=0.005)
    line = tab.locator("#command textarea").input_value()
    kept = steps[-1][0].made[0].file
    assert kept.read_bytes() == file.read_bytes()
    assert tab.request.get(f"{tab.url}gradio_api/file={kept}").status == 403  # a copy is served, and not its folder
    assert main([*shlex.split(line)[1:-1], str(tmp_path / "again.png")]) == 0
    assert Image.open(tmp_path / "again.png").tobytes() == Image.open(file).tobytes()

    view = tab.locator("#view img:not(.heat)")
    before = view.get_attribute("src")
    choose(tab, "#what", "circle")
    tab.wait_for_function("before => document.querySelector('#view img').src != before", arg=before)
    heat = minidiff.generate(minidiff.Request.from_plain(made), attention=True)
    wanted = minidiff.draw.heatmap(heat.image, heat.attention["circle"][0], "circle")
    (tmp_path / "heat.png").write_bytes(tab.request.get(view.get_attribute("src")).body())
    assert Image.open(tmp_path / "heat.png").convert("RGB").tobytes() == wanted.tobytes()

    for word in ("red", "square"):
        tab.locator("#words").get_by_text(word, exact=True).hover()
        over = tab.locator("#view .heat")
        data = over.get_attribute("src").partition(",")[2]
        laid = Image.open(io.BytesIO(base64.b64decode(data)))
        under = heat.image.convert("L").convert("RGB").resize(laid.size)
        under.paste(laid, mask=laid)
        wanted = minidiff.draw.heatmap(heat.image, heat.attention[word][0]).resize(laid.size)
        assert abs(np.asarray(under, dtype=float) - np.asarray(wanted)).mean() < 8
        assert "grayscale" in view.get_attribute("style")
        assert over.bounding_box() == pytest.approx(view.first.bounding_box(), abs=1)
    tab.locator("#status").hover()
    assert over.count() == 0

    held = shown(tab)
    tab.reload()
    tab.wait_for_selector("#board canvas")
    tab.get_by_text("Model and more settings").click()
    data = tab.evaluate_handle(DROP, base64.b64encode(file.read_bytes()).decode())
    tab.locator("#dropped button").first.dispatch_event("drop", {"dataTransfer": data})
    tab.wait_for_function("document.querySelector('#status').innerText.includes('the settings of made.png')")
    tab.wait_for_timeout(300)
    now = shown(tab)
    assert {name: value for name, value in now.items() if held[name] not in ("", "default", "the model's")} == {
        name: value for name, value in held.items() if value not in ("", "default", "the model's")
    }
    assert tab.locator("#more textarea").input_value() == '{"guidance_rescale": 0.25}'
    assert Image.open(generate(tab, 8)).tobytes() == Image.open(file).tobytes()


def test_cancel_stops_before_the_next_step_and_bad_input_is_a_message(tab: object, steps: list) -> None:
    enter(tab, steps="300")
    tab.locator("#go").click()
    tab.wait_for_function("document.querySelector('#status').innerText.startsWith('step 2')")
    tab.locator("#cancel").click()
    tab.wait_for_function("document.querySelector('#status').innerText.startsWith('stopped after')")
    tab.locator("#go:enabled").wait_for()
    assert steps[-1][0].stopped and sum(cancelled for now, cancelled in steps if not now.stopped) <= 1
    enter(tab, steps="8", width="7")
    tab.locator("#go").click()
    tab.wait_for_selector("#status [role=alert]")
    assert "width is 7" in tab.locator("#status").inner_text()
    enter(tab, width="")
    assert Image.open(generate(tab, 8)).size == (128, 128)


def test_a_second_tab_waits_for_its_turn(tab: object, browser: object, address: str) -> None:
    other = browser.new_page()
    other.goto(address)
    other.wait_for_selector("#board canvas")
    for one, steps in ((tab, "300"), (other, "3")):
        enter(one, steps=steps)
    tab.locator("#go").click()
    tab.wait_for_function("document.querySelector('#status').innerText.startsWith('step')")
    other.locator("#go").click()
    other.wait_for_function("document.querySelector('#status').innerText.includes('waiting for its turn')")
    other.wait_for_timeout(500)
    assert "waiting for its turn" in other.locator("#status").inner_text()
    tab.locator("#cancel").click()
    other.wait_for_function("document.querySelector('#status').innerText.startsWith('made in 3 steps')")
    tab.wait_for_function("document.querySelector('#status').innerText.startsWith('stopped after')")
    other.close()


@pytest.mark.parametrize("tab", [1280, 390], indirect=True)
def test_nothing_overlaps(tab: object, tmp_path: Path) -> None:
    """Blocks that stand beside or below one another do not overlap, and nothing is wider than the page."""
    draw_box(tab, (0.05, 0.1, 0.45, 0.5), "red circle")
    enter(tab, seed="7", steps="3")
    generate(tab, 3)
    for name in ("Start from a picture", "Model and more settings"):
        tab.get_by_text(name).click()
    tab.wait_for_timeout(500)
    width = tab.viewport_size["width"]
    tab.screenshot(path=tmp_path / f"page-{width}.png", full_page=True)
    print(tmp_path)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    overlapping = tab.evaluate("""() => {
      const parts = [...document.querySelectorAll('.block, button.lg')].filter((one) => one.offsetParent);
      const found = [];
      for (const a of parts) for (const b of parts) {
        if (a === b || a.contains(b) || b.contains(a)) continue;
        const p = a.getBoundingClientRect(), q = b.getBoundingClientRect();
        const x = Math.min(p.right, q.right) - Math.max(p.left, q.left);
        const y = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
        if (x > 1 && y > 1) found.push([a.id || a.className, b.id || b.className]);
      }
      return found;
    }""")
    assert overlapping == []
