"""The loss of the bundled model's UNet and text encoder."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTextModel, PreTrainedTokenizerFast

from ..guidance.layout import box_coverage
from ..networks.attention import ALL, Maps, Record
from ..networks.unet import UNet
from ..sampling import NoiseSchedule
from .folder import SCHEDULER
from .world import COLOURS, SHAPES, Scene

NO_CAPTION = 0.1  # share of the pictures without a caption, for classifier-free guidance (Ho and Salimans 2022)
WORDS_ALONE = 0.5  # share of the pictures whose context holds no end markers
OFFSET = 0.1  # spread of the mean of a channel's noise
GROUNDING = 0.1  # weight of the attention's loss beside the velocity's
ALPHAS_CUMPROD = NoiseSchedule.from_config(SCHEDULER).alphas_cumprod


def denoising_loss(
    unet: UNet,
    text: CLIPTextModel,
    tokenizer: PreTrainedTokenizerFast,
    latents: Tensor,
    scenes: Sequence[Scene],
    captions: Sequence[str],
    rng: np.random.Generator,
) -> Tensor:
    """Mean squared error of the predicted velocity (Salimans and Ho 2022, appendix D), and the `grounding_loss`.

    latents [B,4,h,w] at the UNet's scale, with a scene and a caption each. Four choices that are not in the paper:
    Velocity, not noise: at high noise, where a picture is laid out, it is the picture itself, while an error in the
    noise would be one 15 times as large in the picture.
    Timesteps that are more frequent the noisier they are, in proportion: what is where, and of which shape, is decided
    early, and the autoencoder forgives what is left at the end.
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
    t = torch.from_numpy((len(ALPHAS_CUMPROD) * np.sqrt(rng.random(size))).astype(np.int64))
    abar = ALPHAS_CUMPROD[t][:, None, None, None]
    noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32))
    noise += OFFSET * torch.from_numpy(rng.standard_normal((*latents.shape[:2], 1, 1), dtype=np.float32))
    noisy = abar.sqrt() * latents + (1 - abar).sqrt() * noise
    velocity = abar.sqrt() * noise - (1 - abar).sqrt() * latents
    record = Record(frozenset(site for site in unet.sites if site.kind == "cross"), ALL, rows="all")
    with torch.autocast("cpu", torch.bfloat16):
        context = text(input_ids=ids).last_hidden_state * keep[:, :, None]
        predicted, maps = unet(noisy, t, context, record)
    assert predicted is not None
    error = (predicted.float() - velocity).square().mean()
    return error + GROUNDING * grounding_loss(maps, token_boxes(texts, scenes, length))


def token_boxes(texts: Sequence[str], scenes: Sequence[Scene], length: int) -> Tensor:
    """The box of the object that each token names, [B,L,4] in [0,1]; zeros where it names none.

    A caption names the objects in the scene's order, each by its shape with or without its colour before it. Every
    word is one token, and so is every comma.
    """
    boxes = torch.zeros(len(texts), length, 4)
    for i, (text, scene) in enumerate(zip(texts, scenes, strict=True)):
        words = text.replace(",", " ,").split()
        nouns = [place for place, word in enumerate(words) if word in SHAPES]
        for place, thing in zip(nouns, scene.things, strict=False):  # no caption, no nouns
            boxes[i, place + 1] = torch.tensor(thing.box)  # the first token is BOS
            if words[place - 1] in COLOURS:
                boxes[i, place] = torch.tensor(thing.box)
    return boxes


def grounding_loss(maps: Maps, boxes: Tensor) -> Tensor:
    """How much of its attention an object's word gets outside of its box: TokenCompose (Wang et al. 2023), eq. 4.

    maps: {site: probabilities [B,H,h,w,L]}; boxes as `token_boxes` has them. Mean over sites, heads and tokens of
    (1 - sum over the box / sum)^2. Without it colours find their objects by themselves, in some heads, and shapes
    hardly at all.
    """
    named = (boxes[..., 2] > boxes[..., 0]).float()  # [B,L]
    losses = []
    for probs in maps.values():
        inside = torch.einsum("bhyxl,blyx->bhl", probs, box_coverage(boxes, probs.shape[2], probs.shape[3]))
        missed = (1 - inside / probs.sum(dim=(2, 3))).square().mean(dim=1)  # [B,L]
        losses.append((missed * named).sum() / named.sum().clamp_min(1))
    return torch.stack(losses).mean()
