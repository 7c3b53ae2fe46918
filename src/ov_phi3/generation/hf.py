"""Options from Hugging Face's names and files (`generation_config.json`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ov_phi3.errors import ConfigError, did_you_mean
from ov_phi3.generation.names import HF, HF_IGNORED, HF_NO_EFFECT

__all__ = ["from_hf"]

_STOP_CRITERIA: dict[Any, str] = {True: "early", False: "heuristic", "never": "never"}

# The sampling options with Hugging Face's defaults.
_SAMPLING_DEFAULTS = (("temperature", 1.0), ("top_p", 1.0), ("top_k", 50), ("min_p", 0.0), ("typical_p", 1.0))


def from_hf(source: str | Path | Mapping[str, Any], *, dropped: list[str] | None = None) -> dict[str, Any]:
    """Translate Hugging Face's options into ours.

    Args:
        source: a dict, a `generation_config.json`, or a directory that holds one.
        dropped: if given, each key that cannot be obeyed appends a message to this list and raises no error. Meant for
            a model's own file, which its user did not write.

    Raises:
        ConfigError: the file cannot be read, or a key is unknown, or it would change the reply and has no option here.
        TypeError: `source` is neither a mapping nor a path.
    """
    options: dict[str, Any] = {}
    for key, value in _read(source).items():
        if value is None or key in HF_IGNORED:
            continue
        if HF.get(key) == "bad_words":
            options["bad_words"] = [*options.get("bad_words", ()), *_id_sequences(key, value)]
        elif key in HF:
            options[HF[key]] = _STOP_CRITERIA.get(value, value) if key == "early_stopping" else value
        elif value not in HF_NO_EFFECT.get(key, ()):
            problem = _problem(key, value)
            if dropped is None:
                raise ConfigError(problem)
            dropped.append(problem)
    if "max_new_tokens" in options:
        options.pop("max_length", None)  # as in Hugging Face, max_new_tokens takes precedence
    if options.get("num_beams", 1) == 1:
        options.pop("stop_criteria", None)  # transformers writes early_stopping=false beside num_beams=1
    if not options.get("do_sample"):
        _drop_sampling(options, strict=dropped is None)
    return options


def _id_sequences(key: str, value: object) -> list[object]:
    """`bad_words_ids`, which are sequences of token ids, or `suppress_tokens`, which are single ones."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{key} must be a list, not {value!r}")
    return [[token_id] for token_id in value] if key == "suppress_tokens" else list(value)


def _drop_sampling(options: dict[str, Any], *, strict: bool) -> None:
    """Remove the sampling options: Hugging Face ignores them unless do_sample is true, and its default is false."""
    for key, default in _SAMPLING_DEFAULTS:
        value = options.pop(key, default)
        if strict and value != default and not (key == "top_k" and value == 0):
            raise ConfigError(
                f"{key}={value!r} has no effect in a Hugging Face config without do_sample=true. Add that, or leave "
                f"{key} out."
            )


def _read(source: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, (str, Path)):
        raise TypeError(f"expected a dict or a path, not {type(source).__name__}")
    path = Path(source)
    path = path / "generation_config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{path} could not be read as a generation config: {exc}.") from exc
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds a {type(config).__name__}; expected a JSON object.")
    return config


def _problem(key: str, value: object) -> str:
    if key in HF_NO_EFFECT:
        return f"{key}={value!r} would change the reply and has no counterpart in OpenVINO GenAI; leave it out."
    return f"Unknown key {key!r} in a Hugging Face generation config.{did_you_mean(key, (*HF, *HF_NO_EFFECT))}"
