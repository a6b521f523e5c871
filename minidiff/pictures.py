"""Pictures as tensors of the networks that look at them."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(
    images: Sequence[Image.Image], edge: int = 224, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> Tensor:
    """RGB images -> [B,3,edge,edge] float32, as CLIP's image encoder reads them (transformers' CLIPImageProcessor).

    The shorter edge is resized to `edge`, bicubic in 8 bits, and the middle cut out; per channel (value - mean) / std
    of values in [0,1].
    """
    found = []
    for image in images:
        short = min(image.size)
        width, height = (edge if size == short else edge * size // short for size in image.size)
        left, top = (width - edge) // 2, (height - edge) // 2
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        found.append(np.asarray(resized.crop((left, top, left + edge, top + edge)), dtype=np.float32))
    pixels = torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2) / 255
    return (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
