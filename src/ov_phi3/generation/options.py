"""The options of a reply as types: the keyword arguments of `generate`, their choices, and their defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypedDict

__all__ = ["DEFAULTS", "GenerationOptions", "LogitsProcessor", "OnCancel", "Overflow", "Speculation", "StopCriteria"]

LogitsProcessor: TypeAlias = Callable[[Any, Any], Any]
"""A function of the ids so far and the logits of the next token; it returns the logits."""

StopCriteria: TypeAlias = Literal["early", "heuristic", "never"]
"""When beam search ends, see `GenerationConfig`."""

Speculation: TypeAlias = Literal["off", "auto"]
"""Whether the next tokens are guessed, see `GenerationConfig`."""

Overflow: TypeAlias = Literal["error", "drop_oldest"]
"""What to do with a turn that no longer fits the context window, see `Pipeline.chat`."""

OnCancel: TypeAlias = Literal["keep", "drop"]
"""What happens to a turn whose reply is cancelled, see `Pipeline.chat`."""


class GenerationOptions(TypedDict, total=False):
    """The keyword arguments `**options` of `generate`, `stream` and `send`: the fields of `GenerationConfig`.

    A test compares the two. None removes an option of the call's `config`.
    """

    max_new_tokens: int | None
    max_length: int | None
    min_new_tokens: int | None
    ignore_eos: bool | None
    stop: tuple[str, ...] | list[str] | str | None
    include_stop: bool | None
    stop_token_ids: tuple[int, ...] | list[int] | None
    do_sample: bool | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    typical_p: float | None
    top_n_sigma: float | None
    xtc_probability: float | None
    xtc_threshold: float | None
    seed: int | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    dry_multiplier: float | None
    dry_base: float | None
    dry_allowed_length: int | None
    dry_penalty_last_n: int | None
    dry_sequence_breakers: tuple[str, ...] | list[str] | str | None
    num_return_sequences: int | None
    num_beams: int | None
    num_beam_groups: int | None
    diversity_penalty: float | None
    length_penalty: float | None
    no_repeat_ngram_size: int | None
    stop_criteria: StopCriteria | None
    bad_words: Sequence[str | Sequence[int]] | str | None
    stop_on_loop: tuple[int, int] | Sequence[int] | None
    json_schema: dict[str, Any] | str | type[Any] | None
    json_whitespace: bool | None
    regex: str | None
    grammar: str | None
    num_assistant_tokens: int | None
    assistant_confidence_threshold: float | None
    max_ngram_size: int | None
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] | None
    logits_processors: Sequence[LogitsProcessor] | None
    top_logprobs: int | None
    speculation: Speculation | None


DEFAULTS: dict[str, Any] = {
    "min_new_tokens": 0,
    "ignore_eos": False,
    "stop": (),
    "include_stop": False,
    "stop_token_ids": (),
    "do_sample": False,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "top_n_sigma": 0.0,
    "xtc_probability": 0.0,
    "xtc_threshold": 0.1,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "dry_multiplier": 0.0,
    "dry_base": 1.75,
    "dry_allowed_length": 2,
    "dry_penalty_last_n": -1,
    "dry_sequence_breakers": ("\n", ":", '"', "*"),
    "num_return_sequences": 1,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "stop_criteria": "heuristic",
    "bad_words": (),
    "logit_bias": (),
    "logits_processors": (),
    "speculation": "off",
}
"""Value of a field that neither the caller nor the model gives. With this value, an option has no effect."""
