"""How a reply is generated: one frozen, validated record, and its way to `openvino_genai.GenerationConfig`.

A field that is None was *not given*: the model's own `generation_config.json` decides, then the default in the table
below. `resolve()` fills everything in, and the filled record is on every result, so what was really used can always
be read.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ov_phi3.errors import ConfigError, did_you_mean
from ov_phi3.generation import names as config_names
from ov_phi3.generation.validation import (
    BOOLEANS,
    INTEGERS,
    NUMBERS,
    check_bool,
    check_number,
    check_text,
    logit_bias,
    processors,
    schema_text,
    stop_strings,
    token_ids,
)

if TYPE_CHECKING:
    import openvino_genai

__all__ = ["BOOLEANS", "DEFAULTS", "INTEGERS", "NUMBERS", "OWN_LOOP", "GenerationConfig", "LogitsProcessor"]

LogitsProcessor: TypeAlias = Callable[[Any, Any], Any]
"""A function of the ids so far and the logits of the next token, that gives back the logits."""

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
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "num_return_sequences": 1,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "stop_criteria": "heuristic",
    "logit_bias": (),
    "logits_processors": (),
}
"""What a field is when neither the caller nor the model says. A field at its value here changes nothing."""

_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
_BEAMS = ("num_beam_groups", "diversity_penalty", "length_penalty", "no_repeat_ngram_size", "stop_criteria")
_STRUCTURED = ("json_schema", "regex", "grammar")
_ASSISTED = ("num_assistant_tokens", "assistant_confidence_threshold", "max_ngram_size")
OWN_LOOP = ("logit_bias", "logits_processors", "top_logprobs")
"""Options that only `backend="infer_request"` has."""


@dataclass(frozen=True)
class GenerationConfig:
    """Options of one reply. Everything is optional; None means "not given".

    Attributes:
        max_new_tokens: longest reply, in tokens; default: what is left of the context window.
        max_length: the same, counted from the start of the prompt; give one or the other.
        min_new_tokens: no end token before this many tokens.
        ignore_eos: go on past the model's end tokens, for replies of a fixed length.
        stop: strings that end the reply; no piece of one is ever shown.
        include_stop: keep the stop string in the text.
        stop_token_ids: token ids that end the reply, besides the model's own.
        do_sample: sample (True) or take the likeliest token (False); default: sample if a sampling option is given.
        temperature: 0 is greedy; higher is more varied.
        top_p: sample from the smallest set of tokens with this much probability, in (0, 1].
        top_k: sample from this many likeliest tokens; 0 is all.
        min_p: drop tokens less likely than this times the likeliest one's probability, in [0, 1).
        seed: of the sampling; None draws one, and the result's config tells it.
        repetition_penalty: above 1.0 discourages tokens that are in the prompt or the reply.
        presence_penalty: in [-2, 2], once for each token already generated.
        frequency_penalty: in [-2, 2], as often as the token was generated.
        num_return_sequences: replies to one prompt; more than one needs sampling or beams, and `generate`; cannot be
            cancelled.
        num_beams: above 1 is beam search; not for streams, and cannot be cancelled.
        num_beam_groups: groups of beams kept different from each other; divides `num_beams`.
        diversity_penalty: how different.
        length_penalty: exponent of the length in a beam's score; above 0 favours longer replies.
        no_repeat_ngram_size: no n-gram of this size twice (beam search).
        stop_criteria: when beam search ends: "early", "heuristic" or "never".
        json_schema: the reply is JSON of this schema (a dict, or its text).
        regex: the reply matches this regular expression.
        grammar: the reply follows this EBNF grammar.
        num_assistant_tokens: candidates per step of prompt lookup, for a pipeline loaded with `prompt_lookup=True`.
        assistant_confidence_threshold: candidates by confidence instead of by number (draft models).
        max_ngram_size: longest n-gram that prompt lookup searches the prompt for.
        logit_bias: numbers added to the logits of token ids, as a dict; minus infinity rules a token out
            (`backend="infer_request"`, as are the next two).
        logits_processors: functions of (ids, logits) that give back the logits: int64 of shape [tokens], prompt and
            reply so far, and float32 of shape [vocabulary], which they may change. Run in order, after penalties and
            bias, before temperature. What one raises ends the reply and is raised to the reader.
        top_logprobs: log-probabilities of each token of the reply, and of this many likeliest ones, 0 to 20.

    Raises:
        ConfigError: an unknown option, a value out of range, or two options that contradict each other.
        TypeError: a value of the wrong type.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    ignore_eos: bool | None = None
    stop: tuple[str, ...] | list[str] | str | None = None
    include_stop: bool | None = None
    stop_token_ids: tuple[int, ...] | list[int] | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    num_return_sequences: int | None = None
    num_beams: int | None = None
    num_beam_groups: int | None = None
    diversity_penalty: float | None = None
    length_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    stop_criteria: str | None = None
    json_schema: dict[str, Any] | str | None = None
    regex: str | None = None
    grammar: str | None = None
    num_assistant_tokens: int | None = None
    assistant_confidence_threshold: float | None = None
    max_ngram_size: int | None = None
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] | None = None
    logits_processors: Sequence[LogitsProcessor] | None = None
    top_logprobs: int | None = None

    def __new__(cls, *_: object, **options: object) -> GenerationConfig:  # noqa: D102 - __init__ with our error
        check_names(options)
        return object.__new__(cls)

    def __post_init__(self) -> None:
        for name in BOOLEANS:
            check_bool(name, getattr(self, name))
        for name, (low, high) in {**INTEGERS, **NUMBERS}.items():
            check_number(name, getattr(self, name), low, high, whole=name in INTEGERS)
        object.__setattr__(self, "stop", stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", token_ids(self.stop_token_ids))
        for name in ("regex", "grammar"):
            check_text(name, getattr(self, name))
        object.__setattr__(self, "json_schema", schema_text(self.json_schema))
        object.__setattr__(self, "logit_bias", logit_bias(self.logit_bias))
        object.__setattr__(self, "logits_processors", processors(self.logits_processors))
        if self.stop_criteria is not None and self.stop_criteria not in ("early", "heuristic", "never"):
            raise ConfigError(f"stop_criteria={self.stop_criteria!r}; expected 'early', 'heuristic' or 'never'.")
        self._check_contradictions()

    # -- making ------------------------------------------------------------------------------------------------------

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any]) -> GenerationConfig:
        """From Hugging Face's names: a dict, a `generation_config.json`, or a directory that holds one.

        Raises:
            ConfigError: a key that is unknown, or that would change the reply and has no counterpart here.
        """
        return cls(**config_names.from_hf(source))

    @classmethod
    def from_openai(cls, request: Mapping[str, Any]) -> GenerationConfig:
        """From the names of OpenAI's chat completions; `model`, `messages`, `stream` and `user` are passed by.

        Raises:
            ConfigError: a key that is unknown or has no counterpart here.
        """
        return cls(**config_names.from_openai(request))

    def replace(self, **options: Any) -> GenerationConfig:
        """A copy with some options changed; None takes an option back.

        Raises:
            ConfigError: as the constructor.
        """
        check_names(options)
        return replace(self, **options)

    @property
    def given(self) -> dict[str, Any]:
        """The options that are not None, by name."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}

    def to_dict(self) -> dict[str, Any]:
        """The options that are not None as JSON-ready values; of functions, their names."""
        values = self.given
        if self.logits_processors is not None:
            values["logits_processors"] = [getattr(f, "__name__", type(f).__name__) for f in self.logits_processors]
        return values

    def merged_over(self, base: GenerationConfig) -> GenerationConfig:
        """Both together, this one's options before `base`'s.

        What contradicts this one in `base` gives way: `temperature=0` over a model that samples by default is greedy.
        """
        mine, theirs = self.given, base.given
        sampling = self._samples()
        if sampling is False or self.num_beams not in (None, 1):
            theirs = {k: v for k, v in theirs.items() if k not in (*_SAMPLING, "do_sample")}
        elif sampling and theirs.get("do_sample") is False:
            theirs.pop("do_sample")
        if theirs.get("temperature") == 0 and sampling:
            theirs.pop("temperature")
        if sampling:
            theirs = {k: v for k, v in theirs.items() if k != "num_beams" and k not in _BEAMS}
        for pair in (("max_new_tokens", "max_length"), ("max_length", "max_new_tokens")):
            if pair[0] in mine:
                theirs.pop(pair[1], None)
        if any(name in mine for name in _STRUCTURED):
            theirs = {k: v for k, v in theirs.items() if k not in _STRUCTURED}
        return GenerationConfig(**{**theirs, **mine})

    def resolve(self, model: GenerationConfig | None = None, *, room: int, prompt_tokens: int = 0) -> GenerationConfig:
        """Every option filled in: this one's, else the model's, else the default.

        Args:
            model: the model's own options.
            room: tokens that the context window has left for the reply; the default and the upper bound of its length.
            prompt_tokens: length of the prompt, which `max_length` counts too.
        """
        merged = self.merged_over(model) if model is not None else self
        values = {**DEFAULTS, **merged.given}
        values["do_sample"] = bool(merged._samples())
        if values["temperature"] == 0:
            values["temperature"] = DEFAULTS["temperature"]
        limit = values.pop("max_length", None)
        wanted = values.get("max_new_tokens") or (max(limit - prompt_tokens, 1) if limit else room)
        values["max_new_tokens"] = min(wanted, room)
        values["min_new_tokens"] = min(values["min_new_tokens"], values["max_new_tokens"])
        if values["do_sample"] and values.get("seed") is None:
            values["seed"] = secrets.randbits(32)
        return GenerationConfig(**values)

    # -- to the engine -----------------------------------------------------------------------------------------------

    def to_genai(self) -> openvino_genai.GenerationConfig:
        """The same as an `openvino_genai.GenerationConfig`, for use with that library directly.

        Raises:
            ConfigError: an option that GenAI does not have.
        """
        return config_names.to_genai(self)

    def own_loop(self) -> str | None:
        """The first option given that only `backend="infer_request"` has, as it was written; None without one."""
        given = self._set(OWN_LOOP)
        return self._show(given[0]) if given else None

    def _is_search(self) -> bool:
        """Whether it asks for several replies to choose from, which cannot be streamed."""
        return (self.num_beams or 1) > 1 or (self.num_return_sequences or 1) > 1

    def _samples(self) -> bool | None:
        """Whether this record asks for sampling (True), for greedy (False), or leaves it open (None)."""
        if self.do_sample is not None:
            return self.do_sample
        if self.temperature is not None:
            return self.temperature > 0
        return True if self._set(_SAMPLING) else None

    def _set(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that were given with a value that changes something."""
        return [n for n in names if getattr(self, n) is not None and getattr(self, n) != DEFAULTS.get(n)]

    def _check_contradictions(self) -> None:
        beams = self.num_beams or 1
        sampling = self._set(_SAMPLING)
        if self.do_sample and self.temperature == 0:
            raise _contradiction("do_sample=True", "temperature=0", "temperature 0 is greedy; leave one of them out")
        if self._samples() is False and (useless := [n for n in sampling if getattr(self, n) != 0]):
            why = "do_sample=False" if self.do_sample is False else "temperature=0"
            raise _contradiction(why, self._show(useless[0]), "a greedy reply does not sample; leave one of them out")
        if beams > 1 and self._samples():
            other = self._show((sampling or ["do_sample" if self.do_sample else "temperature"])[0])
            raise _contradiction(f"num_beams={beams}", other, "beam search does not sample; leave one of them out")
        if beams == 1 and (useless := self._set(_BEAMS)):
            raise _contradiction(self._show(useless[0]), "num_beams=1", "it works with beam search only; set num_beams")
        self._check_counts(beams)
        if len(given := self._set(_STRUCTURED)) > 1:
            raise _contradiction(given[0], given[1], "a reply follows one structure; give one of them")
        if given and beams > 1:
            raise _contradiction(given[0], f"num_beams={beams}", "structured replies are sampled or greedy")
        if self.num_assistant_tokens is not None and self.assistant_confidence_threshold is not None:
            raise _contradiction(*_ASSISTED[:2], "give the number of candidates or their confidence")
        if self.max_ngram_size is not None and self.num_assistant_tokens is None:
            raise ConfigError("max_ngram_size belongs to prompt lookup: give num_assistant_tokens too.")

    def _check_counts(self, beams: int) -> None:
        """Contradictions between numbers of tokens, beams and sequences."""
        if self.max_new_tokens is not None and self.max_length is not None:
            raise _contradiction(self._show("max_new_tokens"), self._show("max_length"), "give one of them")
        if (self.min_new_tokens or 0) > (self.max_new_tokens or math.inf):
            raise _contradiction(
                self._show("min_new_tokens"), self._show("max_new_tokens"), "the least is above the most"
            )
        groups, wanted = self.num_beam_groups or 1, self.num_return_sequences or 1
        if beams % groups:
            raise _contradiction(f"num_beams={beams}", f"num_beam_groups={groups}", "the groups must divide the beams")
        if self._set(["diversity_penalty"]) and groups == 1:
            raise _contradiction(self._show("diversity_penalty"), "num_beam_groups=1", "it works between groups")
        if wanted > 1 and beams == 1 and self._samples() is False:
            raise _contradiction(f"num_return_sequences={wanted}", "greedy", "greedy replies are all the same")
        if beams > 1 and wanted > beams:
            raise _contradiction(
                f"num_return_sequences={wanted}", f"num_beams={beams}", "there are not that many beams"
            )

    def _show(self, name: str) -> str:
        return f"{name}={getattr(self, name)!r}"


def check_names(options: Iterable[str]) -> None:
    """Refuse option names that do not exist, naming the nearest, or what another API's name is called here."""
    valid = GenerationConfig.__dataclass_fields__
    for name in options:
        if name not in valid:
            alias = config_names.ALIASES.get(name)
            hint = f" It is called {alias!r} here." if alias else did_you_mean(name, valid)
            raise ConfigError(f"Unknown option {name!r}.{hint} All options: {', '.join(valid)}.")


def _contradiction(one: str, other: str, why: str) -> ConfigError:
    return ConfigError(f"{one} contradicts {other}: {why}.")
