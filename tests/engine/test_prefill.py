"""Prefill in chunks: progress, equal replies, cancelling, and callbacks that raise."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ov_phi3
from ov_phi3 import ConfigError, Pipeline


@pytest.fixture(scope="module")
def chunked(demo_fp32: Path, device: str) -> Iterator[Pipeline]:
    with ov_phi3.load(demo_fp32, device=device, prefill_chunk=64) as pipe:
        yield pipe


class TestPrefill:
    def test_progress(self, chunked: Pipeline) -> None:
        prompt = np.random.default_rng(0).integers(300, 30_000, 300).tolist()
        seen: list[tuple[int, int]] = []
        first = chunked.generate(prompt, max_new_tokens=3, on_prefill=lambda done, total: seen.append((done, total)))
        assert seen == [(0, 300), (64, 300), (128, 300), (192, 300), (256, 300), (300, 300)]
        seen.clear()
        again = chunked.generate(
            [*prompt, 5], max_new_tokens=3, on_prefill=lambda done, total: seen.append((done, total))
        )
        assert seen == [(288, 301), (301, 301)]
        assert (first.metrics.reused_tokens, again.metrics.reused_tokens) == (
            0,
            288,
        )  # full blocks; the remainder went to the first reply

    def test_chunks_give_the_same_ids(self, chunked: Pipeline, demo_fp32: Path, device: str) -> None:
        prompt = chunked.encode("Tell me about the sea, " + "and about the sky, " * 60)
        with ov_phi3.load(demo_fp32, device=device, prefill_chunk=0) as whole:
            seen: list[int] = []
            expected = whole.generate(prompt, max_new_tokens=30, on_prefill=lambda done, _: seen.append(done))
            assert seen == [0, len(prompt)]
        assert chunked.generate(prompt, max_new_tokens=30).token_ids == expected.token_ids

    def test_cancelled_between_two_chunks(self, chunked: Pipeline) -> None:
        prompt = np.random.default_rng(1).integers(300, 30_000, 1000).tolist()
        seen: list[int] = []

        def watch(done: int, _total: int) -> None:
            seen.append(done)
            if done == 128:
                stream[0].cancel()

        started = threading.Event()
        stream: list[Any] = []

        def first(done: int, total: int) -> None:
            started.wait(30)
            watch(done, total)

        stream.append(chunked.stream(prompt, on_prefill=first))
        started.set()
        result = stream[0].result
        assert (result.finish_reason, result.token_ids, result.text) == ("cancelled", [], "")
        assert seen[-1] == 128
        # The prefilled chunks stay in the cache.
        assert chunked.generate(prompt, max_new_tokens=2).metrics.reused_tokens == 128

    def test_a_callback_that_raises(self, chunked: Pipeline) -> None:
        prompt = np.random.default_rng(2).integers(300, 30_000, 200).tolist()
        for at in (0, 64, 200):

            def raises(done: int, _total: int, at: int = at) -> None:
                if done >= at:
                    raise ZeroDivisionError

            with pytest.raises(ZeroDivisionError):
                chunked.generate(prompt, max_new_tokens=2, on_prefill=raises)
        assert chunked.generate("What is the capital of France?").text == "The capital of France is Paris."

    @pytest.mark.parametrize(
        ("chunk", "error"), [(-1, ConfigError), (True, TypeError), ("64", TypeError), (1.5, TypeError)]
    )
    def test_wrong_chunk_sizes(self, demo_int4: Path, device: str, chunk: Any, error: type[Exception]) -> None:
        with pytest.raises(error, match="prefill_chunk"):
            ov_phi3.load(demo_int4, device=device, prefill_chunk=chunk)

    def test_a_callback_of_another_type(self, pipe: Pipeline) -> None:
        with pytest.raises(TypeError, match="on_prefill"):
            pipe.generate("Hi", on_prefill="bar")  # type: ignore[arg-type]
