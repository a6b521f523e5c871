"""The loss of the bundled model's UNet and text encoder."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTextModel, PreTrainedTokenizerFast

from ..networks.unet import UNet
from ..sampling import NoiseSchedule
from .folder import SCHEDULER

NO_CAPTION = 0.1  # share of the pictures without a caption, for classifier-free guidance (Ho and Salimans 2022)
WORDS_ALONE = 0.5  # share of the pictures whose context holds no end markers
OFFSET = 0.1  # spread of the mean of a channel's noise
ALPHAS_CUMPROD = NoiseSchedule.from_config(SCHEDULER).alphas_cumprod


def denoising_loss(
    unet: UNet,
    text: CLIPTextModel,
    tokenizer: PreTrainedTokenizerFast,
    latents: Tensor,
    captions: Sequence[str],
    rng: np.random.Generator,
) -> Tensor:
    """Mean squared error of the predicted velocity (Salimans and Ho 2022, appendix D), all timesteps alike.

    latents [B,4,h,w] at the UNet's scale, with a caption each. Three choices that are not in the paper:
    Velocity, not noise: at high noise, where a picture is laid out, it is the picture itself, while an error in the
    noise would be one 15 times as large in the picture.
    The end markers are zeroed in half of the contexts: they see the whole prompt, and the network would read them
    instead of the words, whose attention is wanted.
    The noise of a channel has a mean of its own (Guttenberg 2023, "offset noise"): the schedule ends with a little of
    the picture left, from which the network would otherwise read how bright it is, and sampling starts without.
    """
    size = len(latents)
    texts = ["" if rng.random() < NO_CAPTION else caption for caption in captions]
    length = tokenizer.model_max_length
    ids = torch.tensor(tokenizer(texts, padding="max_length", truncation=True, max_length=length)["input_ids"])
    keep = torch.from_numpy(rng.random((size, 1)) >= WORDS_ALONE) | (ids != tokenizer.eos_token_id)
    t = torch.from_numpy(rng.integers(0, len(ALPHAS_CUMPROD), size))
    abar = ALPHAS_CUMPROD[t][:, None, None, None]
    noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32))
    noise += OFFSET * torch.from_numpy(rng.standard_normal((*latents.shape[:2], 1, 1), dtype=np.float32))
    noisy = abar.sqrt() * latents + (1 - abar).sqrt() * noise
    velocity = abar.sqrt() * noise - (1 - abar).sqrt() * latents
    with torch.autocast("cpu", torch.bfloat16):
        context = text(input_ids=ids).last_hidden_state * keep[:, :, None]
        predicted, _ = unet(noisy, t, context)
    assert predicted is not None
    return (predicted.float() - velocity).square().mean()
