"""The engine with a stand-in for the model: thousands of requests of all kinds at once, with failures in between.

Every reply equals one that is computed without a cache, and no block is lost.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from engine_histories import Failure, History, Reply, await_idle, engine_of, request, scored
from fake_runner import VOCABULARY, FakeRunner, greedy

from ov_phi3.backends.paged.beam import BeamGroup
from ov_phi3.backends.paged.engine import PagedEngine
from ov_phi3.backends.paged.group import Group, PrefillGroup, ReplyGroup, SampleGroup, ScoreGroup
from ov_phi3.backends.paged.scheduler import OutOfBlocks
from ov_phi3.backends.protocol import Cancelled
from ov_phi3.kv.entry import KVEntry


@pytest.mark.parametrize("part", range(4))
def test_random_histories(part: int) -> None:
    outcomes: dict[str, int] = {}
    preemptions = 0
    for seed in range(30 * part, 30 * (part + 1)):
        history = History(seed)
        history.play(12)
        preemptions += history.engine._scheduler.preemptions
        for name, count in history.outcomes.items():
            outcomes[name] = outcomes.get(name, 0) + count
    for kind in ("reply", "stop", "sample", "beam", "prefill", "score"):
        assert outcomes.get(f"{kind} right", 0) > 5, outcomes
    assert preemptions > 0


@pytest.mark.parametrize("part", range(2))
def test_random_histories_with_passes_that_fail(part: int) -> None:
    """A pass that fails ends the requests of its step; a cancelled pass ends none that is still wanted."""
    outcomes: dict[str, int] = {}
    for seed in range(1000 + 30 * part, 1000 + 30 * (part + 1)):
        history = History(seed, failures=True)
        history.play(12)
        for name, count in history.outcomes.items():
            outcomes[name] = outcomes.get(name, 0) + count
    assert sum(count for name, count in outcomes.items() if name.endswith("failed")) > 20
    assert outcomes["reply right"] > 20


# -- single rules ------------------------------------------------------------------------------------------------------


def run_all(engine: PagedEngine, groups: Sequence[Group]) -> None:
    """Run groups that arrive together, so that the first step has all of them; the first exception is raised."""
    errors: list[BaseException] = []
    engine._inbox.extend(groups[1:])
    for wait in (partial(engine.run, groups[0]), *(group.wait for group in groups[1:])):
        try:
            wait()
        except BaseException as error:
            errors.append(error)
    await_idle(engine)
    if errors:
        raise errors[0]


class Gate:
    """Holds the first pass until `open`, so that what arrives meanwhile shares the next step."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()

    def __call__(self, step: Sequence[Any]) -> None:
        self.reached.set()
        assert self._open.wait(60)

    def open(self) -> None:
        self._open.set()


def test_a_cancelled_pass_is_computed_again() -> None:
    """Nobody cancelled these requests, so that they end as if nothing had happened."""
    failing = [3, 4, 9]
    runner = FakeRunner(40, lambda _: cancel() if runner.passes in failing else None)

    def cancel() -> None:
        raise Cancelled

    engine = engine_of(runner)
    replies = [Reply() for _ in range(4)]
    prompts = [[index, *range(9 * index)] for index in range(4)]
    run_all(
        engine,
        [ReplyGroup(request(ids, max_new_tokens=12), reply) for ids, reply in zip(prompts, replies, strict=True)],
    )
    assert [reply.ids for reply in replies] == [greedy(ids, 12) for ids in prompts]


def test_the_blocks_of_a_failed_pass_match_nothing() -> None:
    """What a pass wrote before it failed is unknown; what was computed before stays."""
    runner = FakeRunner(40, lambda _: fail() if runner.passes == 6 else None)

    def fail() -> None:
        raise Failure

    engine = engine_of(runner)
    ids = list(range(10))
    reply = Reply()
    with pytest.raises(Failure):
        engine.run(ReplyGroup(request(ids, max_new_tokens=20), reply))
    await_idle(engine)
    assert reply.ids == greedy(ids, 5)  # the prefill and four decodes; the fifth one failed
    whole = [*ids, *greedy(ids, 20)]
    assert engine.match(np.array(whole)) == 12
    again = Reply()
    engine.run(ReplyGroup(request(ids, max_new_tokens=20), again))
    assert again.ids == greedy(ids, 20)


