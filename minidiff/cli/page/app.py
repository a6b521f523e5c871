"""The page itself, in gradio: its controls, made from form.CONTROLS, and what happens when they are used."""

from __future__ import annotations

import hashlib
import html
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import gradio as gr
from gradio_image_annotation import image_annotator
from PIL import Image

from ..main import LOADING
from ..take import take
from ..values import LoraFlag
from . import form, hover
from .studio import BOXES, PICTURE, Look, Made, Progress, Source, Studio, differences, sheet, weighted

Given: TypeAlias = "dict[Any, Any]"
"""What the page holds, or what is to change in it, by component."""

_FIRST = ("prompt", "negative_prompt")  # above the board; the next are below it, the others folded away
_USUAL = ("guidance", "seed", "steps", "sampler", "guidance_scale", "width", "height", "images_per_prompt")
_START = "a red circle and a blue square"
_OUTPUTS = ("status", "view", "words", "file", "python", "command", "gallery", "go", "cancel")
_GREY = "#e8e8e8"
_CSS = """
.gradio-container { max-width: 1280px !important; }
#board canvas { max-width: 100%; touch-action: none; }
#status { min-height: 1.6em; overflow-wrap: anywhere; }
#status [role=alert] { color: var(--error-text-color, #b00020); font-weight: 600; }
#view img { width: 100%; height: 100%; object-fit: contain; }
#words span { display: inline-block; padding: 2px 8px; margin: 2px; border-radius: 4px; cursor: help; }
#words span:hover, #words span:focus { background: var(--color-accent-soft, #ddd); }
#view .heat { position: absolute; pointer-events: none; z-index: 1; }
#python textarea, #command textarea { font-family: monospace; font-size: 12px; }
"""


