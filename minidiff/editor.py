"""Boxes: drawn with the mouse in a notebook, as generate(boxes=) takes them. The widget is jupyter-bbox-widget's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checks import shown
from .draw import Picture, to_image
from .guidance.labels import Labelled, from_labels, to_labels
from .guidance.layout import Box, read_objects
from .pictures import read_picture
from .png.write import png_bytes
from .prompts.named import phrases as phrases_of
from .result import Result

if TYPE_CHECKING:
    from .guidance.layout import Boxes as Layout

_LEAST = 512  # pixels of the longer edge that is drawn on


class Boxes:
    """A box editor, the last value of a notebook's cell; needs the extra [notebook].

        editor = minidiff.Boxes(picture, "a red circle and a blue square")     # draw, then in another cell:
        minidiff.generate("a red circle and a blue square", boxes=editor.value)

    image: what is drawn on: a PIL image, an array [H,W,3], a tensor [3,H,W] or a file; or a Result of one image, with
    its phrases and boxes. phrases: what boxes can be named, or a prompt, whose phrases they are then; "cat #2" is a
    second object of the phrase "cat", and "cat x1.5" has the weight 1.5. boxes: to begin with, as generate() takes
    them; masks, strokes and objects without a place are not shown, and stay in `value`. Choose a phrase below the
    picture, and draw; drag a box, its edges or its corners to change it, Delete removes it, C gives it the phrase
    chosen. `widget` is the BBoxWidget itself, to observe(). ValueError for a Result of several images, no phrases, and
    a missing package.
    """

    def __init__(
        self,
        image: Result | Picture | str | Path,
        phrases: str | Sequence[str] | None = None,
        boxes: Layout | None = None,
    ) -> None:
        if isinstance(image, Result):
            asked = image.parameters[0]
            phrases, boxes = asked.get("prompt") if phrases is None else phrases, boxes or asked.get("boxes")  # type: ignore[assignment]
            image = image.image
        if phrases is not None and not isinstance(phrases, str | list | tuple):
            raise ValueError(f"phrases is {shown(phrases)}; expected a prompt, or a list of phrases")
        self._known = read_objects(boxes or {})
        self._phrases = phrases_of(phrases) if isinstance(phrases, str) else ()
        places = to_labels(self._known)
        found = [*(label for label, _ in places), *(self._phrases if isinstance(phrases, str) else phrases or ())]
        if not found or not all(isinstance(one, str) for one in found):
            raise ValueError(
                f"phrases is {shown(phrases)}; expected what boxes can be named, such as a prompt, or "
                '["red circle", "blue square"]'
            )
        picture = to_image(read_picture("image", image))
        scale = max(1.0, _LEAST / max(picture.size))
        picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
        self._size = picture.size
        self.widget = _widget(classes=list(dict.fromkeys(found)), hide_buttons=True)
        self.widget.image_bytes = png_bytes(picture)
        self.widget.bboxes = [_drawn(label, box, picture.size) for label, box in places]
        self._exact = dict(zip(map(_key, self.widget.bboxes), places, strict=True))

    @property
    def value(self) -> dict[str, Any]:
        """The boxes drawn so far, from the left and top in [0,1]; several of a phrase are one object in any of them."""
        found: list[Labelled] = []
        width, height = self._size
        for one in self.widget.bboxes:
            if _key(one) in self._exact:
                found.append(self._exact[_key(one)])
                continue
            x, y = one["x"], one["y"]
            pairs = ((x, width), (y, height), (x + one["width"], width), (y + one["height"], height))
            x0, y0, x1, y1 = (min(1.0, max(0.0, round(at / edge, 4))) for at, edge in pairs)
            if x0 < x1 and y0 < y1:  # a click leaves a box without area
                found.append((one["label"], (x0, y0, x1, y1)))
        return from_labels(found, self._known, self._phrases)

    def __repr__(self) -> str:
        return f"<Boxes: {self.value}>"

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> object:
        """For a notebook: the widget."""
        return self.widget._repr_mimebundle_(include=include, exclude=exclude)


def _key(drawn: dict[str, Any]) -> tuple[object, ...]:
    return tuple(drawn[name] for name in ("label", "x", "y", "width", "height"))


def _drawn(label: str, box: Box, size: tuple[int, int]) -> dict[str, Any]:
    x0, y0, x1, y1 = (at * size[i % 2] for i, at in enumerate(box))
    return {"x": x0, "y": y0, "width": x1 - x0, "height": y1 - y0, "label": label}


def _widget(**options: object) -> Any:
    try:
        from jupyter_bbox_widget import BBoxWidget
    except ImportError as error:
        raise ValueError("minidiff.Boxes needs jupyter-bbox-widget; pip install 'minidiff[notebook]'") from error
    return BBoxWidget(**options)
