"""Train the bundled model: `python -m minidiff.shapes.train --minutes 150 --out DIR`.

An autoencoder first (Rombach et al. 2022), then the text encoder and the UNet together, on its latents. DIR gets
    model/                a folder that minidiff and diffusers load, updated every ten minutes
    sheets/               sample images as training progresses
    latents/              encoded pictures
    state.safetensors     the checkpoint for --resume
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from ..draw import sheet
from ..networks.config import UNetConfig, VAEConfig
from ..networks.unet import UNet
from ..networks.vae import VAE
from ..run import generate
from ..weights.load import load
from ..weights.text import load_tokenizer
from . import folder
from .autoencoder import autoencoder_loss, fidelity, normalise
from .denoising import denoising_loss
from .latents import Latents
from .optimise import Optimiser

BATCH = 32
SHARE, LONGEST = 0.2, 15.0  # the autoencoder's fraction of the minutes, and its maximum in minutes
LINE, CHECKPOINT, SHEET = 10.0, 90.0, 600.0  # intervals in seconds
FULL = 5.0  # minutes from which the autoencoder is measured, and the sheets are drawn, in full; shorter runs do a part
PROMPTS = (  # for the sheets; red circle, blue ring, green square, purple triangle and lime star are held out
    "a red circle",
    "a blue star on a white background",
    "a yellow ring on a black background",
    "a green heart and a pink cross",
    "an orange triangle and a purple diamond on a gray background",
    "a cyan square and a brown circle on a beige background",
    "a red star, a blue ring and a lime heart on a navy background",
    "a pink circle, a yellow square and a green triangle on a gray background",
    "a green square",
    "a purple triangle on a white background",
    "a lime star and a blue circle on a black background",
    "an orange heart, a red square and a cyan star on a gray background",
)
PLACE = ("seed", "stage", "step", "seconds", "before")  # the fields of a TrainingRun that its checkpoint keeps


@dataclass
class TrainingRun:
    """A training run in its folder. `step` and `seconds` count within the stage, over all sessions; `before` is the
    duration of the previous stage in seconds.
    """

    out: Path
    seed: int
    stage: str = "autoencoder"
    step: int = 0
    seconds: float = 0.0
    before: float = 0.0
    fixed: dict[str, Tensor] = field(default_factory=dict)  # the autoencoder, once finished
    saved: dict[str, Tensor] = field(default_factory=dict)  # the optimiser state to resume from

    @property
    def state(self) -> Path:
        """The checkpoint file."""
        return self.out / "state.safetensors"

    def read(self) -> None:
        """Load the checkpoint."""
        with safe_open(self.state, "pt") as file:
            place = json.loads((file.metadata() or {}).get("run", "{}"))
        if place.keys() != set(PLACE):
            raise ValueError(f"{self.state} was not written by a training run; expected an interrupted run's --out")
        for name in PLACE:
            setattr(self, name, place[name])
        tensors = load_file(self.state)
        self.fixed = {key: value for key, value in tensors.items() if key.startswith("vae/")}
        self.saved = {key: value for key, value in tensors.items() if key not in self.fixed}

    def write(self, optimiser: Optimiser) -> None:
        """Replace the checkpoint atomically: a run interrupted while writing keeps the previous one."""
        place = {name: getattr(self, name) for name in PLACE}
        part = self.state.with_suffix(".part")
        save_file({**optimiser.state(), **self.fixed}, part, metadata={"run": json.dumps(place)})
        part.replace(self.state)

    def learn(
        self,
        networks: Mapping[str, nn.Module],
        loss_at: Callable[[int], Tensor],
        minutes: float,
        show: Callable[[Optimiser], None] = lambda optimiser: None,
    ) -> Optimiser:
        """Train until the stage's minutes are used up, logging progress and calling `write` and `show` periodically."""
        optimiser = Optimiser(networks)
        if self.saved:
            optimiser.load(self.saved)
            self.saved = {}
        line = checkpoint = shown = time.monotonic()
        losses: list[float] = []
        while self.seconds < 60 * minutes:
            before = time.monotonic()
            loss = loss_at(self.step)
            optimiser.step(loss, self.step, self.seconds / 60 / minutes)
            losses.append(float(loss.detach()))
            now = time.monotonic()
            self.step, self.seconds = self.step + 1, self.seconds + now - before
            if now - line > LINE:
                rate, mean = len(losses) / (now - line), sum(losses) / len(losses)
                place = f"{self.stage}: step {self.step}, {self.seconds / 60:.1f} of {minutes:.1f} minutes"
                _say(f"{place}, loss {mean:.4f}, {rate:.2f} steps/s")
                line, losses = now, []
            if now - checkpoint > CHECKPOINT:
                self.write(optimiser)
                checkpoint = now
            if now - shown > SHEET:
                show(optimiser)
                shown = now
        self.write(optimiser)
        return optimiser


