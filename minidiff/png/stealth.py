"""Text hidden in the lowest bits of a picture's pixels ("stealth PNG info"), which survives the removal of text chunks.

After ashen-sensored/sd_webui_stealth_pnginfo: column by column, the lowest bits of the alpha channel, or of red, green
and blue, contain 15 letters that name the format, the length in bits (32 bits, big endian), and UTF-8, gzipped or not.
"""

from __future__ import annotations

import json
import zlib

import numpy as np
from PIL import Image

_MARKS = {b"stealth_pnginfo": False, b"stealth_pngcomp": True, b"stealth_rgbinfo": False, b"stealth_rgbcomp": True}
_LONGEST = 1_000_000  # bytes


def hidden_text(image: Image.Image) -> dict[str, str]:
    """{"parameters": text}, or NovelAI's several texts; empty if there are none. ValueError if they are damaged."""
    if image.format != "PNG" or image.mode not in ("RGB", "RGBA"):
        return {}
    for channels in [[3]] * (image.mode == "RGBA") + [[0, 1, 2]]:
        head = _lowest_bits(image, channels, 19)
        if head[:15] not in _MARKS:
            continue
        count = min(int.from_bytes(head[15:], "big") // 8, _LONGEST)
        data = _lowest_bits(image, channels, 19 + count)[19:]
        if _MARKS[head[:15]]:
            data = zlib.decompressobj(31).decompress(data, _LONGEST)  # 31: gzip
        text = data.decode()
        if text.lstrip().startswith("{"):
            values = json.loads(text)
            if isinstance(values, dict) and "Software" in values:
                return {str(key): str(value) for key, value in values.items()}
        return {"parameters": text}
    return {}


def _lowest_bits(image: Image.Image, channels: list[int], count: int) -> bytes:
    """The first `count` bytes in the lowest bits of the channels, from only the columns needed."""
    columns = -(-count * 8 // (image.height * len(channels)))
    pixels = np.asarray(image)[:, :columns, channels].swapaxes(0, 1).reshape(-1)
    return np.packbits(pixels[: count * 8] & 1).tobytes()
