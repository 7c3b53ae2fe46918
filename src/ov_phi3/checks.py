"""Checks of arguments that several packages share."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TypeVar

from ov_phi3.errors import ConfigError, did_you_mean

__all__ = ["one_of", "whole_number"]

Word = TypeVar("Word", bound=str)

_LONGEST_SHOWN = 40


def whole_number(
    name: str, value: object, of: str = "", *, least: int | None = None, most: int | None = None, note: str = ""
) -> int:
    """Return an integer argument as an `int`, after checking its type and range.

    NumPy's integer scalars are accepted. Booleans are refused, also NumPy's.

    Args:
        name: name of the argument, for the message.
        value: the argument.
        of: unit in the plural, such as "tokens", or '' for a plain number.
        least: smallest allowed value, or None.
        most: largest allowed value, or None.
        note: text for the end of the range in the message, such as ", the model's context window".

    Raises:
        ConfigError: the value is out of range.
        TypeError: the value is not an integer.
    """
    unit = f" of {of}" if of else ""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number{unit}, not {value!r}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be a whole number{unit}, not {value!r}") from None
    if (least is not None and number < least) or (most is not None and number > most):
        raise ConfigError(f"{name}={_shown(number)}; expected {_range(least, most)}{f' {of}' if of else ''}{note}.")
    return number


def one_of(name: str, value: Word, words: Sequence[str]) -> Word:
    """Return an argument that is one of some words, after checking that it is.

    Raises:
        ConfigError: it is not; the message has the nearest word.
    """
    if value not in words:
        raise ConfigError(f"{name}={value!r}; expected one of {list(words)}.{did_you_mean(str(value), words)}")
    return value


def _range(least: int | None, most: int | None) -> str:
    if least is None:
        return f"at most {most}"
    return f"at least {least}" if most is None else f"{least} to {most}"


def _shown(number: int) -> str:
    """Decimal digits, or the first hexadecimal ones of a large number: `str` refuses more than 4,300 digits."""
    if number.bit_length() <= 128:
        return str(number)
    return hex(number)[:_LONGEST_SHOWN] + "..."
