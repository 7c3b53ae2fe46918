"""Options from the parameters of OpenAI's chat completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ov_phi3.errors import ConfigError, did_you_mean
from ov_phi3.generation.names import OPENAI, OPENAI_IGNORED, OPENAI_NO_EFFECT

__all__ = ["from_openai"]


def from_openai(request: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the parameters of a chat completion into our options.

    Raises:
        ConfigError: a parameter is unknown or has no option here, or two parameters contradict each other.
        TypeError: `request` is not a mapping.
    """
    if not isinstance(request, Mapping):
        raise TypeError(f"expected a dict of chat-completion parameters, not {type(request).__name__}")
    options: dict[str, Any] = {}
    for key, value in request.items():
        if value is None or key in OPENAI_IGNORED:
            continue
        if key == "response_format":
            options.update(_json_schema(value))
        elif key in OPENAI:
            name = OPENAI[key]
            if name in options and options[name] != value:
                raise ConfigError(
                    f"max_tokens and max_completion_tokens are both given: {options[name]!r} and {value!r}."
                )
            options[name] = value
        elif value not in OPENAI_NO_EFFECT.get(key, ()):
            raise ConfigError(_problem(key, value))
    if request.get("logprobs"):
        options.setdefault("top_logprobs", 0)
    elif top_logprobs := options.pop("top_logprobs", 0):
        raise ConfigError(f"top_logprobs={top_logprobs!r} needs logprobs=true.")
    if options.get("temperature") == 0:
        options.pop("top_p", None)  # OpenAI's clients send both; at temperature 0, top_p has no effect
    return options


def _problem(key: str, value: object) -> str:
    if key in ("tools", "tool_choice"):
        return f"{key} is not an option: give it to generate(), stream() or chat() as {key}=."
    if key in OPENAI_NO_EFFECT:
        return f"{key}={value!r} is not supported here."
    known = (*OPENAI, *OPENAI_IGNORED, *OPENAI_NO_EFFECT)
    return f"{key}={value!r} is not a parameter known here.{did_you_mean(key, known)}"


def _json_schema(response_format: object) -> dict[str, Any]:
    """OpenAI's response_format as the option `json_schema`, or no option for plain text."""
    if isinstance(response_format, Mapping):
        kind = response_format.get("type")
        if kind == "text":
            return {}
        if kind == "json_object":
            return {"json_schema": {"type": "object"}}
        inner = response_format.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, Mapping) else None
        if kind == "json_schema" and isinstance(schema, Mapping):
            return {"json_schema": dict(schema)}
    raise ConfigError(
        f"response_format={response_format!r}; expected {{'type': 'text'}}, {{'type': 'json_object'}} or "
        "{'type': 'json_schema', 'json_schema': {'schema': {...}}}."
    )
