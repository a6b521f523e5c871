"""The words of a finished picture, whose heat maps show over it while the mouse is on them. Knows no gradio."""

from __future__ import annotations

import base64
import html
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...draw import heat_colours
from .studio import Look

_LARGEST = 96  # pixels: the browser smooths them
_OUT = """document.querySelectorAll('#view .heat').forEach((one) => one.remove());
  document.querySelectorAll('#view img').forEach((one) => one.style.filter = '')"""
# Laid over the picture, not put in its place: a preview may replace that meanwhile.
_OVER = """(() => { OUT; const view = document.querySelector('#view img:not(.heat)'); if (!view) return;
  const heat = new Image(); heat.className = 'heat'; heat.src = this.dataset.heat;
  const box = view.getBoundingClientRect(), there = view.offsetParent.getBoundingClientRect();
  Object.assign(heat.style, { left: `${box.left - there.left}px`, top: `${box.top - there.top}px`,
    width: `${box.width}px`, height: `${box.height}px` });
  view.style.filter = 'grayscale(1)'; view.after(heat); })()""".replace("OUT", _OUT)


def words(look: Look) -> str:
    """The words of a picture, each with its heat map under the mouse."""
    over, out = html.escape(_OVER), html.escape(_OUT)
    acts = f'onmouseenter="{over}" onfocus="{over}" onmouseleave="{out}" onblur="{out}"'
    found = [
        f'<span tabindex="0" data-heat="{_data(heat, look.image.size)}" {acts}>{html.escape(word)}</span>'
        for word, heat in look.maps.items()
        if " " not in word
    ]
    return f"Its attention, under the mouse: {''.join(found)}" if found else ""


def _data(heat: NDArray[np.float32], size: tuple[int, int]) -> str:
    """The colours of draw.heatmap, as transparent as there, as an address."""
    share = Image.fromarray(heat / max(float(heat.max()), 1e-30))
    width, height = (max(1, round(edge * _LARGEST / max(size))) for edge in size)
    smooth = np.asarray(share.resize((width, height), Image.Resampling.BICUBIC)).clip(0, 1)
    pixels = np.dstack([heat_colours(smooth), 255 * (0.25 + 0.6 * smooth)])
    held = io.BytesIO()
    Image.fromarray(pixels.round().astype(np.uint8)).save(held, format="PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}"
