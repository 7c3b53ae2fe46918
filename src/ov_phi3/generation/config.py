"""`GenerationConfig`: all options of a reply, as one frozen, validated record.

A field that is None is *not given*: the model's own `generation_config.json` applies, then the default in `DEFAULTS`.
`resolve()` fills in every field. Each result holds the resolved config, so the options in use can always be read.
"""

from __future__ import annotations

import inspect
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ov_phi3.errors import ConfigError, did_you_mean
from ov_phi3.generation import contradictions, genai, hf, openai, validation
from ov_phi3.generation.contradictions import ASSISTED, BEAMS, PARTS, SAMPLING, STRUCTURED
from ov_phi3.generation.names import ALIASES, OTHER_CALLS
from ov_phi3.generation.options import DEFAULTS, LogitsProcessor, Speculation, StopCriteria
from ov_phi3.generation.validation import BOOLEANS, CHOICES, INTEGERS, NUMBERS

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ov_phi3.generation.options import GenerationOptions

__all__ = ["INFER_REQUEST_OPTIONS", "GenerationConfig"]

_CHANGING_LOGITS = (
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "dry_multiplier"),
    *("bad_words", "logit_bias", "logits_processors"),
)
INFER_REQUEST_OPTIONS = (
    *("typical_p", "top_n_sigma", "xtc_probability", "dry_multiplier", "bad_words", "stop_on_loop"),
    *("logit_bias", "logits_processors", "top_logprobs", "speculation", "json_whitespace"),
    *(name for names in PARTS.values() for name in names),
)
"""Options that only `backend="infer_request"` has; as it has `no_repeat_ngram_size` without beams."""


