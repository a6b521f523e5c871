"""The fixed prompts of `bench layout`: scenes of one, two and three objects, including held-out pairs."""

from dataclasses import dataclass

import numpy as np

from minidiff.shapes.world import BACKGROUNDS, COLOURS, HELD_OUT, SHAPES

SEED = 20_000  # test prompts; tuning uses other seeds
COUNTS = {1: 70, 2: 70, 3: 60}  # objects -> prompts
PAIRS = [(shape, colour) for shape in SHAPES for colour in COLOURS]


@dataclass(frozen=True)
class Prompt:
    """A scene and its text. `background` is None if the text does not mention it."""

    things: tuple[tuple[str, str], ...]  # shape, colour
    background: str | None

    @property
    def phrases(self) -> tuple[str, ...]:
        """E.g. "red circle", one per object."""
        return tuple(f"{colour} {shape}" for shape, colour in self.things)

    @property
    def text(self) -> str:
        """The prompt in the format of the training captions."""
        named = [f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}" for phrase in self.phrases]
        text = named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
        return text if self.background is None else f"{text} on a {self.background} background"


def prompts(seed: int = SEED) -> list[Prompt]:
    """The 200 prompts.

    No two objects in a prompt share a colour or a shape; every second prompt has one of the held-out pairs; every
    second pair of prompts mentions the background.
    """
    rng = np.random.default_rng(seed)
    held = sorted(HELD_OUT)
    seen = [pair for pair in PAIRS if pair not in HELD_OUT]
    found: list[Prompt] = []
    for count, number in COUNTS.items():
        for i in range(number):
            things: list[tuple[str, str]] = []
            while len(things) < count:
                choice = held if i % 2 and not things else seen
                pair = choice[rng.integers(len(choice))]
                if all(pair[0] != shape and pair[1] != colour for shape, colour in things):
                    things.append(pair)
            order = rng.permutation(count)
            background = str(rng.choice(list(BACKGROUNDS))) if i % 4 < 2 else None
            found.append(Prompt(tuple(things[k] for k in order), background))
    return found
