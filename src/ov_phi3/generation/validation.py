"""Checks of single options: types, ranges, and what text the engine can take."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from typing import Any

from ov_phi3.errors import ConfigError

_LARGEST = 2**63 - 1

# Bounds as openvino_genai's GenerationConfig::validate() has them, checked here so that the message is ours and comes
# first.
INTEGERS = {
    "max_new_tokens": (1, None),
    "max_length": (2, None),
    "min_new_tokens": (0, None),
    "top_k": (0, None),
    "seed": (0, 2**64 - 1),
    "num_return_sequences": (1, None),
    "num_beams": (1, None),
    "num_beam_groups": (1, None),
    "no_repeat_ngram_size": (0, None),
    "num_assistant_tokens": (1, None),
    "max_ngram_size": (1, None),
    "top_logprobs": (0, 20),
}
NUMBERS = {
    "temperature": (0.0, None),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.0, None),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "diversity_penalty": (0.0, None),
    "length_penalty": (None, None),
    "assistant_confidence_threshold": (0.0, 1.0),
}
BOOLEANS = ("ignore_eos", "include_stop", "do_sample")
_EXCLUSIVE_BOUNDS = {
    "top_p": "low",
    "min_p": "high",
    "repetition_penalty": "low",
    "assistant_confidence_threshold": "low",
}


def check_bool(name: str, value: object) -> None:
    """Refuse what is not True, False or None."""
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")


def check_text(name: str, value: object) -> None:
    """Refuse what is not a usable text, or None."""
    if value is None:
        return
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, not {type(value).__name__}")
    if not value:
        raise ConfigError(f"{name} is empty; leave it out or give a pattern.")
    check_characters(name, value)


def check_characters(name: str, text: str) -> None:
    """Refuse what the engine would cut off or could not take."""
    if "\0" in text:
        raise ConfigError(f"{name} holds a NUL character, at which the engine would cut it off.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise ConfigError(f"{name} holds a lone surrogate, {text[exc.start]!r}, which is half a character.") from exc


def check_number(name: str, value: object, low: float | None, high: float | None, *, whole: bool) -> None:
    """Refuse what is not a number within its bounds (`low`, `high`), or None."""
    if value is None:
        return
    kind: Any = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name} must be {'a whole number' if whole else 'a number'}, not {value!r}")
    assert isinstance(value, (int, float))
    if whole:
        high = _LARGEST if high is None else high
        held: float = value
    else:
        held = _as_float32(value)
    edge = _EXCLUSIVE_BOUNDS.get(name)
    below = low is not None and (held < low or (edge == "low" and held == low))
    above = high is not None and (held > high or (edge == "high" and held == high))
    vanished = held == 0 and value != 0
    if below or above or vanished or (not whole and not math.isfinite(held)):
        least = "" if low is None else f" {'above' if edge == 'low' else 'at least'} {low}"
        most = "" if high is None else f" {'below' if edge == 'high' else 'at most'} {high}"
        both = " and" if least and most else ""
        shown = str(value) if len(str(value)) < 40 else str(value)[:20] + "..."
        finite = "a whole number" if whole else "a finite number"
        raise ConfigError(f"{name}={shown} is out of range: expected {finite}{least}{both}{most}.")


def _as_float32(value: float) -> float:
    """The number as the engine holds it: what is too large is infinite, what is too small is 0."""
    try:
        return float(struct.unpack("f", struct.pack("f", value))[0])
    except (OverflowError, struct.error):  # past a float, past any float
        return math.inf


def stop_strings(value: object) -> tuple[str, ...] | None:
    """Stop strings as a tuple, each once."""
    if value is None:
        return None
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, (list, tuple, set, frozenset)) or not all(isinstance(s, str) for s in items):
        raise TypeError(f"stop must be a string or a list of strings, not {value!r}")
    if "" in items:
        raise ConfigError("stop holds an empty string, which would end every reply at once; leave it out.")
    for item in items:
        check_characters("stop", item.replace("\0", ""))
    return tuple(dict.fromkeys(items))


def token_ids(value: object) -> tuple[int, ...] | None:
    """Token ids as a tuple, each once."""
    if value is None:
        return None
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise TypeError(f"stop_token_ids must be a list of token ids, not {value!r}")
    for item in value:
        check_number("stop_token_ids", item, 0, None, whole=True)
    return tuple(dict.fromkeys(value))


def logit_bias(value: object) -> tuple[tuple[int, float], ...] | None:
    """Biases by token id, sorted, as pairs, which can be hashed; ids may be text, as in OpenAI's JSON."""
    if value is None:
        return None
    try:
        pairs = dict(value.items() if isinstance(value, Mapping) else value)  # type: ignore[call-overload]
    except (TypeError, ValueError) as exc:
        raise TypeError(f"logit_bias must be a dict of token ids and numbers, not {value!r}") from exc
    found: dict[int, float] = {}
    for key, bias in pairs.items():
        token = int(key) if isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 20 else key
        check_number("logit_bias's token id", token, 0, None, whole=True)
        if bias == -math.inf:  # rules the token out
            found[token] = -math.inf
            continue
        check_number(f"logit_bias[{token}]", bias, None, None, whole=False)
        found[token] = float(bias)
    return tuple(sorted(found.items()))


def processors(value: object) -> tuple[Callable[..., Any], ...] | None:
    """Logits processors, as a tuple."""
    if value is None:
        return None
    items = (value,) if callable(value) else value
    if not isinstance(items, (list, tuple)) or not all(callable(item) for item in items):
        raise TypeError(f"logits_processors must be a list of functions of (ids, logits), not {value!r}")
    return tuple(items)


def schema_text(value: object) -> str | None:
    """A JSON schema as text, which is what the engine takes and what can be hashed."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        try:
            value = json.dumps(value)
        except (TypeError, ValueError, RecursionError) as exc:
            raise ConfigError(f"json_schema cannot be written as JSON: {exc}.") from exc
    if not isinstance(value, str):
        raise TypeError(f"json_schema must be a dict or its JSON text, not {type(value).__name__}")
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"json_schema is not JSON: {exc}.") from exc
    if not isinstance(parsed, dict):
        raise ConfigError(f"json_schema must be a JSON object, not {value[:40]!r}.")
    check_characters("json_schema", value)
    return value
