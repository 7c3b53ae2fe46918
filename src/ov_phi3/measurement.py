"""Measure a pipeline: exact prompt lengths, fresh content every time, warm-up apart, every sample kept."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, overload

from ov_phi3.errors import ConfigError
from ov_phi3.generation_config import GenerationConfig
from ov_phi3.machine import Machine, peak_memory_bytes, resident_memory_bytes
from ov_phi3.metrics import Metrics
from ov_phi3.roofline import Roofline
from ov_phi3.summary import Summary

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ov_phi3.pipeline import Pipeline
    from ov_phi3.results import FinishReason, GenerationResult

__all__ = ["ChatTurn", "Measurement", "Report", "chat_message", "measure", "random_prompt"]

_SYSTEM_WORDS, _MESSAGE_WORDS, _REPLY_TOKENS = 40, 5, 32


@dataclass(frozen=True, slots=True)
class _Samples:
    """Replies that were measured under the same conditions.

    Attributes:
        samples: the metrics of each reply, in order.
    """

    samples: tuple[Metrics, ...]

    @property
    def ttft(self) -> Summary | None:
        """Time to first token, from the request until the token is on the caller's side, milliseconds."""
        return Summary.of(s.ttft_ms for s in self.samples)

    @property
    def engine_ttft(self) -> Summary | None:
        """Time to first token by the engine's own clock, milliseconds."""
        return Summary.of(s.engine_ttft_ms for s in self.samples)

    @property
    def first_text(self) -> Summary | None:
        """From the request to the first text that can be shown, milliseconds."""
        return Summary.of(s.first_text_ms for s in self.samples)

    @property
    def tpot(self) -> Summary | None:
        """Time per output token of each reply, milliseconds; None for replies of one token."""
        return Summary.of(s.tpot_ms for s in self.samples)

    @property
    def engine_tpot(self) -> Summary | None:
        """Mean gap between tokens by the engine's own clock, milliseconds."""
        return Summary.of(s.engine_tpot_ms for s in self.samples)

    @property
    def inter_token(self) -> Summary | None:
        """Every gap between two tokens of every reply, milliseconds; the percentiles show what a mean hides."""
        return Summary.of(gap for s in self.samples for gap in s.inter_token_ms)

    @property
    def total(self) -> Summary | None:
        """From the request to the end of the reply, milliseconds."""
        return Summary.of(s.total_ms for s in self.samples)

    @property
    def cached_tokens(self) -> int | None:
        """The most prompt tokens that a reply took from the prefix cache; None where that cannot be known."""
        known = [s.reused_tokens for s in self.samples if s.reused_tokens is not None]
        return max(known) if len(known) == len(self.samples) else None

    # Medians under the names that `Metrics` has for one reply.

    @property
    def ttft_ms(self) -> float:
        """Median time to first token, milliseconds."""
        return _median(self.ttft)

    @property
    def tpot_ms(self) -> float | None:
        """Median time per output token, milliseconds; None for replies of one token."""
        return None if self.tpot is None else self.tpot.p50

    @property
    def total_ms(self) -> float:
        """Median time of a whole reply, milliseconds."""
        return _median(self.total)

    def to_dict(self) -> dict[str, Any]:
        """The medians, every summary and every sample as JSON-ready values."""
        kinds = ("ttft", "engine_ttft", "first_text", "tpot", "engine_tpot", "inter_token", "total")
        summaries = {kind: getattr(self, kind) for kind in kinds}
        return {
            "ttft_ms": self.ttft_ms,
            "tpot_ms": self.tpot_ms,
            "total_ms": self.total_ms,
            "cached_tokens": self.cached_tokens,
            "summaries_ms": {kind: found and found.to_dict() for kind, found in summaries.items()},
            "samples": [s.to_dict() for s in self.samples],
        }


