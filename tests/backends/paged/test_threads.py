"""The owner thread of the engine: when it lives, what may fail in it, and what runs beside it."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ov_phi3
from ov_phi3 import ClosedError, GenerationError, Pipeline, StreamError
from ov_phi3.backends.paged.model_runner import ModelRunner
from ov_phi3.backends.protocol import Cancelled

GREEDY: dict[str, Any] = {"do_sample": False, "ignore_eos": True}
Ids = list[int]
Run = Callable[..., Any]


def drawn(count: int, seed: int) -> Ids:
    return np.random.default_rng(seed).integers(300, 31_000, count).tolist()


@pytest.fixture(scope="module")
def batch(tiny_fp32: Path, device: str) -> Iterator[Pipeline]:
    with ov_phi3.load(tiny_fp32, device, backend="infer_request", concurrency=8) as pipe:
        yield pipe


def owner_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "ov_phi3-engine"]


def check_idle(pipe: Pipeline) -> None:
    """Join the owner thread; no block may be in use then."""
    for thread in owner_threads():
        thread.join()
    engine: Any = pipe.engine.check_open()._backend._engine  # type: ignore[attr-defined]
    engine.blocks.check([])
    assert engine.blocks.num_available == engine.blocks.num_blocks


class Passes:
    """Replaces `ModelRunner.run`; a test decides what happens around a pass.

    Attributes:
        steps: the parts of every pass so far.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, around: Callable[[Run, Any, Sequence[Any]], Any]) -> None:
        self.steps: list[list[Any]] = []
        original = ModelRunner.run

        def run(runner: Any, step: Sequence[Any], *args: Any, **options: Any) -> Any:
            self.steps.append(list(step))
            return around(lambda: original(runner, step, *args, **options), runner, step)

        monkeypatch.setattr(ModelRunner, "run", run)


def held_until(event: threading.Event, monkeypatch: pytest.MonkeyPatch) -> Passes:
    """Every pass waits for an event."""

    def around(run: Run, _runner: Any, _step: Sequence[Any]) -> Any:
        assert event.wait(60)
        return run()

    return Passes(monkeypatch, around)


# -- its life ----------------------------------------------------------------------------------------------------------


def test_the_thread_ends_when_nothing_runs_and_starts_for_the_next_request(batch: Pipeline) -> None:
    seen: list[threading.Thread] = []

    def note(_ids: Any, logits: Any) -> Any:
        seen.append(threading.current_thread())
        return logits

    for _ in range(3):
        batch.generate(drawn(9, 1), max_new_tokens=3, logits_processors=(note,), **GREEDY)
        for thread in owner_threads():
            thread.join()
        assert owner_threads() == []
    assert {thread.name for thread in seen} == {"ov_phi3-engine"}
    assert len(set(seen)) == 3
    check_idle(batch)


