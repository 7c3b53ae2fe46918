"""The engine with a stand-in for the model: thousands of requests of all kinds at once, with failures in between.

Every reply equals one that is computed without a cache, and no block is lost. Longer than 400 lines because the random
histories and the tests of single rules use the same engine.
"""

from __future__ import annotations

import gc
import random
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from fake_runner import VOCABULARY, FakeRunner, greedy, logits_after

from ov_phi3 import GenerationConfig
from ov_phi3.backends.paged.beam import BeamGroup
from ov_phi3.backends.paged.engine import PagedEngine
from ov_phi3.backends.paged.group import Group, PrefillGroup, ReplyGroup, SampleGroup, ScoreGroup
from ov_phi3.backends.paged.scheduler import OutOfBlocks
from ov_phi3.backends.protocol import Cancelled, Request
from ov_phi3.backends.sampling import log_softmax
from ov_phi3.kv.entry import KVEntry

Ids = list[int]


class Failure(Exception):  # noqa: N818 - short
    """A pass or a callback that fails on purpose."""


def request(ids: Ids, **options: Any) -> Request:
    """A request without end tokens."""
    fields = {name: options.pop(name) for name in ("isolated", "should_continue", "on_progress") if name in options}
    options.setdefault("do_sample", options.get("seed") is not None)
    config = GenerationConfig(ignore_eos=True, **options).resolve(room=1000)
    return Request(np.array(ids, dtype=np.int64), config, (), **fields)


def engine_of(runner: Any, *, boundary: int | None = None, chunk: int = 0, max_blocks: int = 0) -> PagedEngine:
    return PagedEngine(runner, rope_boundary=boundary, chunk=chunk, max_blocks=max_blocks)


def await_idle(engine: PagedEngine) -> None:
    """Join the owner thread, which ends when nothing is left to do, and check that no block is lost."""
    for thread in threading.enumerate():
        if thread.name == "ov_phi3-engine":
            thread.join()
    engine.blocks.check([])
    assert engine.blocks.num_available == engine.blocks.num_blocks


class Reply:
    """Collects the ids of one reply, and stops it after `stop_after`."""

    def __init__(self, stop_after: int = 1000) -> None:
        self.ids: Ids = []
        self.stop_after = stop_after

    def __call__(self, ids: Sequence[int], logprobs: Sequence[Any] = ()) -> bool:
        self.ids += ids
        return len(self.ids) < self.stop_after


