"""Checks of user input. Each returns the normalised value, or raises a ValueError that names it.

A number is whatever Python converts to one, including numpy's and torch's scalars, but not booleans or strings.
"""

import difflib
import math
import operator
import reprlib
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Check = Callable[[str, object], Any]
"""(name, value) -> the value as it is meant. ValueError, with the name, for any other."""
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxdict = 3, 8, 8, 6


def shown(value: object) -> str:
    """A value in one line of at most 120 characters, for messages. Arrays and tensors show shape and dtype."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is not None and dtype is not None:
        if len(shape) == 0 and hasattr(value, "item"):
            return shown(value.item())
        return f"a {type(value).__name__} of shape {list(shape)} and dtype {str(dtype).removeprefix('torch.')}"
    try:
        text = _SHORT.repr(value)
    except Exception:  # a foreign __repr__ may raise anything
        text = f"<{type(value).__name__}>"
    text = " ".join(text.split())
    return text if len(text) <= 120 else f"{text[:117]}..."


def checked(values: Mapping[str, object], table: Mapping[str, Check], where: str = "") -> dict[str, Any]:
    """Values by name, each as its check in the table reads it. where: put before the names in messages."""
    return {name: table[name](where + name, value) for name, value in values.items()}


def one_or_each(name: str, value: object, check: Check) -> Any:
    """One value, or a list or tuple of them, as the check reads each."""
    return tuple(check(name, one) for one in value) if isinstance(value, list | tuple) else check(name, value)


def listed(texts: str | Sequence[str]) -> Sequence[str]:
    """One text as a list of one."""
    return (texts,) if isinstance(texts, str) else texts


def whole(name: str, value: object, least: float = -math.inf, most: float = math.inf, expected: str = "") -> int:
    """A whole number from `least` to `most`. expected: for the message; default: the range."""
    try:
        found = None if _is_no_number(value) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        found = None
    if found is None or not least <= found <= most:
        raise ValueError(f"{name} is {shown(value)}; expected {expected or f'a whole number{_range(least, most)}'}")
    return found


def wholes(name: str, values: Iterable[object], least: float = -math.inf, most: float = math.inf) -> tuple[int, ...]:
    """Several values, each as whole()."""
    return tuple(whole(name, value, least, most) for value in values)


def number(name: str, value: object, least: float = -math.inf, most: float = math.inf, expected: str = "") -> float:
    """A finite number from `least` to `most`; see whole()."""
    try:
        found = math.nan if _is_no_number(value) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several elements
        found = math.nan
    if not (math.isfinite(found) and least <= found <= most):
        raise ValueError(f"{name} is {shown(value)}; expected {expected or f'a number{_range(least, most)}'}")
    return found


def is_number(*values: object) -> bool:
    """True where number() accepts all of them."""
    try:
        for value in values:
            number("", value)
    except ValueError:
        return False
    return True


def switch(name: str, value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {shown(value)}; expected True or False")
    return value


def instance(name: str, value: object, of: type | tuple[type, ...], expected: str) -> Any:
    """A value of a type, or of one of several."""
    if not isinstance(value, of):
        raise ValueError(f"{name} is {shown(value)}; expected {expected}")
    return value


def choice(name: str, value: object, choices: Iterable[str]) -> str:
    """One of the choices; the message suggests the closest one."""
    known = tuple(choices)
    if isinstance(value, str) and value in known:
        return value
    near = difflib.get_close_matches(value.lower(), known, n=1) if isinstance(value, str) else []
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} is {shown(value)}; expected one of {', '.join(known)}.{hint}")


def numbers(name: str, values: Any) -> tuple[float, ...]:
    """Numbers in any container: a list, a tuple, an array or a tensor of at most 10,000."""
    try:
        count = len(values)
    except TypeError:
        count = 0
    if isinstance(values, str | bytes | Mapping | set | frozenset) or not 1 <= count <= 10_000:
        raise ValueError(f"{name} is {shown(values)}; expected a list of 1 to 10,000 numbers")
    return tuple(number(name, value) for value in values)


def one_or_more(name: str, value: Any) -> float | tuple[float, ...]:
    """A number, or numbers in any container."""
    several = hasattr(value, "__len__") and not isinstance(value, str | bytes) and getattr(value, "ndim", 1) > 0
    return numbers(name, value) if several else number(name, value)


def tensor(name: str, value: Any, ndim: int, expected: str) -> None:
    """Check for a nonempty tensor of finite floating-point numbers with `ndim` dimensions."""
    from torch import Tensor

    if not isinstance(value, Tensor) or value.ndim != ndim or 0 in value.shape or not value.is_floating_point():
        raise ValueError(f"{name} is {shown(value)}; expected a tensor {expected}")
    if not finite(value):
        raise ValueError(f"{name} holds values that are not finite (NaN or infinity); expected a tensor {expected}")


def returned(function: Callable[..., object], found: Any, *shape: int | None, broadcast: bool = False) -> Any:
    """Check that a caller's function returned a tensor of this shape (None: any length), or broadcastable to it."""
    from torch import Tensor

    if isinstance(found, Tensor) and (found.ndim == len(shape) or (broadcast and found.ndim < len(shape))):
        lengths = zip(reversed(found.shape), reversed(shape), strict=False)
        if all(n == most or most is None or (broadcast and n == 1) for n, most in lengths):
            return found
    name = getattr(function, "__qualname__", type(function).__name__)
    how, of = "broadcastable to" if broadcast else "of shape", ", ".join(str(most or "any") for most in shape)
    raise ValueError(f"{name} returned {shown(found)}; expected a tensor {how} [{of}]")


def finite(value: Any) -> bool:
    """Whether a tensor has neither NaN nor infinity. Its sum has one then, and takes no memory, but can overflow."""
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())


def not_finite(tensors: Mapping[str, Any]) -> list[str]:
    """The names of the tensors with NaN or infinity."""
    return [name for name, value in tensors.items() if not finite(value)]


def warn(text: str) -> None:
    """Issue a UserWarning at the caller's line, the nearest outside this package and torch's decorators."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("minidiff", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


def _is_no_number(value: Any) -> bool:
    """True for what Python would convert anyway: booleans, strings, complex numbers, arrays of one element."""
    dtype = str(getattr(value, "dtype", ""))
    if isinstance(value, (bool, str, bytes, bytearray)) or "bool" in dtype or "complex" in dtype:
        return True
    return len(getattr(value, "shape", ())) > 0


def _range(least: float, most: float) -> str:
    if most == math.inf:
        return "" if least == -math.inf else f" of at least {least:.17g}"
    return f" of at most {most:.17g}" if least == -math.inf else f" from {least:.17g} to {most:.17g}"
