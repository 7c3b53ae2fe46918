"""Measure a pipeline: exact prompt lengths, fresh content every time, warm-up apart, every sample kept."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from statistics import median
from typing import TYPE_CHECKING, Any

from ov_phi3.bench.report import ChatTurn, Measurement, Report
from ov_phi3.bench.roofline import Roofline
from ov_phi3.errors import ConfigError
from ov_phi3.generation.config import GenerationConfig
from ov_phi3.generation.metrics import Metrics
from ov_phi3.system.machine import Machine, peak_memory_bytes, resident_memory_bytes

if TYPE_CHECKING:
    from ov_phi3.generation.results import GenerationResult
    from ov_phi3.pipeline import Pipeline

__all__ = ["chat_message", "measure", "random_prompt"]

_SYSTEM_WORDS, _MESSAGE_WORDS, _REPLY_TOKENS = 40, 5, 32


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
        pipe._limits.check_room(wanted, length, pipe.context_length - length)


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
    reply = median(s.generated_tokens for s in found.samples)
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
