"""The UNet's training set: a pool of encoded pictures that grows during the run, so that training starts at once."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..networks.vae import VAE
from .world import HELD_OUT, Scene, caption, random_scene, render

CHUNK = 256  # pictures encoded at a time and stored in one file
FIRST, PER_STEP, MOST = 512, 3, 64_000  # pictures: at the start, added per step, at most


class Latents:
    """Random scenes without the held-out pairs, and their latents at the UNet's scale.

    Files in `folder` are reused, not encoded again, so they must come from the same autoencoder and seed.
    share: below 1, a single chunk is encoded before the first step.
    """

    def __init__(self, vae: VAE, folder: Path, seed: int, share: float = 1.0) -> None:
        self.vae, self.folder, self.seed, self.share = vae, folder, seed, share
        self.scenes: list[Scene] = []
        self.chunks: list[Tensor] = []  # each float16 [CHUNK,4,32,32]
        folder.mkdir(parents=True, exist_ok=True)

    def batch(self, step: int, size: int) -> tuple[Tensor, list[Scene], list[str]]:
        """Batch number `step`: float32 latents [size,4,32,32], their scenes, and a caption for each."""
        first = FIRST if self.share == 1 else CHUNK
        while len(self.scenes) < min(first + PER_STEP * step, MOST):
            self._grow()
        rng = np.random.default_rng([self.seed, step, 2])
        chosen = rng.integers(0, len(self.scenes), size).tolist()
        latents = torch.stack([self.chunks[i // CHUNK][i % CHUNK] for i in chosen])
        scenes = [self.scenes[i] for i in chosen]
        return latents.float(), scenes, [caption(scene, rng) for scene in scenes]

    @torch.no_grad()
    def _grow(self) -> None:
        number = len(self.chunks)
        rng = np.random.default_rng([self.seed, number, 3])
        scenes = [random_scene(rng, lambda shape, colour: (shape, colour) not in HELD_OUT) for _ in range(CHUNK)]
        path = self.folder / f"{number:04d}.safetensors"
        if path.is_file():
            latents = load_file(path)["latents"]
        else:
            with torch.autocast("cpu", torch.bfloat16):
                encoded = [self.vae.encode(render(scenes[i : i + 32]).float() / 127.5 - 1) for i in range(0, CHUNK, 32)]
            latents = (torch.cat(encoded).float() * self.vae.config.scaling_factor).half()
            unfinished = path.with_suffix(".part")
            save_file({"latents": latents}, unfinished)
            unfinished.replace(path)
        self.scenes += scenes
        self.chunks.append(latents)