def test_a_score_that_is_preempted_has_every_logprob_once() -> None:
    gate = Gate()
    runner = FakeRunner(16, gate)
    engine = engine_of(runner, chunk=8)
    reply = Reply()
    ids, whole = [1, 2, 3], [index % VOCABULARY for index in range(40)]
    score = ScoreGroup(request(whole), 2)
    first = threading.Thread(target=engine.run, args=(ReplyGroup(request(ids, max_new_tokens=45), reply),))
    first.start()
    assert gate.reached.wait(60)
    second = threading.Thread(target=engine.run, args=(score,))
    second.start()
    gate.open()
    first.join()
    second.join()
    await_idle(engine)
    assert reply.ids == greedy(ids, 45)
    assert np.allclose(score.logprobs, scored(whole, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
def test_without_memory_to_grow_the_engine_preempts(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    runner = FakeRunner(12)
    engine = engine_of(runner, max_blocks=60)
    tried: list[int] = []

    def grow(num_blocks: int) -> None:
        tried.append(num_blocks)
        raise error

    monkeypatch.setattr(runner, "grow", grow)
    prompts = [[index] * 10 for index in range(4)]
    replies = [Reply() for _ in prompts]
    run_all(
        engine,
        [ReplyGroup(request(ids, max_new_tokens=20), reply) for ids, reply in zip(prompts, replies, strict=True)],
    )
    assert [reply.ids for reply in replies] == [greedy(ids, 20) for ids in prompts]
    assert len(tried) == 1
    with pytest.raises(OutOfBlocks):
        engine.run(ReplyGroup(request([1] * 60, max_new_tokens=5), Reply()))
    await_idle(engine)


def test_entries_may_be_added_while_requests_look_for_one() -> None:
    runner = FakeRunner(40)
    engine = engine_of(runner)
    prefill = PrefillGroup(request([1, 2, 3, 4, 5]))
    engine.run(prefill)
    assert prefill.entry is not None
    tensors = prefill.entry.tensors
    entries: deque[KVEntry] = deque(maxlen=200)
    ended = threading.Event()

    def add() -> None:
        while not ended.is_set():
            entries.append(KVEntry(np.array([60, 60]), tensors))
            engine.add_entry(entries[-1])

    thread = threading.Thread(target=add)
    replies = [Reply() for _ in range(40)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns as often as they can
    thread.start()
    try:
        for reply in replies:
            engine.run(ReplyGroup(request([7, 7, 7], max_new_tokens=2), reply))
    finally:
        sys.setswitchinterval(interval)
        ended.set()
        thread.join()
    assert all(reply.ids == greedy([7, 7, 7], 2) for reply in replies)


def test_an_entry_is_used_as_long_as_it_is_held() -> None:
    engine = engine_of(FakeRunner(40))
    prefill = PrefillGroup(request([5] * 11))
    engine.run(prefill)
    entry = prefill.entry
    assert entry is not None
    assert entry.ids.tolist() == [5] * 11
    other = engine_of(FakeRunner(40))
    other.add_entry(entry)
    assert other.match(np.array([5] * 20)) == 11
    reply = Reply()
    group = ReplyGroup(request([*[5] * 11, 6], max_new_tokens=6), reply)
    other.run(group)
    assert (group.reused_tokens, reply.ids) == (11, greedy([*[5] * 11, 6], 6))
    del entry, prefill
    gc.collect()
    assert other.match(np.array([5] * 9 + [1])) == 9  # now from the blocks of the reply
    assert engine_of(FakeRunner(40)).match(np.array([5] * 20)) == 0


def test_isolated_requests_share_nothing() -> None:
    """A seeded reply is the same whatever ran before, so that it computes its whole prompt."""
    engine = engine_of(FakeRunner(40))
    engine.run(ReplyGroup(request([5] * 11, max_new_tokens=3), Reply()))
    group = ReplyGroup(request([5] * 11, max_new_tokens=3, isolated=True), Reply())
    engine.run(group)
    assert group.reused_tokens == 0
    again = ReplyGroup(request([5] * 11, max_new_tokens=3), Reply())
    engine.run(again)
    assert again.reused_tokens == 10


def test_the_long_factors_are_not_mixed_with_the_short_ones() -> None:
    """A reply that crosses the boundary is computed again once; both sides stay cached."""
    engine = engine_of(FakeRunner(60), boundary=16)
    ids = list(range(12))
    group = ReplyGroup(request(ids, max_new_tokens=10), reply := Reply(), 16)
    engine.run(group)
    assert reply.ids == greedy(ids, 10, 16)
    assert group.recomputed_tokens == 17
    assert engine.match(np.array([*ids, *reply.ids])) == 21
    assert engine.match(np.array(ids)) == 11


@pytest.mark.parametrize("make", [SampleGroup, BeamGroup])
def test_every_reply_of_several_stays_cached(make: Any) -> None:
    """Forks register their own blocks, behind their own tokens."""
    engine = engine_of(FakeRunner(80))
    ids = [9] * 6
    options = {"num_return_sequences": 3, "seed": 3} if make is SampleGroup else {"num_beams": 3}
    group = make(request(ids, max_new_tokens=15, **options))
    engine.run(group)
    await_idle(engine)
    replies = [reply.ids for reply in group.hypotheses()]
    assert len({tuple(reply) for reply in replies}) == len(replies) > 0
    cached = [engine.match(np.array([*ids, *reply])) for reply in replies]
    assert cached == [20] * 3 if make is SampleGroup else max(cached) == 20
    for reply in replies:
        again = Reply()
        engine.run(ReplyGroup(request([*ids, *reply], max_new_tokens=5), again))
        assert again.ids == greedy([*ids, *reply], 5)


def test_a_preempted_prefill_leaves_a_token_to_compute() -> None:
    """Others may have computed all its tokens meanwhile; the group ends with the pass that computes the last one."""
    group = PrefillGroup(request([1, 2, 3]))
    assert group.match_limit(group.prompt) == 3
    group.reused_tokens = 0  # it was admitted before
    assert group.match_limit(group.prompt) == 2


def test_a_lost_block_is_reported_when_the_engine_idles(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the owner thread as it ends, so that no request fails for it."""
    reported: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: reported.append(arguments.exc_value))
    engine = engine_of(FakeRunner(40))
    lost = engine.blocks.allocate()
    assert lost is not None
    reply = Reply()
    engine.run(ReplyGroup(request([5, 6], max_new_tokens=4), reply))
    for thread in threading.enumerate():
        if thread.name == "ov_phi3-engine":
            thread.join()
    assert reply.ids == greedy([5, 6], 4)
    (error,) = reported
    assert isinstance(error, AssertionError)
    assert "1 blocks are held by no sequence" in str(error)
    engine.blocks.release([lost])
    engine.run(ReplyGroup(request([5, 6], max_new_tokens=4), Reply()))
    await_idle(engine)
    assert len(reported) == 1
