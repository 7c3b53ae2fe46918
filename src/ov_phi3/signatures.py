"""Signatures for people and completion: keyword arguments of a `TypedDict` by name instead of as `**options`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["naming_options"]

F = TypeVar("F", bound=Callable[..., Any])


def naming_options(options: type) -> Callable[[F], F]:
    """Name every option in a function's signature, which `help` shows and IPython completes.

    Type checkers read the annotation `Unpack[...]` instead, and what the function takes stays the same.

    Args:
        options: a `TypedDict`, the type of the function's `**options`.
    """

    def named(function: F) -> F:
        signature = inspect.signature(function)
        kept = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        added = [
            # An annotation that is not evaluated is wrapped; its text is what the other annotations are too.
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=getattr(kind, "__forward_arg__", kind),
            )
            for name, kind in options.__annotations__.items()
        ]
        function.__signature__ = signature.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
        return function

    return named
