"""Text hidden in the lowest bits of a picture's pixels ("stealth PNG info"), which survives where text chunks are cut.

After ashen-sensored/sd_webui_stealth_pnginfo: column by column, the lowest bits of the alpha channel, or of red, green
and blue, hold 15 letters that name the form, the length in bits (32 bits, big endian), and UTF-8, gzipped or plain.
"""

from __future__ import annotations

import json
import zlib

import numpy as np
from PIL import Image

_MARKS = {b"stealth_pnginfo": False, b"stealth_pngcomp": True, b"stealth_rgbinfo": False, b"stealth_rgbcomp": True}
_LONGEST = 1_000_000  # bytes


def hidden_text(image: Image.Image) -> dict[str, str]:
    """{"parameters": text}, or NovelAI's several texts; empty where there are none. ValueError where it is damaged."""
    if image.format != "PNG" or image.mode not in ("RGB", "RGBA"):
        return {}
    for channels in [[3]] * (image.mode == "RGBA") + [[0, 1, 2]]:
        pixels = np.asarray(image)[..., channels].swapaxes(0, 1).reshape(-1)
        mark = np.packbits(pixels[: 15 * 8] & 1).tobytes()
        if mark not in _MARKS:
            continue
        count = int.from_bytes(np.packbits(pixels[15 * 8 : 19 * 8] & 1).tobytes(), "big") // 8
        data = np.packbits(pixels[19 * 8 : 19 * 8 + min(count, _LONGEST) * 8] & 1).tobytes()
        if _MARKS[mark]:
            data = zlib.decompressobj(31).decompress(data, _LONGEST)  # 31: gzip
        text = data.decode()
        if text.lstrip().startswith("{"):
            values = json.loads(text)
            if isinstance(values, dict) and "Software" in values:
                return {str(key): str(value) for key, value in values.items()}
        return {"parameters": text}
    return {}
