"""README keeps its word: the test command is the one that CI runs, every file has its line, the examples run."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import minidiff
from minidiff.model import Defaults

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = [
    "\n".join(line[4:] for line in block.strip("\n").split("\n"))
    for block in re.findall(r"(?:^(?: {4}.*)?\n)+", README, flags=re.MULTILINE)
    if block.strip()
]


def test_ci_runs_the_second_command() -> None:
    (command,) = [block for block in BLOCKS if block.startswith("python3 -m venv") and "pytest" in block]
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_python_examples_run(tiny_model: minidiff.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quick = replace(tiny_model, defaults=Defaults("ddim", steps=2))
    monkeypatch.setattr(minidiff, "load", lambda source: quick)
    names: dict[str, object] = {"torch": torch}
    examples = [block for block in BLOCKS if re.search(r"^(import|from|for|def|parameters|@minidiff)\b", block)]
    assert examples
    for example in examples:
        exec(example, names)
    made = ("cat", "placed", "boxes", "red-circle", "order", "ball", "edited", "more-ball")
    assert [name for name in made if not (tmp_path / f"{name}.png").is_file()] == []
    assert "again" in names
