"""`config.json` of a Phi-3 class model. Every value is checked for its type and range when it is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ov_phi3.errors import ModelError

__all__ = ["MODEL_TYPE", "JsonFile", "Phi3Config", "read_json", "read_text"]

MODEL_TYPE = "phi3"

_LONGROPE_NAMES = ("longrope", "su", "yarn")
"""Names of the same RoPE type; transformers' Phi3Config maps the two older names to "longrope"."""

_KNOWN_RELATIVES = {
    "phi": "Phi-1 and Phi-2 are another architecture",
    "phi3_v": "the vision models are another architecture",
    "phi3small": "Phi-3-small is another architecture",
    "phi4mm": "Phi-4-multimodal is another architecture",
    "phi4_multimodal": "Phi-4-multimodal is another architecture",
    "phimoe": "the mixture-of-experts models are another architecture",
}


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        ModelError: the file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelError(f"{path} is not UTF-8 text (byte {error.start}); copy or export it again.") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}.") from error


def read_json(path: Path) -> JsonFile:
    """Read a JSON file that holds an object.

    Raises:
        ModelError: the file cannot be read, is not JSON (the message has the line and column), or holds no object.
    """
    text = read_text(path)
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ModelError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}; "
            "copy or export it again."
        ) from error
    except RecursionError as error:
        raise ModelError(f"{path} is not valid JSON: it is nested too deeply.") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} holds a JSON {type(data).__name__}; expected an object with named values.")
    return JsonFile(path, data)


@dataclass(frozen=True, slots=True)
class JsonFile:
    """A JSON object and its file, so that messages can name both.

    Attributes:
        path: the file.
        data: the object.
    """

    path: Path
    data: Mapping[str, Any]

    def error(self, key: str, value: object, expected: str) -> ModelError:
        """The error for an unexpected value under a key."""
        return ModelError(f"{self.path}: {key} is {value!r}; expected {expected}.")

    def integer(self, key: str, *, maximum: int, default: int | None = None) -> int:
        """The whole number under a key, from 1 to `maximum`; `default`, or an error, if the key is absent or null."""
        value = self.data.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= maximum:
            raise self.error(key, value, f"a whole number from 1 to {maximum}")
        return value

    def optional_integer(self, key: str, *, maximum: int) -> int | None:
        """The same as `integer`, but None if the key is absent or null."""
        return None if self.data.get(key) is None else self.integer(key, maximum=maximum)

    def fraction(self, key: str, *, default: float) -> float:
        """The number under a key, above 0 and at most 1; `default` if the key is absent or null."""
        value = self.data.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
            raise self.error(key, value, "a number above 0 and up to 1")
        return float(value)

    def token_ids(self, key: str) -> tuple[int, ...]:
        """The token id, or the list of them, under a key; () if the key is absent or null."""
        value = self.data.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(item, bool) or not isinstance(item, int) for item in ids):
            raise self.error(key, value, "a token id, or a list of token ids")
        return tuple(ids)


@dataclass(frozen=True, slots=True)
class Phi3Config:
    """The values of `config.json` that this library uses, checked. `ModelInfo` documents them."""

    file: JsonFile
    context_length: int
    original_context_length: int
    rope_type: str | None
    sliding_window: int | None
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    partial_rotary_factor: float

    @classmethod
    def read(cls, path: Path) -> Phi3Config:
        """Read `config.json`.

        Raises:
            ModelError: the file is unreadable, of another architecture, or has a value of a wrong type or range.
        """
        file = read_json(path)
        _check_architecture(file)
        rope = _rope_parameters(file)
        rope_type = rope.data.get("rope_type", rope.data.get("type"))
        if rope_type is not None and not isinstance(rope_type, str):
            raise rope.error("rope_type", rope_type, "a name such as 'longrope'")
        context = file.integer("max_position_embeddings", maximum=2**31)
        original = file.integer("original_max_position_embeddings", maximum=2**31, default=context)
        heads = file.integer("num_attention_heads", maximum=2**16)
        hidden = file.integer("hidden_size", maximum=2**24)
        kv_heads = file.integer("num_key_value_heads", maximum=2**16, default=heads)
        if heads % kv_heads:
            raise file.error("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads, {heads}")
        return cls(
            file=file,
            context_length=context,
            original_context_length=rope.integer("original_max_position_embeddings", maximum=2**31, default=original),
            rope_type="longrope" if rope_type in _LONGROPE_NAMES else None if rope_type == "default" else rope_type,
            sliding_window=file.optional_integer("sliding_window", maximum=2**31),
            vocab_size=file.integer("vocab_size", maximum=2**24),
            hidden_size=hidden,
            intermediate_size=file.integer("intermediate_size", maximum=2**24),
            num_layers=file.integer("num_hidden_layers", maximum=2**14),
            num_attention_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=file.integer("head_dim", maximum=2**16, default=_head_dim(file, hidden, heads)),
            partial_rotary_factor=rope.fraction(
                "partial_rotary_factor", default=file.fraction("partial_rotary_factor", default=1.0)
            ),
        )

    @property
    def rope_boundary(self) -> int | None:
        """Longest sequence, in tokens, that uses LongRoPE's short factors; None if the factors never change."""
        longrope = self.rope_type == "longrope" and self.original_context_length < self.context_length
        return self.original_context_length if longrope else None


def _check_architecture(file: JsonFile) -> None:
    model_type = file.data.get("model_type")
    if model_type == MODEL_TYPE:
        return
    if model_type is None:
        raise file.error("model_type", None, f"{MODEL_TYPE!r}; this is not a Hugging Face model configuration")
    relative = _KNOWN_RELATIVES.get(model_type) if isinstance(model_type, str) else None
    raise file.error(
        "model_type",
        model_type,
        f"{MODEL_TYPE!r} (Phi-3-mini, Phi-3-medium, Phi-3.5-mini, Phi-4-mini, Phi-4)"
        + (f"; {relative}" if relative else ""),
    )


def _rope_parameters(file: JsonFile) -> JsonFile:
    """The RoPE settings: `rope_parameters` since transformers 5, `rope_scaling` before."""
    for key in ("rope_parameters", "rope_scaling"):
        value = file.data.get(key)
        if value is not None and not isinstance(value, dict):
            raise file.error(key, value, "an object or null")
        if value:
            return JsonFile(file.path, value)
    return JsonFile(file.path, {})


def _head_dim(file: JsonFile, hidden: int, heads: int) -> int | None:
    if file.data.get("head_dim") is None and hidden % heads:
        raise file.error("hidden_size", hidden, f"a multiple of num_attention_heads, {heads}")
    return max(1, hidden // heads)
