"""The engine with real models in float32: greedy ids equal the reference's, whatever runs beside them."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import Reference

import ov_phi3
from ov_phi3 import Pipeline

GREEDY: dict[str, Any] = {"do_sample": False, "ignore_eos": True}
Ids = list[int]
Model = tuple[Path, Path, int]


def drawn(count: int, seed: int = 0) -> Ids:
    return np.random.default_rng(seed).integers(300, 31_000, count).tolist()


def check_idle(pipe: Pipeline) -> int:
    """Wait until the owner thread has ended; no block may be in use then. Returns the number of preemptions."""
    for thread in threading.enumerate():
        if thread.name == "ov_phi3-engine":
            thread.join()
    engine: Any = pipe.engine.check_open()._backend._engine  # type: ignore[attr-defined]
    engine.blocks.check([])
    assert engine.blocks.num_available == engine.blocks.num_blocks
    preemptions: int = engine._scheduler.preemptions
    return preemptions


# -- random histories --------------------------------------------------------------------------------------------------


class Histories:
    """Random histories on one pipeline: prompts, cancels, prefixes, and chats with forks and rewinds.

    Args:
        pipe: the pipeline.
        seed: determines what is requested.
        longest: most tokens of a reply.

    Attributes:
        replies: prompt and reply of every request, and whether the reply was cancelled.
        samples: prompt, options and replies of every request for several seeded samples.
    """

    def __init__(self, pipe: Pipeline, seed: int, longest: int) -> None:
        self.pipe = pipe
        self.longest = longest
        draw = random.Random(seed)
        self.texts = [
            [draw.randrange(300, 31_000) for _ in range(draw.choice([5, 31, 32, 33, 64, 90]))] for _ in range(6)
        ]
        self.replies: list[tuple[Ids, Ids, bool]] = []
        self.samples: list[tuple[Ids, dict[str, Any], list[Ids]]] = []

    def play(self, seed: int) -> None:
        """One history."""
        draw = random.Random(seed)
        kind = draw.choice(["prompt", "prompt", "prompt", "cancel", "prefix", "chat", "samples"])
        if kind == "chat":
            self.chat(draw)
            return
        text = draw.choice(self.texts)
        prompt = text[: draw.randrange(1, len(text) + 1)]
        prompt += [draw.randrange(300, 31_000) for _ in range(draw.randrange(1, 40))]
        count = draw.randrange(1, self.longest)
        if kind == "prefix":
            prefix = self.pipe.prefill(prompt[: draw.randrange(1, len(prompt))])
            self.note(self.pipe.generate(prompt, prefix=prefix, max_new_tokens=count, **GREEDY), count)
            return
        if kind == "samples":
            options = {
                "num_return_sequences": draw.randrange(2, 4),
                "seed": draw.randrange(99),
                "max_new_tokens": count,
            }
            self.samples.append((prompt[-50:], options, self.sampled(prompt[-50:], options)))
            return
        stream = self.pipe.stream(prompt, max_new_tokens=count, **GREEDY)
        stop_at = draw.randrange(5) if kind == "cancel" else count
        for number, _ in enumerate(stream):
            if number == stop_at:
                stream.cancel()
        self.note(stream.result, count)

    def sampled(self, prompt: Ids, options: dict[str, Any]) -> list[Ids]:
        result = self.pipe.generate(prompt, do_sample=True, ignore_eos=True, **options)
        return [list(reply.token_ids) for reply in result.alternatives]

    def chat(self, draw: random.Random) -> None:
        """Two to four turns, some of them taken back, or continued in a fork."""
        chat = self.pipe.chat(system=draw.choice([None, "Be brief.", "Answer in one word."]))
        for _ in range(draw.randrange(2, 5)):
            count = draw.randrange(1, 8)
            self.note(chat.send(draw.choice(["Why?", "And then?", "Say more."]), max_new_tokens=count, **GREEDY), count)
            action = draw.random()
            if action < 0.25:
                chat.rewind()
            elif action < 0.5:
                chat = chat.fork()
            elif action < 0.6:
                chat.truncate(draw.randrange(1, len(chat.token_ids) + 1))

    def note(self, result: Any, count: int) -> None:
        cancelled = result.finish_reason == "cancelled"
        assert cancelled or len(result.token_ids) == count
        self.replies.append((list(result.prompt_token_ids), list(result.token_ids), cancelled))


@pytest.fixture(scope="module")
def sdpa(tiny_fp32: Path, device: str) -> Iterator[Pipeline]:
    """LLMPipeline without paged attention."""
    with ov_phi3.load(tiny_fp32, device=device, ov_config={"ATTENTION_BACKEND": "SDPA"}) as pipe:
        yield pipe


@pytest.mark.parametrize(
    ("part", "blocks", "options"),
    [(0, 0, {}), (1, 0, {"prefill_chunk": 16}), (2, 12, {}), (3, 16, {"prefill_chunk": 24})],
    ids=["growing", "chunks", "12 blocks", "16 blocks and chunks"],
)
def test_random_histories_equal_llm_pipeline(
    tiny_fp32: Path, device: str, sdpa: Pipeline, part: int, blocks: int, options: dict[str, Any]
) -> None:
    """250 histories, 12 at a time on 8 places; with few blocks, sequences are preempted and computed again."""
    if blocks:
        info = ov_phi3.ModelInfo.from_dir(tiny_fp32)
        size = 4 * 2 * info.num_layers * info.num_kv_heads * info.head_dim
        options = {**options, "kv_cache_gb": blocks * 32 * size / 2**30, "context_length": 300}
    with ov_phi3.load(tiny_fp32, device, backend="infer_request", concurrency=8, **options) as pipe:
        histories = Histories(pipe, seed=part, longest=60 if blocks else 25)
        with ThreadPoolExecutor(12) as pool:
            list(pool.map(histories.play, range(250 * part, 250 * part + 250)))
        preemptions = check_idle(pipe)
        for prompt, sampling, replies in histories.samples:
            assert histories.sampled(prompt, sampling) == replies, "seeded samples depend on what runs beside them"
        check_idle(pipe)
    assert len(histories.replies) > 250
    assert len(histories.samples) > 20
    assert sum(cancelled for _, _, cancelled in histories.replies) > 10
    assert preemptions > 10 or not blocks
    longest: dict[tuple[int, ...], int] = {}
    for prompt, reply, _ in histories.replies:
        longest[tuple(prompt)] = max(len(reply), longest.get(tuple(prompt), 1))
    expected = {
        prompt: sdpa.generate(list(prompt), max_new_tokens=count, **GREEDY).token_ids
        for prompt, count in longest.items()
    }
    wrong = [
        (len(prompt), reply, expected[tuple(prompt)])
        for prompt, reply, _ in histories.replies
        if reply != expected[tuple(prompt)][: len(reply)]
    ]
    assert wrong == []


# -- several at once, of one kind each ---------------------------------------------------------------------------------


def at_once(pipe: Pipeline, prompts: Sequence[Ids], count: int) -> list[Ids]:
    """Greedy replies to all prompts in one batch."""
    streams = [pipe.stream(prompt, max_new_tokens=count, **GREEDY) for prompt in prompts]
    return [list(stream.result.token_ids) for stream in streams]


@pytest.fixture(scope="module")
def longrope_reference(longrope: Model) -> Reference:
    return Reference(longrope[1], longrope[2])


@pytest.fixture(scope="module")
def longrope_pipe(longrope: Model, device: str) -> Iterator[Pipeline]:
    with ov_phi3.load(longrope[0], device=device, backend="infer_request", concurrency=12) as pipe:
        yield pipe


class TestLongRope:
    """Prompts below, at and above the boundary, and replies that cross it."""

    @staticmethod
    def prompts(boundary: int, seed: int) -> list[Ids]:
        """Beginnings of one text, and other texts of the same length."""
        lengths = [boundary + more for more in (-30, -9, -1, 0, 1, 9, boundary)]
        return [drawn(2 * boundary, seed)[:length] for length in lengths] + [
            drawn(boundary + more, seed + 1 + index) for index, more in enumerate((-20, -5, 2))
        ]

    @pytest.mark.parametrize("batch", [False, True], ids=["alone", "in one batch"])
    def test_equals_the_reference(
        self, longrope_pipe: Pipeline, longrope_reference: Reference, longrope: Model, batch: bool
    ) -> None:
        prompts = self.prompts(longrope[2], seed=10 + batch)
        if batch:
            replies = at_once(longrope_pipe, prompts, 40)
        else:
            replies = [
                list(longrope_pipe.generate(prompt, max_new_tokens=40, **GREEDY).token_ids) for prompt in prompts
            ]
        check_idle(longrope_pipe)
        assert [len(reply) for reply in replies] == [40] * len(prompts)
        wrong = {
            len(prompt): different
            for prompt, reply in zip(prompts, replies, strict=True)
            if (different := longrope_reference.differences(prompt, reply))
        }
        assert wrong == {}

    def test_a_chat_that_crosses_and_goes_back(
        self, longrope_pipe: Pipeline, longrope_reference: Reference, longrope: Model
    ) -> None:
        """Rewound and truncated to the other side, and forked across it."""
        chat = longrope_pipe.chat(system="word " * (longrope[2] - 50))
        results = []
        for number in range(4):
            results.append(chat.send(f"Tell me about {number}.", max_new_tokens=20, **GREEDY))
            if number == 1:
                fork = chat.fork()
                results.append(fork.send("Why?", max_new_tokens=30, **GREEDY))
        assert len(chat.token_ids) > longrope[2]
        chat.rewind(3)
        results.append(chat.send("And now?", max_new_tokens=9, **GREEDY))
        fork.truncate(longrope[2] - 5)
        results.append(fork.send("And here?", max_new_tokens=9, **GREEDY))
        for result in results:
            assert longrope_reference.differences(result.prompt_token_ids, result.token_ids) == []

    def test_a_crossing_computes_only_its_own_sequence_again(self, longrope_pipe: Pipeline, longrope: Model) -> None:
        boundary = longrope[2]
        below, above = drawn(boundary - 3, seed=50), drawn(boundary + 20, seed=51)
        streams = [longrope_pipe.stream(ids, max_new_tokens=30, **GREEDY) for ids in (below, above)]
        first, second = (stream.result.metrics.recomputed_tokens for stream in streams)
        assert (first, second) == (boundary + 1, 0)


class TestSlidingWindow:
    """Past 2047 tokens each token attends to the last 2047 only."""

    WINDOW = 2047

    def test_equals_the_reference(self, sliding: tuple[Path, Path], device: str) -> None:
        """Prompts below and above the window and a reply that leaves it, alone and beside each other."""
        reference = Reference(sliding[1])
        whole = drawn(self.WINDOW + 700, seed=4)
        prompts = [whole[: self.WINDOW - 15], whole[: self.WINDOW + 1], whole, drawn(40, seed=5)]
        options: dict[str, Any] = {"concurrency": 4, "prefill_chunk": 512}
        with ov_phi3.load(sliding[0], device=device, backend="infer_request", **options) as pipe:
            replies = at_once(pipe, prompts, 40)
            alone = pipe.generate(prompts[1], max_new_tokens=40, **GREEDY)  # from the cache, all but one token
            check_idle(pipe)
        assert alone.token_ids == replies[1]
        assert [reference.differences(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)] == [
            []
        ] * 4