@dataclass(frozen=True, slots=True)
class Measurement(_Samples):
    """Replies of one prompt length.

    Attributes:
        samples: the metrics of each reply, in order.
        prompt_tokens: length of every prompt.
        new_tokens: length of every reply; its limit where replies end naturally.
        finish_reasons: why each reply ended: "length" for a forced length.
        roofline_fraction: how much of the speed that memory allows the median TPOT reaches, 0 to 1; None where it was
            not measured, or replies have one token.
    """

    prompt_tokens: int
    new_tokens: int
    finish_reasons: tuple[FinishReason, ...] = ()
    roofline_fraction: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        about = {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "finish_reasons": list(self.finish_reasons),
            "roofline_fraction": self.roofline_fraction,
        }
        return {**about, **_Samples.to_dict(self)}


@dataclass(frozen=True, slots=True)
class ChatTurn(_Samples):
    """One turn of a chat, over several conversations.

    Attributes:
        samples: the metrics of this turn in each conversation.
        turn: its number, from 1.
    """

    turn: int

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the conversation up to this turn's reply; the median where conversations differ."""
        return round(_median(Summary.of(s.prompt_tokens for s in self.samples)))

    @property
    def prefilled_tokens(self) -> int | None:
        """Prompt tokens that were computed, the others being cached; the median, None where it cannot be known."""
        known = Summary.of(s.prompt_tokens - s.reused_tokens for s in self.samples if s.reused_tokens is not None)
        return None if known is None else round(known.p50)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        about = {
            "turn": self.turn,
            "prompt_tokens": self.prompt_tokens,
            "prefilled_tokens": self.prefilled_tokens,
        }
        return {**about, **_Samples.to_dict(self)}


