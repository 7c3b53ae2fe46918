"""Several samples of one prompt on our own engine: one prefill, reproducible seeds, and the ends of a reply."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paged import Passes, blocks_of

import ov_phi3
from ov_phi3 import GenerationResult, Pipeline

OPTIONS: dict[str, Any] = {"num_return_sequences": 3, "temperature": 1.5, "seed": 7, "ignore_eos": True}


def prompt(seed: int, length: int = 100) -> list[int]:
    return np.random.default_rng(seed).integers(300, 31_000, length).tolist()


def ids_of(result: GenerationResult) -> list[list[int]]:
    return [alternative.token_ids for alternative in result.alternatives]


def test_the_prompt_is_prefilled_once(tiny_loop: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = Passes(monkeypatch)
    result = tiny_loop.generate(prompt(1), max_new_tokens=4, **OPTIONS)
    assert [len(ids) for ids in ids_of(result)] == [4, 4, 4]
    # One pass for the prompt, then one token of each sample a pass; the last token is not fed back.
    assert passes.tokens == [100, 3, 3, 3]


def test_seeds_are_reproducible(tiny_loop: Pipeline) -> None:
    """Alone, after other requests, when the prompt is cached, and beside other requests."""
    ids = prompt(2)
    alone = ids_of(tiny_loop.generate(ids, max_new_tokens=8, **OPTIONS))
    assert len({tuple(sample) for sample in alone}) == 3
    tiny_loop.generate(ids[:50] + prompt(3), max_new_tokens=3)
    tiny_loop.generate(ids, max_new_tokens=3, temperature=2.0)
    assert ids_of(tiny_loop.generate(ids, max_new_tokens=8, **OPTIONS)) == alone
    other = ids_of(tiny_loop.generate(ids, max_new_tokens=8, **{**OPTIONS, "seed": 8}))
    assert other != alone
    assert ids_of(tiny_loop.generate(ids, max_new_tokens=8, **OPTIONS)) == alone


class Started:
    """Long samples, and an event in the middle of them.

    Args:
        pipe: the pipeline.
        at: reply tokens of a sample at which `event` is set.
    """

    def __init__(self, pipe: Pipeline, at: int = 3, **options: Any) -> None:
        self.event = threading.Event()
        self.proceed = threading.Event()
        ids = prompt(4)
        calls: list[int] = []

        def processor(ids_so_far: Any, logits: Any) -> Any:
            calls.append(1)
            if len(calls) == 3 * at:  # three samples
                self.event.set()
                assert self.proceed.wait(60)
            return logits

        self.results: list[GenerationResult | BaseException] = []

        def work() -> None:
            try:
                self.results.append(
                    pipe.generate(ids, max_new_tokens=1500, logits_processors=[processor], **OPTIONS, **options)
                )
            except BaseException as exc:
                self.results.append(exc)

        self.thread = threading.Thread(target=work)
        self.thread.start()
        assert self.event.wait(60)

    def result(self) -> GenerationResult:
        """The result, after the samples continue."""
        self.proceed.set()
        self.thread.join(60)
        (result,) = self.results
        assert isinstance(result, GenerationResult), result
        return result


def check_ended(result: GenerationResult, reason: str) -> None:
    assert result.finish_reason == reason
    assert len(result.alternatives) == 3
    assert all(0 < len(ids) < 1500 for ids in ids_of(result))


def test_a_timeout_ends_them(tiny_loop: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    from ov_phi3.engine import worker

    real, late_s = worker.now, [0.0]
    monkeypatch.setattr(worker, "now", lambda: real() + late_s[0])
    started = Started(tiny_loop, timeout=1000)
    late_s[0] = 2000.0
    check_ended(started.result(), "timeout")
    late_s[0] = 0.0
    assert blocks_of(tiny_loop).num_available == blocks_of(tiny_loop).num_blocks
    assert tiny_loop.generate(prompt(5), max_new_tokens=2, ignore_eos=True).finish_reason == "length"


def cancel_all(pipe: Pipeline) -> None:
    """As Ctrl-C in the waiting caller does."""
    for channel in list(pipe.engine._live.values()):
        channel.cancel()


@pytest.mark.parametrize("end", [cancel_all, Pipeline.close], ids=["cancel", "close"])
def test_cancel_and_close_end_them(tiny_fp32: Path, device: str, end: Callable[[Pipeline], None]) -> None:
    with ov_phi3.load(tiny_fp32, device=device, backend="infer_request") as pipe:
        started = Started(pipe)
        ending = threading.Thread(target=end, args=(pipe,))
        ending.start()
        while not all(channel.cancelled for channel in list(pipe.engine._live.values())):
            pass  # close() waits for the samples, so it cannot be joined yet
        check_ended(started.result(), "cancelled")
        ending.join(60)
        assert not ending.is_alive()
        assert pipe.engine.closed == (end is Pipeline.close)