class Page:
    """The page of some sources to choose from. folder: where pictures are written, its own and those it starts from."""

    def __init__(self, sources: Sequence[Source], folder: Path) -> None:
        self.sources = {source.name: source for source in sources}
        self.first = sources[0]
        self.folder = folder
        self.studio = Studio(folder)
        self._held = tempfile.TemporaryDirectory(prefix="minidiff-page-")  # removed with the page
        self._shown = Path(self._held.name)  # previews and copies: all that is served
        self.parts: dict[str, Any] = {}

    # ---- the page from top to bottom

    def build(self) -> gr.Blocks:
        """The page, to be launched."""
        with gr.Blocks(title="minidiff", analytics_enabled=False) as page:
            add = self.parts
            add["stop"], add["made"], add["places"] = gr.State(None, delete_callback=_leave), gr.State([]), gr.State([])
            add["chosen"] = gr.State(None)
            gr.Markdown("## minidiff")
            for left, right in ((self._drawing, self._seeing), (self._settings, self._files)):  # a phone stacks them
                with gr.Row():
                    for column in (left, right):
                        with gr.Column(scale=1, min_width=320):
                            column()
            self._connect()
        return page

    def _drawing(self) -> None:
        add, names = self.parts, form.phrases(_START)
        self._fields(_FIRST)
        gr.HTML("Draw boxes, and name each by a phrase of the prompt.")
        add["board"] = image_annotator(
            {"image": Image.new("RGB", form.board_size(None, None), _GREY), "boxes": []},
            show_label=False,
            label_list=names,
            label_colors=form.colours(len(names)),
            image_type="pil",
            boxes_alpha=0.25,
            sources=[],
            show_download_button=False,
            show_clear_button=False,
            show_remove_button=True,
            elem_id="board",
        )
        with gr.Row():
            add["go"] = gr.Button("Generate", variant="primary", min_width=120, elem_id="go")
            add["cancel"] = gr.Button("Cancel", variant="stop", min_width=120, interactive=False, elem_id="cancel")

    def _seeing(self) -> None:
        add = self.parts
        add["status"] = gr.HTML(_said("Ready."), elem_id="status")
        add["view"] = gr.Image(
            show_label=False, format="png", interactive=False, height=480, buttons=["fullscreen"], elem_id="view"
        )
        add["words"] = gr.HTML("", elem_id="words")
        add["what"] = gr.Dropdown(_kinds(_START), value=BOXES, label="Show: a heat map of any word", elem_id="what")
        gr.HTML("Made since the page opened; choose one to see it again:")
        add["gallery"] = gr.Gallery(
            show_label=False, columns=4, height=200, allow_preview=False, fit_columns=False, elem_id="gallery"
        )

    def _settings(self) -> None:
        add = self.parts
        with gr.Row():
            self._fields(_USUAL)
        with gr.Accordion("Start from a picture", open=False):
            gr.HTML("Paint where it is to change, or nothing to change all of it.")
            add["start"] = gr.ImageEditor(
                show_label=False,
                type="pil",
                format="png",
                transforms=(),
                layers=False,
                brush=gr.Brush(colors=["#ffffff"], color_mode="fixed"),
                elem_id="start",
            )
            with gr.Row():
                self._fields(("strength", "fit"))
        if any(source.adapters for source in self.sources.values()):
            add["image_prompt"] = gr.Image(label="Prompt with a picture, too", type="filepath", elem_id="image_prompt")
        with gr.Accordion("Model and more settings", open=False):
            add["model"] = gr.Dropdown(list(self.sources), value=self.first.name, label="model", elem_id="model")
            for i, (file, weight, _) in enumerate(self.first.loras):
                start = 1.0 if weight is None else weight
                low, high = min(-2.0, start), max(2.0, start)
                name = f"LoRA {Path(file).stem}"
                add[f"lora {i}"] = gr.Slider(low, high, start, step=0.05, label=name, elem_id=f"lora{i}")
            with gr.Row():
                self._fields([name for name in form.CONTROLS if name not in add])
            add["every"] = gr.Slider(1, 20, 1, step=1, label="Preview every ... steps")
            info = f'Other fields of a request as JSON, such as {{"eta": 0.5}}: {", ".join(form.others())}'
            add["more"] = gr.Textbox("", label="Further settings", info=info, elem_id="more")

    def _files(self) -> None:
        add = self.parts
        add["file"] = gr.DownloadButton("Download PNG", interactive=False, elem_id="file")
        for name, label in (("python", "Python"), ("command", "Command line")):
            add[name] = gr.Textbox(
                label=label, lines=2, max_lines=12, buttons=["copy"], interactive=False, elem_id=name
            )
        gr.HTML("Take the settings of a picture: drop its PNG here.")
        add["dropped"] = gr.File(show_label=False, height=130, elem_id="dropped", file_types=["image"])

    def _fields(self, names: Sequence[str]) -> None:
        """The controls of fields of a request."""
        for name in names:
            kind, elem, label = form.CONTROLS[name], f"field-{name}", name.replace("_", " ")
            if kind is bool:
                made: Any = gr.Checkbox(True, label=f"{label} (for heat maps)", elem_id=elem)
            elif isinstance(kind, tuple):
                choices = [("default", ""), *((one, one) for one in kind)]
                made = gr.Dropdown(choices, value="", label=label, elem_id=elem, min_width=150)
            else:
                text, empty = _START if name == "prompt" else "", form.default(name)
                made = gr.Textbox(text, label=label, placeholder=empty, lines=1, elem_id=elem, min_width=150)
            self.parts[name] = made

    # ---- what happens

    def _connect(self) -> None:
        part = self.parts
        shown = [part[name] for name in ("status", "view", "words", "chosen", "file", "python", "command")]
        given = {one for name, one in part.items() if name not in _OUTPUTS}
        buttons = [part["go"], part["cancel"]]
        _at_once(part["go"].click, self._begin, None, [part["stop"], *buttons, part["status"]]).then(
            self._run,
            given,
            [*shown, part["made"], part["gallery"]],
            concurrency_limit=1,
            concurrency_id="run",
            show_progress="hidden",
        ).then(self._end, None, buttons, queue=False, show_progress="hidden")
        _at_once(part["cancel"].click, _leave, part["stop"], None)
        _at_once(part["what"].input, self._show, {part["chosen"], part["what"]}, [part["status"], part["view"]])
        _at_once(part["gallery"].select, self._choose, {part["made"], part["what"]}, shown)
        _at_once(part["prompt"].input, self._name, {part["prompt"], part["what"]}, [part["board"], part["what"]])
        for event in (part["width"].blur, part["height"].blur, part["start"].upload, part["start"].clear):
            _at_once(event, self._redraw, given, [part["board"]])
        filled = [part[name] for name in ("status", "places", "board", "what", "more", "dropped", *form.CONTROLS)]
        part["dropped"].upload(  # which may load the model
            self._take, given, [*filled, *self._loras()], concurrency_id="run", show_progress="hidden"
        )

    def _begin(self) -> tuple[Any, ...]:
        return (
            threading.Event(),
            gr.Button(interactive=False),
            gr.Button(interactive=True),
            _said("waiting for its turn"),
        )

    def _end(self) -> tuple[Any, ...]:
        return gr.Button(interactive=True), gr.Button(interactive=False)

    def _run(self, given: Given) -> Iterator[Given]:
        part = self.parts
        try:
            values, source, what = self._values(given), self._source(given), given[part["what"]]
            for now in self.studio.run(values, source, given[part["stop"]], given[part["every"]], what):
                made = [*reversed(now.made), *given[part["made"]]]
                new: Given = {part["status"]: _said(_progress(now))}
                if now.looks:
                    new[part["view"]] = sheet(now.looks, what) if now.made else self._preview(now.looks, what)
                for one in now.made:
                    shutil.copyfile(one.file, self._shown / one.file.name)
                if now.made:
                    tiles = [(str(self._shown / one.file.name), f"seed {one.seed}") for one in made]
                    new |= self._links(now.made[0]) | {part["made"]: made, part["gallery"]: tiles}
                yield new
        except (ValueError, OSError, RuntimeError) as error:
            yield {part["status"]: _said(str(error), wrong=True)}

    def _preview(self, looks: Sequence[Look], what: str) -> str:
        """A preview as a file: a JPEG is made in a fiftieth of a PNG's time."""
        path, picture = self._shown / "preview.jpg", sheet(looks, what)
        assert picture is not None
        picture.save(path, quality=90)
        return str(path)

    def _links(self, made: Made) -> Given:
        """A chosen picture as a file and as code."""
        part = self.parts
        return {
            part["chosen"]: made,
            part["words"]: hover.words(made.look),
            part["file"]: gr.DownloadButton(value=str(self._shown / made.file.name), interactive=True),
            part["python"]: made.python,
            part["command"]: made.command,
        }

    def _show(self, given: Given) -> Given:
        made, what = given[self.parts["chosen"]], given[self.parts["what"]]
        if made is None:
            return {self.parts["status"]: gr.skip()}
        try:
            return {self.parts["view"]: made.look.shown(what), self.parts["status"]: _said(made.report)}
        except ValueError as error:
            return {self.parts["status"]: _said(str(error), wrong=True)}

    def _choose(self, given: Given, event: gr.SelectData) -> Given:
        made = given[self.parts["made"]][event.index]
        return self._links(made) | self._show({**given, self.parts["chosen"]: made})

    def _name(self, given: Given) -> Given:
        """Offer the phrases of the prompt."""
        prompt, kinds = given[self.parts["prompt"]], _kinds(given[self.parts["prompt"]])
        what = given[self.parts["what"]]
        value = what if what in [name for _, name in kinds] else BOXES
        return {self.parts["board"]: _named(prompt), self.parts["what"]: gr.Dropdown(kinds, value=value)}

    def _redraw(self, given: Given) -> Given:
        """The board at the size of the picture, over the one that it starts from."""
        part = self.parts
        return {part["board"]: self._board(self._places(given), given)}

    def _take(self, given: Given) -> Given:
        """The settings of a picture, into the controls."""
        part, file = self.parts, given[self.parts["dropped"]]
        name = Path(file).name
        try:
            source = self.sources[given[part["model"]]]
            own = {"model": source.name, **self._pictures(given)}
            loras = [(path, None, None) for path, _, _ in source.loras]
            taken = take(file, own, {**dict.fromkeys(LOADING), **source.loading, "loras": loras})
            values, places, more = form.fill(taken.fields)
            # in float32, pictures do not say whether it was recorded, which moves no value by more than 1/255
            values["attention"] = values["attention"] or taken.found.info.get("dtype") == "float32"
            weights = [weight or 0.0 for _, weight, _ in cast("list[LoraFlag]", taken.loading["loras"])]
            loaded = weighted(source, weights)
            notes = [*taken.notes, *differences(taken, loaded, self.studio.model(loaded))]
        except (ValueError, OSError) as error:
            return {part["status"]: _said(str(error).replace(file, name), wrong=True), part["dropped"]: None}
        new = {part[field]: value for field, value in values.items()}
        new |= dict(zip(self._loras(), weights, strict=True))
        prompt = str(values["prompt"] or "")
        if '"boxes"' in more:
            notes.append("its boxes are in Further settings, since the board cannot show all that they hold")
        text = "; ".join([f"these are the settings of {name}", *notes]).replace(file, name)
        return new | {
            part["places"]: places,
            part["board"]: self._board(places, {**given, **new}),
            part["what"]: gr.Dropdown(_kinds(prompt), value=BOXES),
            part["more"]: more,
            part["status"]: _said(text),
            part["dropped"]: None,  # free for the next
        }

    # ---- what the page holds

    def _values(self, given: Given) -> form.Values:
        entered = {name: given[self.parts[name]] for name in form.CONTROLS}
        return form.read(entered, self._places(given), given[self.parts["more"]]) | self._pictures(given)

    def _source(self, given: Given) -> Source:
        return weighted(self.sources[given[self.parts["model"]]], [given[one] for one in self._loras()])

    def _loras(self) -> list[Any]:
        return [one for name, one in self.parts.items() if name.startswith("lora ")]

    def _places(self, given: Given) -> list[form.Place]:
        board = given[self.parts["board"]]
        return (
            []
            if board is None
            else form.from_annotations(board["boxes"], board["image"].size, given[self.parts["places"]])
        )

    def _pictures(self, given: Given) -> dict[str, Any]:
        """The pictures to start from, as files, which the code and the command line name."""
        found: dict[str, Any] = {}
        start = given[self.parts["start"]] or {}
        if start.get("background") is not None:
            found["image"] = self._written(start["background"])
            masks = [layer.getchannel("A") for layer in start["layers"] if layer is not None and layer.getbbox()]
            if masks:
                found["mask"] = self._written(masks[0].point(lambda alpha: 255 if alpha > 127 else 0))
        prompt = given[self.parts["image_prompt"]] if "image_prompt" in self.parts else None
        return found | ({"image_prompt": prompt} if prompt else {})

    def _written(self, image: Image.Image) -> str:
        name = hashlib.sha256(image.tobytes() + repr(image.size).encode()).hexdigest()[:12]
        path = self.folder / "started-from" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
        return str(path)

    def _board(self, places: Sequence[form.Place], given: Given) -> Any:
        start = (given[self.parts["start"]] or {}).get("background")
        typed = [given[self.parts[name]].strip() for name in ("width", "height")]
        known = all(text.isdecimal() and len(text) < 6 for text in typed)
        size = form.board_size(*(map(int, typed) if known else start.size if start else (None, None)))
        under = Image.new("RGB", size, _GREY) if start is None else start.convert("RGB").resize(size)
        board = {"image": under, "boxes": form.to_annotations(places, size)}
        return _named(given[self.parts["prompt"]], [phrase for phrase, _ in places], value=board)


