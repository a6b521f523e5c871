"""Check that a file's tensors fit a network, by their names, shapes and dtypes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


class HasShape(Protocol):
    """A tensor, or its entry in a file's header."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> object: ...


@dataclass(frozen=True)
class StateProblems:
    """Why weights do not fit a network: keys; for `wrong` ones, a line with the found and the expected value."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    wrong: tuple[str, ...]


def state_problems(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, HasShape]) -> StateProblems:
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
    return StateProblems(
        missing=tuple(key for key in expected if key not in found),
        unexpected=tuple(key for key in found if key not in expected),
        wrong=(*shapes, *dtypes),
    )


def check_state(name: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, HasShape]) -> None:
    """One ValueError that names every missing, unexpected and misshapen key of a network's weights."""
    problems = state_problems(expected, found)
    lines = [f"missing {key}" for key in problems.missing] + [f"unexpected {key}" for key in problems.unexpected]
    lines += problems.wrong
    if lines:
        raise ValueError(f"the weights do not fit the {name} that its config describes:\n  " + "\n  ".join(lines))


def _floating(dtype: object) -> bool:
    """From the dtype's name, torch's ("torch.bfloat16") or a file's ("BF16")."""
    return str(dtype).removeprefix("torch.").upper().startswith(("F", "BF"))


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    end = len(shape)
    while end > 1 and shape[end - 1] == 1:
        end -= 1
    return tuple(shape[:end])
