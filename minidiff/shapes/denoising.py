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

NO_CAPTION = 0.1  # fraction of pictures without a caption, for classifier-free guidance (Ho and Salimans 2022)
WORDS_ALONE = 0.5  # fraction of pictures whose context has no end markers
OFFSET = 0.1  # std of the mean of a channel's noise
GROUNDING = 0.1  # weight of the attention loss relative to the velocity loss
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
    """Mean squared error of the predicted velocity (Salimans and Ho 2022, appendix D), plus the `grounding_loss`.

    latents [B,4,h,w] at the UNet's scale, with one scene and caption each. Four choices that are not in the paper:
    Velocity instead of noise: at high noise, where the layout is decided, velocity is the picture itself, while an
    error in predicted noise would be 15 times as large in the picture.
    Timesteps are sampled in proportion to t: positions and shapes are decided early, and the autoencoder tolerates the
    noise that is left at the end.
    The end markers are zeroed in half of the contexts: they encode the whole prompt, and the network would attend to
    them instead of the words, whose attention is wanted.
    Each channel's noise has a random mean (Guttenberg 2023, "offset noise"): the last timestep still holds a little of
    the picture, from which the network would learn the brightness, but sampling starts from pure noise.
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
    """The box of the object that each token names, [B,L,4] in [0,1]; zeros for other tokens.

    A caption names the objects in the scene's order, by shape and optionally colour. Each word and each comma is one
    token.
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
    """Penalise attention to an object's words outside its box: TokenCompose (Wang et al. 2023), eq. 4.

    maps: {site: probabilities [B,H,h,w,L]}; boxes: from `token_boxes`. Mean over sites, heads and tokens of
    (1 - sum over the box / sum)^2. Without it the attention of colour words localises by itself in some heads, that of
    shape words hardly at all.
    """
    named = (boxes[..., 2] > boxes[..., 0]).float()  # [B,L]
    losses = []
    for probs in maps.values():
        inside = torch.einsum("bhyxl,blyx->bhl", probs, box_coverage(boxes, probs.shape[2], probs.shape[3]))
        missed = (1 - inside / probs.sum(dim=(2, 3))).square().mean(dim=1)  # [B,L]
        losses.append((missed * named).sum() / named.sum().clamp_min(1))
    return torch.stack(losses).mean()
