"""Check that a file's tensors fit a network, by their names, shapes and dtypes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol


class HasShape(Protocol):
    """A tensor, or its entry in a file's header."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> object: ...


@dataclass(frozen=True)
class Problem:
    """Why something does not load: a sentence, or what is wrong with each of `items`, keys and their shapes."""

    what: str
    items: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.items:
            return self.what
        more = f" and {len(self.items) - 5} more" if len(self.items) > 5 else ""
        return f"{len(self.items)} {self.what}: {', '.join(self.items[:5])}{more}"


MISSING, UNEXPECTED, WRONG = "missing keys", "unexpected keys", "keys of another shape or dtype"


def state_problems(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, HasShape]) -> tuple[Problem, ...]:
    """Compare the tensors of a file with the shapes that a network needs.

    Trailing dimensions of length 1 are ignored: a 1x1 convolution and a linear layer have the same weights. Integers
    are refused, since their meaning depends on data stored elsewhere.
    """
    both = [(key, shape, found[key]) for key, shape in expected.items() if key in found]
    shapes = [
        f"{key} has shape {list(tensor.shape)}, expected {list(shape)}"
        for key, shape, tensor in both
        if _trimmed(tensor.shape) != _trimmed(shape)
    ]
    dtypes = [
        f"{key} has dtype {tensor.dtype}, expected floating-point numbers; quantised weights are not supported"
        for key, _, tensor in both
        if not _floating(tensor.dtype)
    ]
    groups = {
        MISSING: tuple(key for key in expected if key not in found),
        UNEXPECTED: tuple(key for key in found if key not in expected),
        WRONG: (*shapes, *dtypes),
    }
    return tuple(Problem(what, items) for what, items in groups.items() if items)


def check_state(name: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, HasShape]) -> None:
    """One ValueError that names every missing, unexpected and misshapen key of a network's weights."""
    problems = state_problems(expected, found)
    if problems:
        raise ValueError(refusal(name, problems))


def refusal(name: str, problems: Iterable[Problem]) -> str:
    """A network's problems in full, for an error: a line per key."""
    said = {MISSING: "missing ", UNEXPECTED: "unexpected ", WRONG: ""}
    lines = [f"  {said[problem.what]}{item}" for problem in problems for item in problem.items]
    head = [f"the weights do not fit the {name} that its config describes:"] if lines else []
    return "\n".join([*(problem.what for problem in problems if not problem.items), *head, *lines])


def _floating(dtype: object) -> bool:
    """From the dtype's name, torch's ("torch.bfloat16") or a file's ("BF16")."""
    return str(dtype).removeprefix("torch.").upper().startswith(("F", "BF"))


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    end = len(shape)
    while end > 1 and shape[end - 1] == 1:
        end -= 1
    return tuple(shape[:end])