@dataclass(frozen=True, slots=True)
class Report:
    """What `measure` found, with all that it depends on. Also a sequence of its measurements.

    Attributes:
        measured_at: when, UTC, ISO 8601.
        machine: the machine and the versions.
        device: the device, its driver and capabilities.
        model: the model, how it is stored, and its manifest.
        settings: how it was loaded and measured, with the seed.
        load_ms: all of `load`, milliseconds, and its parts.
        first_inference_ms: the first short inference after loading; None for a pipeline that was in use before.
        warm_inference_ms: the same once more: the difference is what a first request pays.
        measurements: one per prompt length.
        chat: one per turn; empty unless asked for.
        roofline: the limit that memory sets; None unless asked for.
        loaded_memory_bytes: memory of the process before the first measured reply; None where the system does not tell.
        peak_memory_bytes: the most memory of the process up to the last one, loading included; None likewise.
    """

    measured_at: str
    machine: Machine
    device: dict[str, Any]
    model: dict[str, Any]
    settings: dict[str, Any]
    load_ms: dict[str, float]
    first_inference_ms: float | None
    warm_inference_ms: float
    measurements: tuple[Measurement, ...]
    chat: tuple[ChatTurn, ...] = ()
    roofline: Roofline | None = None
    loaded_memory_bytes: int | None = None
    peak_memory_bytes: int | None = None

    def __len__(self) -> int:
        return len(self.measurements)

    def __iter__(self) -> Iterator[Measurement]:
        return iter(self.measurements)

    @overload
    def __getitem__(self, index: int) -> Measurement: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Measurement]: ...

    def __getitem__(self, index: int | slice) -> Measurement | Sequence[Measurement]:
        return self.measurements[index]

    def __str__(self) -> str:
        from ov_phi3.report_text import report_text

        return report_text(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything, every sample included, as JSON-ready values."""
        return {
            "measured_at": self.measured_at,
            "machine": self.machine.to_dict(),
            "device": self.device,
            "model": self.model,
            "settings": self.settings,
            "load_ms": self.load_ms,
            "first_inference_ms": self.first_inference_ms,
            "warm_inference_ms": self.warm_inference_ms,
            "loaded_memory_bytes": self.loaded_memory_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "roofline": self.roofline and asdict(self.roofline),
            "measurements": [m.to_dict() for m in self.measurements],
            "chat": [turn.to_dict() for turn in self.chat],
        }


def measure(
    pipe: Pipeline,
    *,
    prompt_tokens: int | Sequence[int] = (32, 256),
    new_tokens: int = 64,
    repeat: int = 5,
    ends: str = "forced",
    chat_turns: int = 0,
    roofline: bool = True,
    seed: int = 0,
    progress: Callable[[str], object] | None = None,
) -> Report:
    """Greedy replies to prompts of exact lengths: first-token and per-token latency, with all that they depend on.

    Every prompt is drawn anew from the ordinary vocabulary, so that no prefix cache can shorten a first token, and
    `Measurement.cached_tokens` proves it. One reply of each prompt length is thrown away first: kernels are chosen per
    shape, and the first use of one pays for that. The lengths take turns, so that a drift of the machine's speed meets
    all of them.

    Args:
        pipe: a loaded pipeline; one that nothing was asked of yet also tells what the first inference costs.
        prompt_tokens: prompt lengths; may be empty where only a chat is measured.
        new_tokens: tokens per reply.
        repeat: replies per prompt length, and conversations.
        ends: "forced": every reply has `new_tokens` tokens; "natural": end tokens end it.
        chat_turns: turns of a conversation to measure too, with short messages and replies of 32 tokens; 0 for none.
        roofline: whether to measure the memory's bandwidth and say how much of it was used; takes 256 MiB and a second.
        seed: of the prompts' content.
        progress: told what is measured next, a short text.

    Raises:
        ConfigError: a length or count out of range, or another `ends`.
        ContextOverflowError: prompt and reply do not fit the context window.
        TypeError: a length or count that is no whole number.
    """
    lengths = [prompt_tokens] if isinstance(prompt_tokens, int) else list(prompt_tokens)
    _check(pipe, lengths, new_tokens, repeat, ends, chat_turns)
    tell = progress or (lambda _: None)
    unused = pipe.unused
    tell("first inference")
    first, warm = pipe.warmup(), pipe.warmup()
    loaded = resident_memory_bytes()
    rng = random.Random(seed)
    replies = _replies(pipe, lengths, new_tokens, repeat, ends == "natural", rng, tell)
    turns = _chat_turns(pipe, chat_turns, repeat, rng, tell)
    peak = peak_memory_bytes()
    limit = None
    if roofline:  # last, as it takes memory of its own
        tell("memory bandwidth")
        limit = Roofline.measure(pipe.info, pipe.device.name, pipe.load_report.ov_config)
    return Report(
        measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        machine=Machine.here(),
        device=asdict(pipe.device),
        model=_about_model(pipe),
        settings={
            "backend": pipe.load_report.backend,
            "ov_config": {key: str(value) for key, value in pipe.load_report.ov_config.items()},
            "context_length": pipe.context_length,
            "kv_cache": asdict(pipe._pool.layout),
            "prefill_chunk": pipe._generator.chunk,
            "compile_cache": pipe.load_report.cache,
            "prompt_tokens": lengths,
            "new_tokens": new_tokens,
            "repeat": repeat,
            "discarded": 1,
            "ends": ends,
            "chat_turns": chat_turns,
            "sampling": "greedy",
            "seed": seed,
        },
        load_ms={
            "total": pipe.load_report.total_ms,
            "model": pipe.load_report.model_ms,
            "tokenizer": pipe.load_report.tokenizer_ms,
        },
        first_inference_ms=first if unused else None,
        warm_inference_ms=warm,
        measurements=tuple(
            _measurement(n, new_tokens, found[1:], limit) for n, found in zip(lengths, replies, strict=True)
        ),
        chat=turns,
        roofline=limit,
        loaded_memory_bytes=loaded,
        peak_memory_bytes=peak,
    )


def random_prompt(pipe: Pipeline, tokens: int, rng: random.Random) -> list[int]:
    """A prompt of so many ordinary tokens, drawn: no cache has seen it, and no control token is in it."""
    special = set(pipe.tokenizer.control_tokens.values())
    size = min(pipe.info.vocab_size, pipe.tokenizer.vocab_size)
    drawn: list[int] = []
    while len(drawn) < tokens:
        drawn += [i for i in rng.choices(range(size), k=tokens - len(drawn)) if i not in special]
    return drawn


def _check(pipe: Pipeline, lengths: Sequence[int], new_tokens: int, repeat: int, ends: str, chat_turns: int) -> None:
    """Refuse what cannot be measured now, and not after minutes of measuring."""
    numbers = [("prompt_tokens", length, 1) for length in lengths]
    numbers += [("new_tokens", new_tokens, 1), ("repeat", repeat, 1), ("chat_turns", chat_turns, 0)]
    for name, value, least in numbers:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be a whole number, not {value!r}")
        if value < least:
            raise ConfigError(f"{name}={value}; expected at least {least}.")
    if ends not in ("forced", "natural"):
        raise ConfigError(f"ends={ends!r}; expected 'forced' or 'natural'.")
    wanted = GenerationConfig(max_new_tokens=new_tokens)
    for length in lengths:
        pipe._check_room(wanted, length, pipe.context_length - length)


def _replies(
    pipe: Pipeline,
    lengths: Sequence[int],
    new_tokens: int,
    repeat: int,
    natural: bool,
    rng: random.Random,
    tell: Callable[[str], object],
) -> list[list[GenerationResult]]:
    """For each length, the reply that is thrown away and those that count."""
    found: list[list[GenerationResult]] = [[] for _ in lengths]
    for number in range(repeat + 1):
        for place, tokens in enumerate(lengths):
            tell(f"{tokens} prompt tokens, " + (f"reply {number} of {repeat}" if number else "warm-up"))
            prompt = random_prompt(pipe, tokens, rng)
            found[place].append(
                pipe.generate(prompt, max_new_tokens=new_tokens, ignore_eos=not natural, do_sample=False)
            )
    return found


def _measurement(
    prompt_tokens: int, new_tokens: int, results: Sequence[GenerationResult], limit: Roofline | None
) -> Measurement:
    found = Measurement(
        samples=tuple(result.metrics for result in results),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        finish_reasons=tuple(result.finish_reason for result in results),
    )
    if limit is None or found.tpot_ms is None:
        return found
    # The cache grows by a token a step: on average it holds the prompt and half of the reply.
    reply = _median(Summary.of(s.generated_tokens for s in found.samples))
    fraction = limit.fraction(found.tpot_ms, prompt_tokens + reply / 2)
    return replace(found, roofline_fraction=fraction)


def _chat_turns(
    pipe: Pipeline, turns: int, repeat: int, rng: random.Random, tell: Callable[[str], object]
) -> tuple[ChatTurn, ...]:
    """Conversations with messages and replies of equal lengths and fresh content; the first is thrown away."""
    if not turns:
        return ()
    rows: list[list[Metrics]] = [[] for _ in range(turns)]
    for number in range(repeat + 1):
        chat = pipe.chat(system=chat_message(rng, _SYSTEM_WORDS))
        for row in rows:
            tell(f"chat of {turns} turns, " + (f"conversation {number} of {repeat}" if number else "warm-up"))
            message = chat_message(rng)
            result = chat.send(message, max_new_tokens=_REPLY_TOKENS, ignore_eos=True, do_sample=False)
            if number:
                row.append(result.metrics)
    return tuple(ChatTurn(tuple(row), turn) for turn, row in enumerate(rows, start=1))


def chat_message(rng: random.Random, words: int = _MESSAGE_WORDS) -> str:
    """A message that no cache has seen; numbers of two digits, so that all are of the same length in tokens."""
    return "Remember these: " + " ".join(str(rng.randrange(10, 100)) for _ in range(words))


def _about_model(pipe: Pipeline) -> dict[str, Any]:
    info = pipe.info
    return {
        "path": str(info.path),
        "family": info.family,
        "quantization": info.quantization,
        "weight_bytes": info.weight_bytes,
        "num_layers": info.num_layers,
        "hidden_size": info.hidden_size,
        "fingerprint": info.fingerprint,
        "exporter_versions": dict(info.exporter_versions),
        "manifest": info.manifest and dict(info.manifest),
    }


def _median(found: Summary | None) -> float:
    return float("nan") if found is None else found.p50
