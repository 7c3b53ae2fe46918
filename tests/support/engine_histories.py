"""Random requests of all kinds in threads on one engine, with a stand-in for the model and failures in between."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from fake_runner import VOCABULARY, FakeRunner, greedy, logits_after

from ov_phi3 import GenerationConfig
from ov_phi3.backends.paged.beam import BeamGroup
from ov_phi3.backends.paged.engine import PagedEngine
from ov_phi3.backends.paged.group import Group, PrefillGroup, ReplyGroup, SampleGroup, ScoreGroup
from ov_phi3.backends.paged.scheduler import OutOfBlocks
from ov_phi3.backends.protocol import Cancelled, Request
from ov_phi3.backends.sampling import log_softmax

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


class HalfRightDrafter:
    """Drafts that are right up to a random place, and wrong from there on."""

    def __init__(self, ids: Sequence[int], seed: int, boundary: int | None = None) -> None:
        self.ids = list(ids)
        self.draw = random.Random(seed)
        self.boundary = boundary

    def add(self, ids: Sequence[int]) -> None:
        self.ids += ids

    def draft(self, most: int) -> Ids:
        count = min(most, self.draw.choice([0, 1, 2, 5, 9]))
        drafts = greedy(self.ids, count, self.boundary)
        wrong = self.draw.randrange(count + 1)
        return [*drafts[:wrong], *((token + 1) % VOCABULARY for token in drafts[wrong:])]

    def close(self) -> None:
        pass


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

    def drafter(self, ids: Ids) -> HalfRightDrafter | None:
        seed = self.draw.randrange(1000)
        return HalfRightDrafter(ids, seed, self.boundary) if self.draw.random() < 0.6 else None

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
            group: Group = ReplyGroup(request(ids, max_new_tokens=count), reply, boundary, None, self.drafter(ids))
            return kind, group, lambda: reply.ids == greedy(ids, count, boundary)
        if kind == "stop":
            reply = Reply(self.draw.randrange(1, 6) if self.draw.random() < 0.5 else 1000)
            left = [self.draw.randrange(12)]

            def should_continue() -> bool:
                left[0] -= 1
                return left[0] > 0

            stopping = request(ids, max_new_tokens=30, should_continue=should_continue)
            group = ReplyGroup(stopping, reply, boundary, None, self.drafter(ids))
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
        group: Group = BeamGroup(request(ids, **options), self.boundary)
        if kind == "sample":
            drafters = [self.drafter(ids) for _ in range(3)]
            group = SampleGroup(request(ids, **options), self.boundary, None, iter(drafters).__next__)

        def check() -> bool:
            alone = make(request(ids, **options), self.boundary)
            engine_of(FakeRunner(200), boundary=self.boundary).run(alone)
            assert isinstance(group, (BeamGroup, SampleGroup))
            return [reply.ids for reply in alone.hypotheses()] == [reply.ids for reply in group.hypotheses()]

        return group, check


def scored(ids: Ids, start: int, boundary: int | None = None) -> Ids:
    """Log-probabilities of the ids from `start` on; the whole sequence is on one side of the boundary."""
    assert boundary is None or len(ids) - 1 <= boundary
    return [log_softmax(logits_after(ids[:at])[None])[0][ids[at]] for at in range(start, len(ids))]