class History:
    """Requests in threads on one engine.

    Args:
        seed: determines what is requested; the order of arrival is that of the threads.
    """

    def __init__(self, seed: int, *, failures: bool = False) -> None:
        self.draw = random.Random(seed)
        self.seed = seed
        self.boundary = self.draw.choice([None, None, 17, 30])
        self.failures = failures
        self.broken: set[Any] = set()
        self.runner = FakeRunner(self.draw.choice([14, 20, 40]), self._before_pass)
        self.engine = engine_of(
            self.runner,
            boundary=self.boundary,
            chunk=self.draw.choice([0, 0, 5]),
            max_blocks=self.draw.choice([0, 0, 60]),
        )
        self.texts = [self.drawn(self.draw.randrange(1, 40)) for _ in range(3)]
        self.problems: list[str] = []
        self.outcomes: dict[str, int] = {}

    def drawn(self, count: int) -> Ids:
        return [self.draw.randrange(VOCABULARY) for _ in range(count)]

    def prompt(self) -> Ids:
        text = self.draw.choice(self.texts)
        return text[: self.draw.randrange(len(text) + 1)] + self.drawn(self.draw.randrange(1, 6))

    def _before_pass(self, step: Sequence[Any]) -> None:
        if self.failures and self.runner.passes % 7 == 3:
            raise Cancelled
        if self.failures and self.runner.passes % 11 == 5:
            self.broken |= {part.sequence for part in step}
            raise Failure

    def play(self, requests: int) -> None:
        works = [self.work() for _ in range(requests)]
        threads = [threading.Thread(target=self._guarded, args=work) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        await_idle(self.engine)
        assert self.problems == [], f"history {self.seed}: {self.problems}"

    def _guarded(self, kind: str, group: Group, check: Callable[[], bool]) -> None:
        """Run a group and compare its result; it may fail only with a pass, or when it is too large."""
        outcome = "right"
        try:
            self.engine.run(group)
            if not check():
                outcome = "wrong"
        except Cancelled:
            outcome = "cancelled"
        except OutOfBlocks:
            outcome = "too large"
        except Failure:
            outcome = "failed" if self.broken & {group.prompt, *group.all_sequences} or self.broken else "unrelated"
        except BaseException as error:
            outcome = repr(error)
        self.outcomes[f"{kind} {outcome}"] = self.outcomes.get(f"{kind} {outcome}", 0) + 1
        if outcome not in ("right", "cancelled", "too large", "failed") or (outcome == "cancelled" and kind != "stop"):
            self.problems.append(f"{kind} of {len(group.prompt)} tokens: {outcome}")

    def work(self) -> tuple[str, Group, Callable[[], bool]]:
        """A random request: its kind, its group, and whether its result is right."""
        ids, count, boundary = self.prompt(), self.draw.randrange(1, 25), self.boundary
        kind = self.draw.choice(["reply", "reply", "reply", "stop", "sample", "beam", "prefill", "score"])
        if kind == "reply":
            reply = Reply()
            group: Group = ReplyGroup(request(ids, max_new_tokens=count), reply, boundary)
            return kind, group, lambda: reply.ids == greedy(ids, count, boundary)
        if kind == "stop":
            reply = Reply(self.draw.randrange(1, 6) if self.draw.random() < 0.5 else 1000)
            left = [self.draw.randrange(12)]

            def should_continue() -> bool:
                left[0] -= 1
                return left[0] > 0

            group = ReplyGroup(request(ids, max_new_tokens=30, should_continue=should_continue), reply, boundary)
            return kind, group, lambda: 0 < len(reply.ids) <= 30 and reply.ids == greedy(ids, len(reply.ids), boundary)
        if kind in ("sample", "beam"):
            return kind, *self.several(kind, ids, min(count, 9))
        if kind == "prefill":
            prefill = PrefillGroup(request(ids), boundary)

            def check_entry() -> bool:
                assert prefill.entry is not None
                self.engine.add_entry(prefill.entry)
                reply = Reply()
                self.engine.run(ReplyGroup(request([*ids, 7], max_new_tokens=5), reply, boundary))
                return prefill.entry.ids.tolist() == ids and reply.ids == greedy([*ids, 7], 5, boundary)

            return kind, prefill, check_entry
        whole = [*ids, *self.drawn(count)]
        if boundary is not None and len(whole) - 1 > boundary:  # the runner scores each side by itself
            whole = whole[: boundary + 1]
        start = self.draw.randrange(1, len(whole)) if len(whole) > 1 else 1
        whole = whole if len(whole) > 1 else [*whole, 5]
        score = ScoreGroup(request(whole), start, boundary)
        return kind, score, lambda: np.allclose(score.logprobs, scored(whole, start, boundary), rtol=0, atol=1e-5)

    def several(self, kind: str, ids: Ids, count: int) -> tuple[Group, Callable[[], bool]]:
        """Samples or beams; they equal those of an engine of their own."""
        options: dict[str, Any] = {"max_new_tokens": count}
        if kind == "sample":
            options |= {"num_return_sequences": self.draw.randrange(2, 4), "seed": self.draw.randrange(100)}
        else:
            options |= {"num_beams": self.draw.randrange(2, 4)}
        make = SampleGroup if kind == "sample" else BeamGroup
        group = make(request(ids, **options), self.boundary)

        def check() -> bool:
            alone = make(request(ids, **options), self.boundary)
            engine_of(FakeRunner(200), boundary=self.boundary).run(alone)
            return [reply.ids for reply in alone.hypotheses()] == [reply.ids for reply in group.hypotheses()]

        return group, check


def scored(ids: Ids, start: int, boundary: int | None = None) -> Ids:
    """Log-probabilities of the ids from `start` on; the whole sequence is on one side of the boundary."""
    assert boundary is None or len(ids) - 1 <= boundary
    return [log_softmax(logits_after(ids[:at])[None])[0][ids[at]] for at in range(start, len(ids))]


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
    assert preemptions > 10


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
    """Run groups at once, each in a thread of its own; the first exception is raised."""
    errors: list[BaseException] = []

    def run(group: Group) -> None:
        try:
            engine.run(group)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(group,)) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
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
