"""asked(Request): let a function of a request take its fields as keywords, with its signature and help."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar, overload

from .request import FIELDS, Request
from .vocabulary import unknown

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Asked(Protocol[P, R_co]):
    """A function that takes a Request, its fields, or a Request and replacement fields."""

    @overload
    def __call__(self, request: Request, /, **changes: object) -> R_co: ...

    @overload
    def __call__(self, *args: P.args, **fields: P.kwargs) -> R_co: ...


def asked(ask: Callable[P, Request]) -> Callable[[Callable[[Request], R]], Asked[P, R]]:
    """Give a function of a Request the request's own signature.

    A wrong keyword is a TypeError, which suggests our name for another program's.
    """

    def decorate(function: Callable[[Request], R]) -> Asked[P, R]:
        @wraps(function)
        def call(*args: Any, **given: Any) -> R:
            for name in given:
                if name not in FIELDS:
                    raise TypeError(f"{function.__name__}(): {unknown(name, FIELDS)}")
            if len(args) > 1:
                raise TypeError(f"{function.__name__}() takes one positional argument, the prompt; got {len(args)}")
            if args and isinstance(args[0], Request):
                return function(replace(args[0], **given) if given else args[0])
            return function(ask(*args, **given))

        signature, result = inspect.signature(ask), inspect.signature(function).return_annotation
        call.__signature__ = signature.replace(return_annotation=result)  # type: ignore[attr-defined]
        call.__doc__ = "\n\n".join([function.__doc__ or "", (ask.__doc__ or "").partition("\n\n")[2]])
        return call

    return decorate
