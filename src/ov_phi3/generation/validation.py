"""Checks of single generation options: type, range, and text that the engine can take.

Each function takes the value of an option, returns it in the form that `GenerationConfig` keeps, and lets None through.
NumPy's scalars are accepted and become Python's.
"""

from __future__ import annotations

import json
import math
import numbers
import operator
import struct
import sys
from collections.abc import Callable, Mapping
from typing import Any, get_args

from ov_phi3.checks import whole_number
from ov_phi3.errors import ConfigError
from ov_phi3.generation.json_schema import SchemaText
from ov_phi3.generation.options import Speculation, StopCriteria

__all__ = [
    "BOOLEANS",
    "CHOICES",
    "INTEGERS",
    "NUMBERS",
    "bad_words",
    "boolean",
    "breakers",
    "choice",
    "integer",
    "logit_bias",
    "loop",
    "number",
    "pattern",
    "processors",
    "schema_text",
    "stop_strings",
    "token_ids",
]

_INT64_MAX = 2**63 - 1

# The bounds are those of openvino_genai's GenerationConfig::validate(). They are checked here first, for a better
# message.
INTEGERS: dict[str, tuple[int, int | None]] = {
    "max_new_tokens": (1, None),
    "max_length": (2, None),
    "min_new_tokens": (0, None),
    "top_k": (0, None),
    "seed": (0, 2**64 - 1),
    "dry_allowed_length": (1, None),
    "dry_penalty_last_n": (-1, None),
    "num_return_sequences": (1, None),
    "num_beams": (1, None),
    "num_beam_groups": (1, None),
    "no_repeat_ngram_size": (0, None),
    "num_assistant_tokens": (1, None),
    "max_ngram_size": (1, None),
    "top_logprobs": (0, 20),
}
"""Integer option -> smallest and largest value; None is the largest int64."""

NUMBERS: dict[str, tuple[float | None, float | None]] = {
    "temperature": (0.0, None),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "top_n_sigma": (0.0, None),
    "xtc_probability": (0.0, 1.0),
    "xtc_threshold": (0.0, 1.0),
    "dry_multiplier": (0.0, None),
    "dry_base": (1.0, None),
    "repetition_penalty": (0.0, None),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "diversity_penalty": (0.0, None),
    "length_penalty": (None, None),
    "assistant_confidence_threshold": (0.0, 1.0),
}
"""Float option -> smallest and largest value; None is no bound."""

CHOICES: dict[str, tuple[str, ...]] = {
    "stop_criteria": get_args(StopCriteria),
    "speculation": get_args(Speculation),
}
"""Option -> the words that it may be."""

BOOLEANS = ("ignore_eos", "include_stop", "do_sample", "json_whitespace")
"""Boolean options."""

_EXCLUSIVE_BOUNDS = {
    "top_p": "low",
    "min_p": "high",
    "typical_p": "low",
    "repetition_penalty": "low",
    "assistant_confidence_threshold": "low",
}


def choice(name: str, value: object, words: tuple[str, ...]) -> None:
    """Check an option that is one of some words.

    Raises:
        ConfigError: it is another one.
    """
    if value is not None and value not in words:
        *first, last = map(repr, words)
        raise ConfigError(f"{name}={value!r}; expected {', '.join(first)} or {last}.")


def boolean(name: str, value: object) -> bool | None:
    """Check a boolean option.

    Raises:
        TypeError: the value is not True or False.
    """
    if value is None or isinstance(value, bool):
        return value
    numpy = sys.modules.get("numpy")  # a NumPy boolean exists only where NumPy is imported already
    if numpy is not None and isinstance(value, numpy.bool_):
        return bool(value)
    raise TypeError(f"{name} must be True or False, not {value!r}")


def integer(name: str, value: object, low: int, high: int | None) -> int | None:
    """Check an integer option from `low` to `high`; None is the largest int64.

    Raises:
        ConfigError: the value is out of range.
        TypeError: the value is not an integer.
    """
    if value is None:
        return None
    checked = whole_number(name, value, least=low, most=high)
    return checked if high is not None else whole_number(name, checked, most=_INT64_MAX)