# ---- parts of it


def _at_once(event: Callable[..., Any], then: Callable[..., Any], inputs: Any, outputs: Any) -> Any:
    """Do something that takes no time, beside a run."""
    return event(then, inputs, outputs, queue=False, show_progress="hidden")


def _leave(stop: threading.Event | None) -> None:
    """Stop a run: by its button, or when its page is closed."""
    if stop is not None:
        stop.set()


def _said(text: str, wrong: bool = False) -> str:
    return f'<div role="{"alert" if wrong else "status"}">{html.escape(text)}</div>'


def _progress(now: Progress) -> str:
    reports = [one.report for one in now.made if one.report]
    return "; ".join([str(now), *reports, *(f"note: {note}" for note in now.notes)])


def _kinds(prompt: str) -> list[tuple[str, str]]:
    """What can be shown of a picture, and how it is called."""
    names = dict.fromkeys([*form.phrases(prompt), *form.words(prompt)])
    return [("the picture", PICTURE), ("its boxes", BOXES), *((name, name) for name in names)]


def _named(prompt: str, more: Sequence[str] = (), value: Any = None) -> Any:
    """The board with the phrases of a prompt to choose from."""
    names = list(dict.fromkeys([*form.phrases(prompt), *more])) or ["a phrase"]
    shown = {} if value is None else {"value": value}
    return image_annotator(label_list=names, label_colors=form.colours(len(names)), image_type="pil", **shown)


def launch(page: Page, host: str = "127.0.0.1", port: int | None = None, wait: bool = True) -> tuple[gr.Blocks, str]:
    """Serve a page, and return it with its address; `wait` until it is interrupted. OSError if the port is taken."""
    blocks = page.build()
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none from the network
    _, address, _ = blocks.launch(
        server_name=host,
        server_port=port,
        theme=theme,
        css=_CSS,
        prevent_thread_lock=True,
        quiet=True,
        ssr_mode=False,
        footer_links=[],
    )
    if wait:
        print(f"{address} (pictures are written to {page.folder})", flush=True)
        blocks.block_thread()
    return blocks, address
