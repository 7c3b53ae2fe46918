"""What each pair of generation options must do: run, or be a `ConfigError` that names both.

`OPTIONS` gives every option a value that has an effect, with what it needs beside it. The tables say which do not
go together; all other pairs run.
"""

from collections.abc import Iterator
from itertools import combinations, product
from typing import Any

__all__ = ["ASSISTED", "OPTIONS", "contradictions", "options_of", "pairs", "refusals"]

_BEAMS = {"num_beams": 2}
_SAMPLED = {"temperature": 0.7}

OPTIONS: dict[str, dict[str, Any]] = {
    "max_new_tokens": {"max_new_tokens": 2},
    "max_length": {"max_length": 6},
    "min_new_tokens": {"min_new_tokens": 1},
    "ignore_eos": {"ignore_eos": True},
    "stop": {"stop": ["a stop string"]},
    "include_stop": {"include_stop": True},
    "stop_token_ids": {"stop_token_ids": [5]},
    "do_sample": {"do_sample": True},
    "do_sample=False": {"do_sample": False},
    "temperature": _SAMPLED,
    "temperature=0": {"temperature": 0},
    "top_p": {"top_p": 0.9},
    "top_k": {"top_k": 5},
    "min_p": {"min_p": 0.1},
    "typical_p": {"typical_p": 0.9},
    "top_n_sigma": {"top_n_sigma": 2.0},
    "xtc_probability": {"xtc_probability": 0.5},
    "xtc_threshold": {"xtc_probability": 0.5, "xtc_threshold": 0.2},
    "seed": {"seed": 3},
    "repetition_penalty": {"repetition_penalty": 1.1},
    "presence_penalty": {"presence_penalty": 0.5},
    "frequency_penalty": {"frequency_penalty": 0.5},
    "dry_multiplier": {"dry_multiplier": 0.8},
    "dry_base": {"dry_multiplier": 0.8, "dry_base": 2.0},
    "dry_allowed_length": {"dry_multiplier": 0.8, "dry_allowed_length": 3},
    "dry_penalty_last_n": {"dry_multiplier": 0.8, "dry_penalty_last_n": 64},
    "dry_sequence_breakers": {"dry_multiplier": 0.8, "dry_sequence_breakers": ["."]},
    "num_return_sequences": {"num_return_sequences": 2},
    "num_beams": _BEAMS,
    "num_beam_groups": {**_BEAMS, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "diversity_penalty": {**_BEAMS, "num_beam_groups": 2, "diversity_penalty": 1.0},
    "length_penalty": {**_BEAMS, "length_penalty": 0.5},
    "no_repeat_ngram_size": {**_BEAMS, "no_repeat_ngram_size": 2},
    "stop_criteria": {**_BEAMS, "stop_criteria": "early"},
    "bad_words": {"bad_words": ["a bad word"]},
    "stop_on_loop": {"stop_on_loop": (4, 4)},
    "json_schema": {"json_schema": {"enum": ["a"]}},
    "json_whitespace": {"json_schema": {"enum": ["a"]}, "json_whitespace": True},
    "regex": {"regex": "[ab]c"},
    "grammar": {"grammar": 'root ::= "ab"'},
    "num_assistant_tokens": {"num_assistant_tokens": 2, "max_ngram_size": 2},
    "assistant_confidence_threshold": {"assistant_confidence_threshold": 0.5},
    "max_ngram_size": {"num_assistant_tokens": 3, "max_ngram_size": 3},
    "logit_bias": {"logit_bias": {7: 1.0}},
    "logits_processors": {"logits_processors": [lambda _, logits: logits]},
    "top_logprobs": {"top_logprobs": 2},
    "speculation": {"speculation": "auto"},
}
"""Option, or option=value -> valid options that include it."""

_OWN_SAMPLING = ("typical_p", "top_n_sigma", "xtc_probability", "xtc_threshold")
_SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "min_p", *_OWN_SAMPLING)
_DRY = ("dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers")
_GREEDY = ("do_sample=False", "temperature=0")
_BEAM = (
    "num_beams",
    "num_beam_groups",
    "diversity_penalty",
    "length_penalty",
    "no_repeat_ngram_size",
    "stop_criteria",
)
_LOGITS = (
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "logits_processors", "bad_words"),
    *_DRY,
)
_STRUCTURED = ("json_schema", "regex", "grammar")
ASSISTED = ("num_assistant_tokens", "assistant_confidence_threshold", "max_ngram_size")
"""Options of speculative decoding."""