def number(name: str, value: object, low: float | None, high: float | None) -> float | None:
    """Check a float option from `low` to `high`; None is no bound. Python's integers stay integers.

    Raises:
        ConfigError: the value is out of range, not finite, or not 0 but too small for a float32.
        TypeError: the value is not a number.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, not {value!r}")
    plain = _as_python(value)
    rounded = _as_float32(plain)
    exclusive = _EXCLUSIVE_BOUNDS.get(name)
    below = low is not None and (rounded < low or (exclusive == "low" and rounded == low))
    above = high is not None and (rounded > high or (exclusive == "high" and rounded == high))
    vanishes = rounded == 0 and plain != 0
    if below or above or vanishes or not math.isfinite(rounded):
        least = "" if low is None else f" {'above' if exclusive == 'low' else 'at least'} {low}"
        most = "" if high is None else f" {'below' if exclusive == 'high' else 'at most'} {high}"
        both = " and" if least and most else ""
        is_huge = isinstance(plain, int) and plain.bit_length() > 128
        shown = f"an integer of {int(plain).bit_length()} bits" if is_huge else str(plain)
        raise ConfigError(f"{name}={shown} is out of range: expected a finite number{least}{both}{most}.")
    return plain


def _as_python(value: numbers.Real) -> int | float:
    """A Python integer from any kind of integer, a Python float from any other real number."""
    if isinstance(value, numbers.Integral):
        return operator.index(value)
    try:
        return float(value)
    except OverflowError:  # a fraction too large for a float
        return math.inf


def _as_float32(value: float) -> float:
    """The number as the engine stores it: infinite if it is too large for a float32, 0 if it is too small."""
    try:
        return float(struct.unpack("f", struct.pack("f", value))[0])
    except (OverflowError, struct.error):  # too large for a float32, or for any float
        return math.inf


def pattern(name: str, value: object) -> str | None:
    """Check a regular expression or a grammar.

    Raises:
        ConfigError: it is empty, or the engine cannot take one of its characters.
        TypeError: the value is not a string.
    """
    if value is None:
        return None
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, not {type(value).__name__}")
    if not value:
        raise ConfigError(f"{name} is empty; leave it out or give a pattern.")
    _check_characters(name, value)
    return value


def _check_characters(name: str, text: str) -> None:
    """Refuse NUL, at which the engine would cut the text, and lone surrogates, which UTF-8 cannot encode."""
    if "\0" in text:
        raise ConfigError(f"{name} holds a NUL character; the engine would ignore the text behind it.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise ConfigError(f"{name} holds a lone surrogate, {text[exc.start]!r}, which is half a character.") from exc


def stop_strings(value: object) -> tuple[str, ...] | None:
    """Check stop strings, one or several, and return them without duplicates.

    Raises:
        ConfigError: one of them is empty, or holds a lone surrogate.
        TypeError: the value is not a string or a list of strings.
    """
    return _texts("stop", value, "which would end every reply at once")


def token_ids(value: object) -> tuple[int, ...] | None:
    """Check the ids of `stop_token_ids` and return them without duplicates.

    Raises:
        ConfigError: an id is negative, or larger than an int64.
        TypeError: the value is not a list of integers.
    """
    if value is None:
        return None
    if hasattr(value, "__array__") and getattr(value, "ndim", 0) == 1:
        value = list(value)  # type: ignore[call-overload]
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise TypeError(f"stop_token_ids must be a list of token ids, not {value!r}")
    return tuple(dict.fromkeys(whole_number("stop_token_ids", i, least=0, most=_INT64_MAX) for i in value))


def breakers(value: object) -> tuple[str, ...] | None:
    """Check DRY's sequence breakers, one or several, and return them without duplicates.

    Raises:
        ConfigError: one of them is empty, or holds a lone surrogate.
        TypeError: the value is not a string or a list of strings.
    """
    return _texts("dry_sequence_breakers", value, "at which every repetition would end")


def bad_words(value: object) -> tuple[str | tuple[int, ...], ...] | None:
    """Check bad words, one or several: texts, or sequences of token ids.

    Raises:
        ConfigError: one of them is empty or holds a lone surrogate, or an id is negative.
        TypeError: an entry is neither a string nor a sequence of token ids.
    """
    if value is None:
        return None
    entries = (value,) if isinstance(value, str) else value
    if not isinstance(entries, (list, tuple, set, frozenset)):
        raise TypeError(f"bad_words must be a list of strings, not {value!r}")
    return tuple(dict.fromkeys(_bad_word(entry) for entry in entries))


def _bad_word(entry: object) -> str | tuple[int, ...]:
    if isinstance(entry, str):
        checked = _texts("bad_words", entry, "which every reply has")
        assert checked is not None
        return checked[0]
    if hasattr(entry, "tolist"):  # an array of token ids
        entry = entry.tolist()
    if not isinstance(entry, (list, tuple)):
        raise TypeError(f"bad_words must hold strings, or lists of token ids, not {entry!r}")
    if not entry:
        raise ConfigError("bad_words holds an empty list of token ids; leave it out.")
    return tuple(whole_number("bad_words's token id", i, least=0, most=_INT64_MAX) for i in entry)


def _texts(name: str, value: object, why_not_empty: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple, set, frozenset)) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be a string or a list of strings, not {value!r}")
    if "" in texts:
        raise ConfigError(f"{name} holds an empty string, {why_not_empty}; leave it out.")
    for text in texts:
        _check_characters(name, text.replace("\0", ""))
    return tuple(dict.fromkeys(texts))


def loop(value: object) -> tuple[int, int] | None:
    """Check `stop_on_loop`: a window of at least one token, and at least two repeats.

    Raises:
        ConfigError: one of the numbers is too small.
        TypeError: the value is not a pair of whole numbers.
    """
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise TypeError(f"stop_on_loop must be (window, repeats), such as (64, 4), not {value!r}")
    window = whole_number("stop_on_loop's window", value[0], "tokens", least=1)
    return window, whole_number("stop_on_loop's repeats", value[1], least=2)


def logit_bias(value: object) -> tuple[tuple[int, float], ...] | None:
    """Check biases by token id, and return them as sorted pairs, which can be hashed.

    Args:
        value: a mapping, or pairs; an id may be a string of digits, as in OpenAI's JSON.

    Raises:
        ConfigError: an id is out of range, or a bias is neither finite nor minus infinity.
        TypeError: the value is not of that form.
    """
    if value is None:
        return None
    try:
        items = dict(value.items() if isinstance(value, Mapping) else value)  # type: ignore[call-overload]
    except (TypeError, ValueError) as exc:
        raise TypeError(f"logit_bias must be a dict of token ids and numbers, not {value!r}") from exc
    biases: dict[int, float] = {}
    for key, bias in items.items():
        is_digits = isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 20
        token_id = whole_number("logit_bias's token id", int(key) if is_digits else key, least=0, most=_INT64_MAX)
        if bias is None:
            raise TypeError(f"logit_bias[{token_id}] must be a number, not None")
        excludes = isinstance(bias, numbers.Real) and bias == -math.inf  # the token is never generated
        checked = -math.inf if excludes else number(f"logit_bias[{token_id}]", bias, None, None)
        assert checked is not None
        biases[token_id] = float(checked)
    return tuple(sorted(biases.items()))


def processors(value: object) -> tuple[Callable[..., Any], ...] | None:
    """Check logits processors, one or several.

    Raises:
        TypeError: the value is not a function or a list of functions.
    """
    if value is None:
        return None
    functions = (value,) if callable(value) else value
    if not isinstance(functions, (list, tuple)) or not all(callable(function) for function in functions):
        raise TypeError(f"logits_processors must be a list of functions of (ids, logits), not {value!r}")
    return tuple(functions)


def schema_text(value: object) -> str | None:
    """Check a JSON schema and return it as text, which the engine takes and which can be hashed.

    Args:
        value: a mapping, text, or a class with `model_json_schema` and `model_validate` (pydantic's models), which a
            `SchemaText` then holds.

    Raises:
        ConfigError: it is not a JSON object, or the engine cannot take one of its characters.
        TypeError: the value is of another type.
    """
    if value is None or isinstance(value, SchemaText):
        return value
    if isinstance(value, type) and hasattr(value, "model_json_schema") and hasattr(value, "model_validate"):
        try:
            schema = value.model_json_schema()
        except Exception as exc:
            raise ConfigError(f"json_schema: {value.__name__} has no JSON schema: {exc}.") from exc
        return SchemaText(schema_text(schema) or "", value)
    if isinstance(value, Mapping):
        try:
            value = json.dumps(value)
        except (TypeError, ValueError, RecursionError) as exc:
            raise ConfigError(f"json_schema cannot be written as JSON: {exc}.") from exc
    if not isinstance(value, str):
        raise TypeError(f"json_schema must be a dict, its JSON text or a pydantic model class, not {_kind(value)}")
    try:
        schema = json.loads(value)
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"json_schema is not JSON: {exc}.") from exc
    if not isinstance(schema, dict):
        raise ConfigError(f"json_schema must be a JSON object, not {value[:40]!r}.")
    _check_characters("json_schema", value)
    return value


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