@dataclass(frozen=True)
class GenerationConfig:
    """Options of one reply. Everything is optional; None means "not given".

    NumPy's scalars are accepted and become Python's.

    Attributes:
        max_new_tokens: maximum length of the reply, in tokens; default: the rest of the context window.
        max_length: maximum length of prompt and reply, in tokens; an alternative to `max_new_tokens`.
        min_new_tokens: minimum length of the reply: no end token before.
        ignore_eos: continue after the model's end tokens, for replies of a fixed length.
        stop: strings that end the reply; no part of one is shown.
        include_stop: keep the stop string in the text.
        stop_token_ids: token ids that end the reply, besides the model's own.
        do_sample: sample (True) or take the most likely token (False); default: sample if a sampling option is given.
        temperature: 0 is greedy; higher values give more varied replies.
        top_p: sample from the smallest set of tokens with this total probability, in (0, 1].
        top_k: sample from this number of most likely tokens; 0 is all.
        min_p: exclude tokens less likely than this times the most likely token's probability, in [0, 1).
        typical_p: sample from the tokens whose information is closest to the entropy, up to this total probability, in
            (0, 1] (arXiv 2202.00666; needs `backend="infer_request"`, as do the next three).
        top_n_sigma: exclude logits this many standard deviations below the largest one; 0 is off (arXiv 2411.07641).
        xtc_probability: how often to exclude the most likely tokens, in [0, 1]: all with a probability of at least
            `xtc_threshold` but the least likely of them (XTC, text-generation-webui #6335).
        xtc_threshold: probability from which XTC excludes tokens; above 0.5 it never does.
        seed: seed of the sampling; None draws one, which the result's config holds.
        repetition_penalty: above 1.0 makes tokens of the prompt and the reply less likely.
        presence_penalty: in [-2, 2], applied once to each token already generated.
        frequency_penalty: in [-2, 2], applied as often as the token was generated.
        dry_multiplier: above 0 lowers the logits of what would prolong a repetition of n tokens by dry_multiplier *
            dry_base ** (n - dry_allowed_length) (DRY, text-generation-webui #5677; needs `backend="infer_request"`).
        dry_base: growth of the DRY penalty per repeated token, at least 1.
        dry_allowed_length: shortest repetition that DRY penalizes.
        dry_penalty_last_n: number of latest tokens that DRY looks at; -1 is all.
        dry_sequence_breakers: texts at which a repetition begins anew for DRY, as do special tokens.
        num_return_sequences: number of replies to one prompt; more than one needs sampling or beams, and `generate`;
            on `llm_pipeline` it cannot be cancelled.
        num_beams: above 1 is beam search; not for streams; on `llm_pipeline` it cannot be cancelled.
        num_beam_groups: number of groups of beams that are kept different from each other; divides `num_beams`.
        diversity_penalty: strength of the difference between groups.
        length_penalty: exponent of the length in a beam's score; above 0 favours longer replies.
        no_repeat_ngram_size: no n-gram of this size occurs twice; without beams it needs `backend="infer_request"`.
        stop_criteria: when beam search ends: "early", "heuristic" or "never".
        bad_words: texts that do not occur in the reply, however they are cut into tokens; a list of token ids excludes
            these ids in this order (needs `backend="infer_request"`, as does the next one).
        stop_on_loop: (window, repeats) ends a reply with finish reason "loop" when the same part, of at most `window`
            tokens, has come `repeats` times in a row.
        json_schema: the reply is JSON of this schema: a dict, its text, or a pydantic model class.
        json_whitespace: allow white space between the parts of the JSON (needs `backend="infer_request"`); default: no.
        regex: the reply matches this regular expression.
        grammar: the reply follows this EBNF grammar.
        num_assistant_tokens: drafts per step of prompt lookup; on `llm_pipeline` it needs `load(prompt_lookup=True)`.
        assistant_confidence_threshold: select candidates by confidence instead of by number (draft models).
        max_ngram_size: longest n-gram that prompt lookup searches for in the prompt.
        logit_bias: numbers added to the logits of token ids, as a dict; minus infinity excludes a token (needs
            `backend="infer_request"`, as do the next two).
        logits_processors: functions of (ids, logits) that return the logits: ids are int64 of shape [tokens], prompt
            and reply so far; logits are float32 of shape [vocabulary] and may be changed in place. They run in order,
            after penalties and bias, before temperature. An exception in one ends the reply and is raised.
        top_logprobs: log-probabilities of each token of the reply, and of this many most likely tokens, 0 to 20.
        speculation: "auto" guesses the next tokens from earlier text, or with a draft model, where that is faster
            (needs "infer_request").

    Raises:
        ConfigError: an option is unknown or out of range, or two options contradict each other.
        TypeError: a value has the wrong type.
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
    typical_p: float | None = None
    top_n_sigma: float | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_penalty_last_n: int | None = None
    dry_sequence_breakers: tuple[str, ...] | list[str] | str | None = None
    num_return_sequences: int | None = None
    num_beams: int | None = None
    num_beam_groups: int | None = None
    diversity_penalty: float | None = None
    length_penalty: float | None = None
    no_repeat_ngram_size: int | None = None
    stop_criteria: StopCriteria | None = None
    bad_words: Sequence[str | Sequence[int]] | str | None = None
    stop_on_loop: tuple[int, int] | Sequence[int] | None = None
    json_schema: dict[str, Any] | str | type[Any] | None = None
    json_whitespace: bool | None = None
    regex: str | None = None
    grammar: str | None = None
    num_assistant_tokens: int | None = None
    assistant_confidence_threshold: float | None = None
    max_ngram_size: int | None = None
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] | None = None
    logits_processors: Sequence[LogitsProcessor] | None = None
    top_logprobs: int | None = None
    speculation: Speculation | None = None

    def __new__(cls, *_: object, **options: object) -> GenerationConfig:  # noqa: D102 - __init__ with our error
        check_names(options)
        return object.__new__(cls)

    def __post_init__(self) -> None:
        for name in BOOLEANS:
            self._set(name, validation.boolean(name, getattr(self, name)))
        for name, integer_bounds in INTEGERS.items():
            self._set(name, validation.integer(name, getattr(self, name), *integer_bounds))
        for name, bounds in NUMBERS.items():
            self._set(name, validation.number(name, getattr(self, name), *bounds))
        for name in ("regex", "grammar"):
            self._set(name, validation.pattern(name, getattr(self, name)))
        self._set("stop", validation.stop_strings(self.stop))
        self._set("dry_sequence_breakers", validation.breakers(self.dry_sequence_breakers))
        self._set("bad_words", validation.bad_words(self.bad_words))
        self._set("stop_on_loop", validation.loop(self.stop_on_loop))
        self._set("stop_token_ids", validation.token_ids(self.stop_token_ids))
        self._set("json_schema", validation.schema_text(self.json_schema))
        self._set("logit_bias", validation.logit_bias(self.logit_bias))
        self._set("logits_processors", validation.processors(self.logits_processors))
        for name, values in CHOICES.items():
            validation.choice(name, getattr(self, name), values)
        contradictions.check(self)

    def __repr__(self) -> str:
        return f"GenerationConfig({', '.join(map(self.show, self.given))})"

    def _set(self, name: str, value: object) -> None:
        """Set a field of this frozen record; for `__post_init__` only."""
        object.__setattr__(self, name, value)

    # -- constructors and copies -------------------------------------------------------------------------------------

    @classmethod
    def one_token(cls) -> GenerationConfig:
        """The shortest reply, resolved: one greedy token, which may be an end token. For prefill and score requests."""
        return cls(max_new_tokens=1, do_sample=False, ignore_eos=True).resolve(room=1)

    @classmethod
    def of(cls, config: GenerationConfig | None, options: Mapping[str, Any]) -> GenerationConfig:
        """A config with options over it, as `generate(prompt, config, **options)` takes them.

        Raises:
            ConfigError: as the constructor.
            TypeError: `config` is not a `GenerationConfig`.
        """
        if config is None:
            return cls(**options)
        if not isinstance(config, GenerationConfig):
            raise TypeError(f"config must be a GenerationConfig, not {type(config).__name__}")
        return config.replace(**options) if options else config

    @classmethod
    def from_hf(cls, source: str | Path | Mapping[str, Any]) -> GenerationConfig:
        """From Hugging Face's names: a dict, a `generation_config.json`, or a directory that holds one.

        Raises:
            ConfigError: a key is unknown, or it would change the reply and has no option here.
        """
        return cls(**hf.from_hf(source))

    @classmethod
    def from_openai(cls, request: Mapping[str, Any]) -> GenerationConfig:
        """From the names of OpenAI's chat completions; `model`, `messages`, `stream` and `user` are ignored.

        Raises:
            ConfigError: a key is unknown or has no option here.
        """
        return cls(**openai.from_openai(request))

    def replace(self, **options: Unpack[GenerationOptions]) -> GenerationConfig:
        """A copy with some options changed; None removes an option.

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
        """The options that are not None as JSON-ready values; functions are given by name."""
        values = self.given
        if self.logits_processors is not None:
            values["logits_processors"] = [getattr(f, "__name__", type(f).__name__) for f in self.logits_processors]
        return values

    def merged_over(self, base: GenerationConfig) -> GenerationConfig:
        """Combine two configs; options of this one take precedence over those of `base`.

        Options of `base` that contradict this config are dropped: `temperature=0` over a model that samples by default
        is greedy.
        """
        own, inherited, lookup = self.given, base.given, (*ASSISTED, "max_ngram_size")
        samples = self.samples
        if samples is False or self.num_beams not in (None, 1):
            inherited = {k: v for k, v in inherited.items() if k not in (*SAMPLING, "do_sample")}
        elif samples and inherited.get("do_sample") is False:
            inherited.pop("do_sample")
        if inherited.get("temperature") == 0 and samples:
            inherited.pop("temperature")
        if samples or self.logit_options:
            if inherited.get("num_beams", 1) > 1:
                inherited.pop("no_repeat_ngram_size", None)  # it was meant for these beams
            inherited = {k: v for k, v in inherited.items() if k != "num_beams" and k not in BEAMS}
        if self.num_beams not in (None, 1):
            inherited = {k: v for k, v in inherited.items() if k not in (*_CHANGING_LOGITS, *lookup)}
        for name, alternative in (("max_new_tokens", "max_length"), ("max_length", "max_new_tokens")):
            if name in own:
                inherited.pop(alternative, None)
        if own.get("speculation") == "auto":
            inherited = {k: v for k, v in inherited.items() if k not in lookup}
        elif "num_assistant_tokens" in own:
            inherited.pop("speculation", None)
        if any(name in own for name in STRUCTURED):
            inherited = {k: v for k, v in inherited.items() if k not in (*STRUCTURED, "json_whitespace")}
        return GenerationConfig(**{**inherited, **own})

    def resolve(self, model: GenerationConfig | None = None, *, room: int, prompt_tokens: int = 0) -> GenerationConfig:
        """Fill in every option: from this config, else from the model's, else the default.

        Args:
            model: the model's own options.
            room: tokens of the context window left for the reply; default and upper bound of its length.
            prompt_tokens: length of the prompt, which `max_length` includes.
        """
        merged = self.merged_over(model) if model is not None else self
        values = {**DEFAULTS, **merged.given}
        values["do_sample"] = bool(merged.samples)
        if values["temperature"] == 0:
            values["temperature"] = DEFAULTS["temperature"]
        max_length = values.pop("max_length", None)
        max_new_tokens = values.get("max_new_tokens")
        if max_new_tokens is None:
            max_new_tokens = room if max_length is None else max(max_length - prompt_tokens, 1)
        values["max_new_tokens"] = min(max_new_tokens, room)
        values["min_new_tokens"] = min(values["min_new_tokens"], values["max_new_tokens"])
        if values["do_sample"] and values.get("seed") is None:
            values["seed"] = secrets.randbits(32)
        return GenerationConfig(**values)

    def to_genai(self) -> Any:
        """The same options as an `openvino_genai.GenerationConfig`, for use with that library directly.

        Raises:
            ConfigError: GenAI does not have an option.
        """
        if unsupported := self.infer_request_options:
            raise ConfigError(
                f"{unsupported[0]} has no counterpart in OpenVINO GenAI; load with backend='infer_request' to use it."
            )
        return genai.to_genai(self.given, do_sample=bool(self.samples))

    # -- properties that depend on several options -------------------------------------------------------------------

    @property
    def infer_request_options(self) -> tuple[str, ...]:
        """Options in use that only `backend="infer_request"` has, each as "name=value"."""
        without_beams = ("no_repeat_ngram_size",) if (self.num_beams or 1) == 1 else ()
        return tuple(self.show(name) for name in self.in_use((*INFER_REQUEST_OPTIONS, *without_beams)))

    @property
    def logit_options(self) -> tuple[str, ...]:
        """Options in use that change the model's logits, each as "name=value"."""
        return tuple(self.show(name) for name in self.in_use(_CHANGING_LOGITS))

    @property
    def structure(self) -> str | None:
        """The option that gives the reply a structure, or None: json_schema, regex or grammar."""
        return next(iter(self.in_use(STRUCTURED)), None)

    @property
    def is_multi_sequence(self) -> bool:
        """Whether the reply comes from several sequences (beams or samples), which cannot be streamed."""
        return self.num_sequences > 1

    @property
    def num_sequences(self) -> int:
        """Sequences that run at once: beams, or samples."""
        return max(self.num_beams or 1, self.num_return_sequences or 1)

    @property
    def samples(self) -> bool | None:
        """Whether these options ask for sampling (True) or greedy decoding (False); None if they leave it open."""
        if self.do_sample is not None:
            return self.do_sample
        if self.temperature is not None:
            return self.temperature > 0
        return True if self.in_use(SAMPLING) else None

    def in_use(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that are given with a value that has an effect."""
        return [n for n in names if getattr(self, n) is not None and getattr(self, n) != DEFAULTS.get(n)]

    def show(self, name: str) -> str:
        """An option as "name=value", for messages."""
        return f"{name}={getattr(self, name)!r}"


# The fields, instead of the arguments of `__new__`: for `help` and completion.
GenerationConfig.__signature__ = inspect.signature(GenerationConfig.__init__)  # type: ignore[attr-defined]


def check_names(options: Iterable[str]) -> None:
    """Refuse unknown option names.

    Raises:
        ConfigError: a name is unknown; the message gives the nearest name, or our name for another API's option.
    """
    known = GenerationConfig.__dataclass_fields__
    for name in options:
        if name in OTHER_CALLS:
            raise ConfigError(f"{name!r} is not an option of a reply: {OTHER_CALLS[name]}")
        if name not in known:
            alias = ALIASES.get(name)
            hint = f" It is called {alias!r} here." if alias else did_you_mean(name, known)
            raise ConfigError(f"Unknown option {name!r}.{hint} All options: {', '.join(known)}.")