def train(out: Path, minutes: float, resume: bool = False, autoencoder: Path | None = None, seed: int = 0) -> Path:
    """Train for `minutes`, over all sessions, and return the model's folder.

    resume: continue the interrupted run in `out`. autoencoder: a model folder whose autoencoder is used instead of
    training one.
    ValueError if `out` holds a run and `resume` is False, or holds none and `resume` is True.
    """
    if not minutes > 0:
        raise ValueError(f"minutes is {minutes}; expected a number above 0")
    run = TrainingRun(out, seed)
    if resume != run.state.is_file():
        raise ValueError(
            f"{out} holds {'no run' if resume else 'a run already'}; "
            f"expected {'the folder of an interrupted run' if resume else 'a new folder, or --resume'}"
        )
    out.mkdir(parents=True, exist_ok=True)
    if resume:
        run.read()
    torch.manual_seed(run.seed)
    part = min(1.0, minutes / FULL)
    vae = _autoencoder(run, min(SHARE * minutes, LONGEST), autoencoder, part)
    return _unet(run, vae, minutes - run.before / 60, part)


def _autoencoder(run: TrainingRun, minutes: float, given: Path | None, part: float) -> VAE:
    """The finished autoencoder: from the run's checkpoint, from a folder, or trained."""
    vae = VAE(VAEConfig.from_dict(folder.VAE))
    if run.stage == "autoencoder":
        if given is None:
            optimiser = run.learn({"vae": vae}, lambda step: autoencoder_loss(vae, run.seed, step), minutes)
            vae.load_state_dict(optimiser.averaged("vae"))
            normalise(vae, run.seed, part)
        else:
            vae.load_state_dict(load(given, dtype="float32", device="cpu").vae.state_dict())
        psnr, kept = fidelity(vae, part)
        _say(f"autoencoder: {psnr:.1f} dB, {kept:.2%} of the flat pixels keep their colour")
        run.stage, run.step, run.before, run.seconds = "unet", 0, run.seconds, 0.0
        run.fixed = {f"vae/{key}": value for key, value in vae.state_dict().items()}
    vae.load_state_dict({key.removeprefix("vae/"): value for key, value in run.fixed.items()})
    return vae.requires_grad_(False)


def _unet(run: TrainingRun, vae: VAE, minutes: float, part: float) -> Path:
    """Train the UNet and the text encoder, and write the model's folder."""
    unet, text = UNet(UNetConfig.from_dict(folder.UNET)), CLIPTextModel(CLIPTextConfig.from_dict(dict(folder.TEXT)))
    model = run.out / "model"
    folder.write_tokenizer(model / "tokenizer")
    tokenizer = load_tokenizer(model / "tokenizer")
    pictures = Latents(vae, run.out / "latents", run.seed, part)
    prompts = PROMPTS[: max(1, round(part * len(PROMPTS)))]

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng([run.seed, step, 4])
        return denoising_loss(unet, text, tokenizer, *pictures.batch(step, BATCH), rng)

    def show(optimiser: Optimiser) -> None:
        states = {"unet": optimiser.averaged("unet"), "text": optimiser.averaged("text"), "vae": vae.state_dict()}
        folder.write_folder(model, states, torch.float16)
        _draw(model, run.out / "sheets" / f"{run.step:06d}.png", prompts)

    show(run.learn({"unet": unet, "text": text}, loss, minutes, show))
    return model


def _draw(model: Path, path: Path, prompts: Sequence[str]) -> None:
    """Save a contact sheet of the model's images for these prompts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = generate(prompts, model=model, seed=0, progress=False).images
    assert isinstance(images, list)
    sheet(images, prompts).save(path)
    _say(f"wrote {path}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns 0, or 2 with a one-line message for a wrong argument."""
    parser = argparse.ArgumentParser(prog="python -m minidiff.shapes.train", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the model, sheets and checkpoints")
    add(
        "--minutes",
        type=float,
        default=150,
        metavar="N",
        help="training time over all sessions, without writing and drawing at the end (default: 150)",
    )
    add("--resume", action="store_true", help="continue the interrupted run in DIR")
    add("--autoencoder", type=Path, metavar="FOLDER", help="a model folder whose autoencoder is used unchanged")
    add("--seed", type=int, default=0, metavar="N")
    args = parser.parse_args(argv)
    try:
        print(train(args.out, args.minutes, args.resume, args.autoencoder, args.seed))
    except ValueError as error:
        _say(f"{parser.prog}: error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