_CONTRADICTIONS: list[tuple[tuple[str, ...], tuple[str, ...], tuple[str, str]]] = [
    (("max_new_tokens",), ("max_length",), ("max_new_tokens", "max_length")),
    (("do_sample",), ("temperature=0",), ("do_sample", "temperature")),
    (tuple(name for name in _SAMPLING if name != "xtc_threshold"), _BEAM, ("", "num_beams")),
    (("xtc_threshold",), _BEAM, ("xtc_probability", "num_beams")),
    (_GREEDY, ("top_p", "top_k", "min_p", "typical_p", "top_n_sigma", "xtc_probability"), ("", "")),
    (_GREEDY, ("xtc_threshold",), ("", "xtc_probability")),
    (("stop_on_loop",), _BEAM, ("stop_on_loop", "num_beams")),
    (("do_sample=False",), ("temperature",), ("do_sample", "temperature")),
    (_GREEDY, ("num_return_sequences",), ("greedy", "num_return_sequences")),
    (tuple(name for name in _LOGITS if name not in _DRY), _BEAM, ("", "num_beams")),
    (_DRY, _BEAM, ("dry_multiplier", "num_beams")),
    (_STRUCTURED, _STRUCTURED, ("", "")),
    (("json_whitespace",), ("regex", "grammar"), ("json_schema", "")),
    (_STRUCTURED, _BEAM, ("", "num_beams")),
    (("json_whitespace",), _BEAM, ("json_schema", "num_beams")),
    (("top_logprobs",), _BEAM, ("top_logprobs", "num_beams")),
    (("top_logprobs",), ("num_return_sequences",), ("top_logprobs", "num_return_sequences")),
    (ASSISTED, _BEAM, ("assistant", "num_beams")),
    (("speculation",), ("num_assistant_tokens", "max_ngram_size"), ("speculation", "num_assistant_tokens")),
    (("num_assistant_tokens", "max_ngram_size"), ("assistant_confidence_threshold",), ("num_assistant_tokens", "")),
]
"""Options on one side, options on the other, and the names in the error: "" is the option itself."""

_OWN = (
    *("logit_bias", "logits_processors", "top_logprobs", "bad_words", "stop_on_loop"),
    *("typical_p", "top_n_sigma", "xtc_probability", "json_whitespace", "speculation"),
)
_PARTS_OF = (("xtc_threshold",), "xtc_probability"), (_DRY, "dry_multiplier")

_REFUSALS: dict[str, list[tuple[tuple[str, ...], tuple[str, ...], tuple[str, str]]]] = {
    "llm_pipeline": [
        (_OWN, (), ("", "infer_request")),
        *((parts, (), (main, "infer_request")) for parts, main in _PARTS_OF),
        (("stop",), (*_BEAM, "num_return_sequences"), ("stop", "infer_request")),
        (_STRUCTURED, ("num_return_sequences", "ignore_eos"), ("", "llm_pipeline")),
        (ASSISTED, (), ("assistant", "prompt_lookup")),
    ],
    "prompt_lookup": [
        (_OWN, (), ("", "infer_request")),
        *((parts, (), (main, "infer_request")) for parts, main in _PARTS_OF),
        (("stop",), (*_BEAM, "num_return_sequences"), ("stop", "infer_request")),
        (_STRUCTURED, ("num_return_sequences", "ignore_eos"), ("", "llm_pipeline")),
        (("assistant_confidence_threshold",), (), ("", "prompt_lookup")),
        ((*_BEAM, "num_return_sequences"), (), ("num_", "speculative decoding")),
    ],
    "infer_request": [(("assistant_confidence_threshold",), (), ("assistant", "llm_pipeline"))],
}
"""What one pipeline refuses: an option beside any other, or beside those of the second column."""


def options_of(*names: str) -> dict[str, Any]:
    """The options of a pair together, on at most two tokens."""
    together: dict[str, Any] = {}
    for name in names:
        together |= {"temperature": 0.7} if name == "num_return_sequences" and not _decides(names) else {}
        together |= OPTIONS[name]
    return together if "max_length" in together else {"max_new_tokens": 2, **together}


def _decides(names: tuple[str, ...]) -> bool:
    """Whether one of the options decides how several replies come about."""
    return any(name in (*_SAMPLING, *_GREEDY, *_BEAM) for name in names)


def pairs() -> Iterator[tuple[str, str]]:
    """Every pair of options."""
    return combinations(OPTIONS, 2)


def contradictions(first: str, second: str) -> list[tuple[str, ...]]:
    """The names that the error of a pair may have; empty if the two go together."""
    return _matches(_CONTRADICTIONS, first, second)


def refusals(pipeline: str, first: str, second: str) -> list[tuple[str, ...]]:
    """The names that the refusal of a pair by one pipeline may have; empty if it must run."""
    return _matches(_REFUSALS[pipeline], first, second)


def _matches(
    table: list[tuple[tuple[str, ...], tuple[str, ...], tuple[str, str]]], first: str, second: str
) -> list[tuple[str, ...]]:
    found = []
    for (one, other), (left, right, (left_name, right_name)) in product(((first, second), (second, first)), table):
        if one in left and (other in right or not right):
            found.append((left_name or one.partition("=")[0], right_name or other.partition("=")[0]))
    return found
