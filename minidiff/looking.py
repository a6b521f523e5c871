"""look(): what a network sees in a picture, for the words of a prompt and for others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .canvas import picture_latents
from .checks import shown, wholes
from .model import Model
from .networks.attention import HEAD_MEAN, Edit, Inputs, Maps, Record
from .networks.sites import SECOND_COARSEST, Grid, Position, Site, choose, cross
from .noise import Noise
from .recorded import MEAN, Attention, SiteMaps
from .request import Request
from .resolve import latent_shape, resolve
from .texts import Texts
from .vocabulary import BUNDLED
from .weights.load import load

if TYPE_CHECKING:
    from .draw import Picture

TIMES = (250, 350, 450)
"""The training timesteps whose noise look() adds."""
_HIDDEN = -30.0
"""Added to the logits of words besides the prompt: exp(-30) is nothing beside the others, yet float32 holds it."""


def look(
    image: Picture | str | Path | Sequence[Any],
    prompt: str | Sequence[str],
    *,
    model: Model | str | Path = BUNDLED,
    times: int | Sequence[int] = TIMES,
    seeds: int | Sequence[int] = 0,
    words: str | Sequence[str] = (),
    record: Record | None = None,
    width: int | None = None,
    height: int | None = None,
    fit: str = "resize",
) -> Attention:
    """The attention of a picture's pixels to the words of a prompt: `look(picture, "a cat and a ball")["ball"]`.

    The picture is encoded and gets the noise of each of `times` (training timesteps, 0 to 999) for each seed; the
    network reads it with the prompt, in one pass for all times; the maps are means over times and seeds, as in
    DAAM-i2i. Nothing is sampled.

    image, prompt, width, height, fit: as in generate(), one picture for all prompts or one each.
    words: phrases to ask for besides, which the prompt need not hold (OVAM, Marcos-Manchon et al. 2024). Each is
        encoded alone. Its tokens get p = s / (1 + s), where s is exp(logit) as a share of the prompt's (the mean over
        heads): about what each would get if it stood there too. They change nothing that the network computes.
    record: which sites, kept as minidiff.HEAD_MEAN or ALL; None: the last layer of the second-coarsest grid, which
        measures best (python -m bench look). `minidiff.self_` sites make `from_pixel` work.

    ValueError for a picture that cannot be read, times that the training did not have, and sites that are not there.
    """
    loaded = model if isinstance(model, Model) else load(model)
    t = wholes("times", _listed(times), 0, loaded.noise.num_train_timesteps - 1)
    seeds = wholes("seeds", _listed(seeds), 0)
    if not t or not seeds:
        raise ValueError("times or seeds is empty; expected at least one of each")
    asked = Request(prompt, model=loaded, image=image, width=width, height=height, fit=fit, seed=0)
    request, _, _ = resolve(asked, loaded)
    there = loaded.unet.positions(*latent_shape(request, loaded)[1:])
    record = replace(_record(record, there), rows="all", stop=True).chosen(lambda where: choose(where, there))
    texts = Texts.of(request, loaded, 1)
    context = texts.encode(loaded, None, negative=False)
    beside = _Beside.of(loaded, context.shape[1], (words,) if isinstance(words, str) else tuple(words))
    edits = (Edit(choose(cross, there), bias=_hide, rows="all"),) if beside.places else ()
    found = []
    for i, clean in enumerate(picture_latents(request, loaded).split(1)):
        own = torch.cat([context[i : i + 1], beside.context], dim=1)
        passes = [_seen(loaded, _noised(loaded, clean, t, seed + i), t, own, record, edits, beside) for seed in seeds]
        found.append(reduce(lambda kept, new: MEAN(kept, new[1], new[0]), enumerate(passes), passes[0]))
    maps = SiteMaps({site: torch.cat([one[site] for one in found]) for site in found[0]})
    reader, prompts = texts.reading()
    return Attention(maps, record.kinds, len(found), reader, prompts, words=beside.places)


def _listed(value: int | Sequence[int]) -> Sequence[int]:
    """One number as a sequence."""
    return (value,) if isinstance(value, int) else tuple(value)


def _record(record: Record | None, there: Mapping[Site, Position]) -> Record:
    if record is None:
        coarse = choose(SECOND_COARSEST, there)
        return Record(frozenset([[site for site in there if site in coarse][-1]]), HEAD_MEAN)
    if not isinstance(record, Record):
        raise ValueError(f"record is {shown(record)}; expected a Record, such as minidiff.Record(minidiff.cross)")
    return record


@dataclass(frozen=True, eq=False)
class _Beside:
    """Words besides the prompt: their tokens' context [1,W,D], their positions behind the prompt's, by phrase, and the
    bias [1,1,1,1,L+W] that hides them."""

    context: Tensor
    places: Mapping[str, tuple[int, ...]]
    bias: Tensor

    @classmethod
    def of(cls, model: Model, length: int, words: Sequence[str]) -> _Beside:
        places: dict[str, tuple[int, ...]] = {}
        parts = [torch.zeros(0, model.unet.config.cross_attention_dim, device=model.device, dtype=model.dtype)]
        at = length
        for word in words:
            tokens = list(model.text.all_spans(word, word))
            with torch.no_grad():
                parts.append(model.text.encode([word])[0, tokens].to(model.device, model.dtype))
            places[word] = tuple(range(at, at + len(tokens)))
            at += len(tokens)
        bias = torch.zeros(1, 1, 1, 1, at, device=model.device, dtype=torch.float32)
        bias[..., length:] = _HIDDEN
        return cls(torch.cat(parts)[None], places, bias)

    def unhidden(self, site: Site, kept: Tensor) -> Tensor:
        """The maps of a site [...,L+W] with what the words would get."""
        if site.kind == "self" or not self.places or kept.shape[-1] != self.bias.shape[-1]:
            return kept
        odds = kept * (-self.bias.flatten()).exp().to(kept)
        return torch.where(self.bias.flatten().to(kept) < 0, odds / (1 + odds), kept)


def _hide(site: Site, grid: Grid, inputs: Inputs) -> Tensor:
    return inputs["beside"]


def _noised(model: Model, clean: Tensor, times: Sequence[int], seed: int) -> Tensor:
    """A picture's latents [1,C,h,w] with the noise of several times, each its own: [T,C,h,w]."""
    shape = (clean.shape[1], clean.shape[2], clean.shape[3])
    draw = Noise.seeded(seed, shape)
    abar = model.noise.alphas_cumprod[list(times)].to(clean)[:, None, None, None]
    noise = torch.cat([draw() for _ in times]).to(clean)
    return (abar.sqrt() * clean + (1 - abar).sqrt() * noise).to(model.dtype)


@torch.no_grad()
def _seen(
    model: Model,
    x: Tensor,
    times: Sequence[int],
    context: Tensor,
    record: Record,
    edits: tuple[Edit, ...],
    beside: _Beside,
) -> Maps:
    """The mean over times of what one pass records, [1,...] a site, on the CPU."""
    t = torch.tensor(times, dtype=torch.float32, device=x.device)
    _, maps = model.unet(x, t, context.expand(len(x), -1, -1), record, edits, {"beside": beside.bias})
    mean = {site: kept.float().mean(dim=0, keepdim=True).cpu() for site, kept in maps.items()}
    return {site: beside.unhidden(site, kept) for site, kept in mean.items()}