def test_requests_of_many_threads_have_one_owner_thread(batch: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    owners: set[int] = set()

    def around(run: Run, _runner: Any, _step: Sequence[Any]) -> Any:
        owners.add(len(owner_threads()))
        return run()

    Passes(monkeypatch, around)
    streams = [batch.stream(drawn(9, seed), max_new_tokens=9, **GREEDY) for seed in range(20)]
    assert all(len(stream.result.token_ids) == 9 for stream in streams)
    assert owners == {1}
    check_idle(batch)


def test_a_request_that_arrives_as_the_thread_ends_is_not_lost(batch: Pipeline) -> None:
    """Each request comes right after the end of another one, when the owner thread may be about to end."""
    expected = batch.generate(drawn(5, 3), max_new_tokens=1, **GREEDY).token_ids
    for _ in range(300):
        assert batch.generate(drawn(5, 3), max_new_tokens=1, **GREEDY).token_ids == expected
    check_idle(batch)


def test_without_a_thread_a_request_fails_and_the_next_one_runs(
    batch: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_idle(batch)
    start = threading.Thread.start

    def fail(thread: threading.Thread) -> None:
        if thread.name == "ov_phi3-engine":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(GenerationError, match="thread"):
            batch.generate(drawn(5, 3), max_new_tokens=1, **GREEDY)
    assert len(batch.generate(drawn(5, 3), max_new_tokens=4, **GREEDY).token_ids) == 4
    check_idle(batch)


@pytest.mark.skipif(sys.platform == "win32", reason="a waiting thread does not see Ctrl-C there")
def test_ctrl_c_in_prefill_ends_its_work(tiny_fp32: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    may_continue = threading.Event()
    main = threading.main_thread().ident
    assert main == threading.get_ident()

    def around(run: Run, _runner: Any, _step: Sequence[Any]) -> Any:
        if not may_continue.is_set():
            signal.pthread_kill(main, signal.SIGINT)
            assert may_continue.wait(60)
        return run()

    passes = Passes(monkeypatch, around)
    with ov_phi3.load(tiny_fp32, device, backend="infer_request", prefill_chunk=16) as pipe:
        with pytest.raises(KeyboardInterrupt):
            pipe.prefill(drawn(160, 4))
        may_continue.set()
        check_idle(pipe)
        assert len(passes.steps) == 1  # of ten
        assert len(pipe.generate(drawn(160, 4), max_new_tokens=3, **GREEDY).token_ids) == 3
        check_idle(pipe)


# -- callbacks that fail -----------------------------------------------------------------------------------------------


class Failure(Exception):  # noqa: N818 - short
    """Raised on purpose."""


def failing_processor(at: int) -> Callable[[Any, Any], Any]:
    """A logits processor that raises at its call number `at`."""
    calls: list[int] = []

    def process(_ids: Any, logits: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise Failure
        return logits

    return process


def failing_progress(_done: int, total: int) -> None:
    if total > 0:
        raise Failure


@pytest.mark.parametrize(
    "options",
    [
        {"logits_processors": (failing_processor(1),)},
        {"logits_processors": (failing_processor(6),)},
        {"on_prefill": failing_progress},
    ],
    ids=["processor at the first token", "processor at the sixth token", "on_prefill"],
)
def test_a_callback_that_raises_ends_its_own_request_only(
    batch: Pipeline, tiny_pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    everything_arrived = threading.Event()
    held_until(everything_arrived, monkeypatch)
    prompts = [drawn(10 + 20 * seed, seed) for seed in range(10, 13)]
    streams = [batch.stream(prompt, max_new_tokens=25, **GREEDY) for prompt in prompts]
    failing = batch.stream(drawn(33, 20), max_new_tokens=25, **options, **GREEDY)
    everything_arrived.set()
    with pytest.raises(Failure):
        _ = failing.result
    for stream, prompt in zip(streams, prompts, strict=True):
        assert stream.result.token_ids == tiny_pipe.generate(prompt, max_new_tokens=25, **GREEDY).token_ids
    check_idle(batch)


@pytest.mark.parametrize("use", ["generate", "prefill", "score", "close"])
def test_a_callback_that_would_wait_for_itself_is_refused(batch: Pipeline, use: str) -> None:
    """Not a deadlock: the owner thread cannot wait for a request that it would have to run."""
    calls: dict[str, Callable[[], object]] = {
        "generate": lambda: batch.generate([5, 6], max_new_tokens=1),
        "prefill": lambda: batch.prefill([5, 6]),
        "score": lambda: batch.score([5, 6], [7]),
        "close": batch.close,
    }

    def process(_ids: Any, logits: Any) -> Any:
        calls[use]()
        return logits

    with pytest.raises(StreamError, match="callback"):
        batch.generate(drawn(5, 1), max_new_tokens=3, logits_processors=(process,), **GREEDY)
    check_idle(batch)


# -- passes that fail --------------------------------------------------------------------------------------------------


def spoiled(runner: Any, step: Sequence[Any]) -> None:
    """Overwrite the blocks that a pass would write to: their contents are unknown after a failure."""
    for part in step:
        blocks = part.sequence.blocks[part.sequence.num_cached // runner.block_size :]
        if blocks:
            runner.pool.write(blocks, [np.full_like(array, 0x7F) for array in runner.pool.read(blocks)])


def outcome_of(stream: Any) -> Any:
    """The ids of a reply, or what ended it."""
    try:
        return stream.result.token_ids
    except GenerationError as error:
        return error


@pytest.mark.parametrize("at", [0, 1, 9], ids=["prefill", "second pass", "decode"])
@pytest.mark.parametrize("error", [RuntimeError("the device is gone"), Cancelled()], ids=["fails", "is cancelled"])
def test_a_pass_that_does_not_end(
    batch: Pipeline, tiny_pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, error: BaseException, at: int
) -> None:
    """It fails the requests of its step, or none if nobody wanted the cancel; what it wrote is never matched."""
    everything_arrived = threading.Event()
    in_step: list[Any] = []

    def around(run: Run, runner: Any, step: Sequence[Any]) -> Any:
        assert everything_arrived.wait(60)
        if len(passes.steps) == at + 1:
            in_step.extend(part.sequence.ids[: part.sequence.num_prompt].tolist() for part in step)
            spoiled(runner, step)
            raise error
        return run()

    passes = Passes(monkeypatch, around)
    common = drawn(40, 100 + at)
    prompts = [[*common, *drawn(3 + 20 * seed, seed)] for seed in range(4)]
    streams = [batch.stream(prompt, max_new_tokens=25, **GREEDY) for prompt in prompts]
    everything_arrived.set()
    outcomes = [outcome_of(stream) for stream in streams]
    assert in_step
    for outcome, prompt in zip(outcomes, prompts, strict=True):
        if isinstance(error, RuntimeError) and prompt in in_step:
            assert isinstance(outcome, GenerationError)
            assert "the device is gone" in str(outcome)
        else:
            assert outcome == tiny_pipe.generate(prompt, max_new_tokens=25, **GREEDY).token_ids
    check_idle(batch)
    for prompt in [*prompts, common]:
        expected = tiny_pipe.generate(prompt, max_new_tokens=25, **GREEDY).token_ids
        assert batch.generate(prompt, max_new_tokens=25, **GREEDY).token_ids == expected
    check_idle(batch)


# -- the end, and what runs beside a pass ------------------------------------------------------------------------------


def test_close_ends_the_running_requests(tiny_fp32: Path, device: str) -> None:
    pipe = ov_phi3.load(tiny_fp32, device, backend="infer_request", concurrency=4)
    started = threading.Barrier(5)
    streams = [pipe.stream(drawn(20, seed), max_new_tokens=3000, **GREEDY) for seed in range(4)]
    outcomes: list[Any] = []

    def read(stream: Any) -> None:
        iterator = iter(stream)
        next(iterator)
        started.wait(60)
        try:
            for _ in iterator:
                pass
            outcomes.append(stream.result.finish_reason)
        except BaseException as error:
            outcomes.append(error)

    threads = [threading.Thread(target=read, args=(stream,)) for stream in streams]
    for thread in threads:
        thread.start()
    started.wait(60)
    pipe.close()
    assert owner_threads() == []
    for thread in threads:
        thread.join()
    assert outcomes == ["cancelled"] * 4
    pipe.close()
    with pytest.raises(ClosedError):
        pipe.generate([5], max_new_tokens=1)


async def test_the_event_loop_runs_during_a_pass(batch: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's lock is free while the model computes.

    Python would take it away from a thread that runs Python code for long: not in this test, so that the loop advances
    within a pass only if the pass itself gives the lock away.
    """
    beats = 0
    during: list[int] = []
    ended = asyncio.Event()

    async def heartbeat() -> None:
        nonlocal beats
        while not ended.is_set():
            beats += 1
            await asyncio.sleep(0)

    def around(run: Run, _runner: Any, _step: Sequence[Any]) -> Any:
        before = beats
        result = run()
        during.append(beats - before)
        return result

    Passes(monkeypatch, around)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    try:
        heart = asyncio.create_task(heartbeat())
        streams = [batch.stream(drawn(300, 60 + seed), max_new_tokens=10, **GREEDY) for seed in range(4)]
        results = await asyncio.gather(*(stream.aresult() for stream in streams))
        ended.set()
        await heart
    finally:
        sys.setswitchinterval(interval)
    assert all(len(result.token_ids) == 10 for result in results)
    assert len(during) >= 10
    assert any(during), during
    check_idle(batch)
