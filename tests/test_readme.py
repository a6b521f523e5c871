"""README is correct: its test command is CI's, its examples run, and it stays short."""

import re
from pathlib import Path

import pytest

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


EXAMPLES = [block for block in BLOCKS if re.match(r"(import|from) ", block)]


@pytest.mark.parametrize(
    "example",
    [pytest.param(block, marks=[pytest.mark.slow] * ("minidiff.invert(" in block)) for block in EXAMPLES],
    ids=lambda text: re.findall(r"(\w+)\(", text)[0],
)
def test_each_python_example_runs_alone(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bundled model, as written."""
    monkeypatch.chdir(tmp_path)
    exec(example, {"__name__": "example"})
    saved = re.findall(r'save\("([^"]+)"\)', example)
    assert [name for name in saved if not (tmp_path / name).is_file()] == []
    if "again.png" in saved:
        assert (tmp_path / "again.png").read_bytes() == (tmp_path / "wide.png").read_bytes()


def test_readme_has_examples_and_stays_short() -> None:
    assert len(EXAMPLES) > 5
    assert len(README.splitlines()) < 200
