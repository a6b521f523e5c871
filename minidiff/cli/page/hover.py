"""The words of a finished picture, whose heat maps show over it while the mouse is on them. Knows no gradio."""

from __future__ import annotations

import base64
import html
import io

from PIL import Image

from .studio import Look

_OUT = "document.querySelectorAll('#view .heat').forEach((one) => one.remove())"
# Laid over the picture, not put in its place: a preview may replace that meanwhile.
_OVER = """(() => { OUT; const view = document.querySelector('#view img:not(.heat)'); if (!view) return;
  const heat = new Image(); heat.className = 'heat'; heat.src = this.dataset.heat;
  const box = view.getBoundingClientRect(), there = view.offsetParent.getBoundingClientRect();
  Object.assign(heat.style, { left: `${box.left - there.left}px`, top: `${box.top - there.top}px`,
    width: `${box.width}px`, height: `${box.height}px` });
  view.after(heat); })()""".replace("OUT", _OUT)


def words(look: Look) -> str:
    """The words of a picture, each with its heat map under the mouse."""
    over, out = html.escape(_OVER), html.escape(_OUT)
    acts = f'onmouseenter="{over}" onfocus="{over}" onmouseleave="{out}" onblur="{out}"'
    found = [
        f'<span tabindex="0" data-heat="{_data(look.shown(word))}" {acts}>{html.escape(word)}</span>'
        for word in look.maps
        if " " not in word
    ]
    return f"Its attention, under the mouse: {''.join(found)}" if found else ""


def _data(picture: Image.Image) -> str:
    """A picture as an address, small."""
    picture.thumbnail((256, 256))
    held = io.BytesIO()
    picture.save(held, format="WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(held.getvalue()).decode()}"
