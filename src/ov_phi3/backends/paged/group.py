"""What the engine computes for one request: one sequence, or several that start from the same prompt.

A group decides which logits it needs, turns them into tokens and delivers these. It knows nothing of blocks, of other
groups or of the order in which they run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Sequence_
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ov_phi3.backends.paged.sequence import Sequence
from ov_phi3.backends.paged.token_chooser import TokenChooser
from ov_phi3.backends.protocol import BackendReport, Cancelled, Hypothesis
from ov_phi3.backends.sampling import log_softmax

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ov_phi3.backends.paged.constraint import Constraint
    from ov_phi3.backends.paged.drafter import Drafter
    from ov_phi3.backends.protocol import Request, TokenSink
    from ov_phi3.kv.entry import KVEntry

__all__ = ["Fork", "Group", "PrefillGroup", "ReplyGroup", "SampleGroup", "ScoreGroup"]

Fork = Callable[[Sequence], Sequence]
"""Makes a copy of a sequence that shares its blocks."""

_SEEDS_APART = 0x9E3779B97F4A7C15  # 2**64 / golden ratio
_SCORED_PER_PASS = 256  # rows of logits per step: 50 MB with a vocabulary of 49,152
_SCORED_AT_ONCE = 64  # rows converted to float64 together, which doubles their size


class Group:
    """A request in the engine.

    Args:
        request: the request.
        rope_boundary: see `Sequence`.

    Attributes:
        request: see above.
        prompt: the sequence that starts with the prompt.
        sequences: the sequences that still need tokens computed.
        all_sequences: these, and those that have ended but still hold blocks.
        reused_tokens: prompt tokens that were found in the cache; None before the request was first scheduled.
        recomputed_tokens: tokens computed a second time, after a LongRoPE crossing.
        max_chunk: most tokens of one sequence in a step; 0 for any number.
        error: what ended it, when it failed.
        can_prepare: whether `prepare` has something to do.
    """

    max_chunk = 0
    can_prepare = False

    def __init__(self, request: Request, rope_boundary: int | None = None) -> None:
        self.request = request
        self.prompt = Sequence(request.ids, rope_boundary)
        self.sequences = [self.prompt]
        self.all_sequences = [self.prompt]
        self.reused_tokens: int | None = None
        self.recomputed_tokens = 0
        self.error: BaseException | None = None
        self._given_up = False
        self._finished = threading.Lock()  # closed until the group has finished; one C call, safe under Ctrl-C
        self._finished.acquire()

    # -- for the caller that waits -----------------------------------------------------------------------------------

    def wait(self) -> None:
        """Wait until the group has finished.

        Raises:
            BaseException: what ended it.
        """
        self._finished.acquire()
        self._finished.release()
        if self.error is not None:
            raise self.error

    def give_up(self) -> None:
        """Note that the caller does not wait any more."""
        self._given_up = True

    def finish(self, error: BaseException | None = None) -> None:
        """End the group: none of its sequences continues. The first error counts."""
        self.error = self.error or error
        self.sequences = []

    def notify(self) -> None:
        """Wake the caller, after the blocks of the group were released, so that its next request can match them."""
        if self._finished.locked():
            self._finished.release()

    def before_release(self, read: Callable[[Sequence], KVEntry]) -> None:
        """Called when it has finished without an error, before its blocks are released."""

    def take_ended(self) -> list[Sequence]:
        """The sequences that have ended since the last call."""
        ended = [sequence for sequence in self.all_sequences if sequence not in self.sequences]
        self.all_sequences = list(self.sequences)
        return ended

    # -- for the engine ----------------------------------------------------------------------------------------------

    def match_limit(self, sequence: Sequence) -> int:
        """Most tokens that may come from the cache: all but the last, which is computed for its logits."""
        most = self.request.most_reused
        if most is None or self.reused_tokens is not None:  # after a preemption, also what it has computed itself
            return len(sequence) - 1
        return min(most, len(sequence) - 1)

    @property
    def wanted(self) -> bool:
        """Whether somebody still waits for it."""
        should_continue = self.request.should_continue
        return not self._given_up and (should_continue is None or should_continue())

    def report_progress(self) -> bool:
        """Report how much of the prompt is prefilled; returns whether to continue."""
        on_progress = self.request.on_progress
        total = self.prompt.num_prompt
        return on_progress is None or on_progress(min(self.prompt.num_cached, total), total)

    def abandon(self) -> None:
        """End a group that is not wanted any more."""
        self.finish(Cancelled())

    def rows(self, sequence: Sequence, count: int) -> tuple[int, ...]:
        """Which of the next `count` tokens of a sequence need logits: the last one, if it is the sequence's last."""
        return (count - 1,) if count == sequence.num_uncached else ()

    def drafts(self, sequence: Sequence) -> Sequence_[int]:  # noqa: ARG002
        """Guesses of the tokens behind a sequence's last one, which the next step computes with it; () for none."""
        return ()

    def close(self) -> None:
        """Give up what it holds beside blocks; called once, in the engine's thread, before `notify`."""

    def prepare(self) -> None:
        """Do, while a pass with its sequences runs, what does not depend on the logits; only if `can_prepare`."""

    def advance(self, rows: list[tuple[Sequence, NDArray[np.float32]]], fork: Fork) -> None:
        """Use the logits of a step: [rows, vocabulary] for each sequence that wanted some."""
        raise NotImplementedError


class ReplyGroup(Group):
    """One reply, streamed token by token.

    Args:
        request: the request.
        sink: receives the tokens.
        rope_boundary: see `Sequence`.
        constraint: the structure of the reply; None for none.
        drafter: guesses tokens; None for none.
    """

    def __init__(
        self,
        request: Request,
        sink: TokenSink,
        rope_boundary: int | None = None,
        constraint: Constraint | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        super().__init__(request, rope_boundary)
        self._sink = sink
        self._chooser = TokenChooser(request, request.config, constraint, drafter)
        self.can_prepare = self._chooser.can_prepare
        self._began = time.perf_counter()
        self._first: float | None = None
        self._last = self._began

    def drafts(self, sequence: Sequence) -> Sequence_[int]:
        """Guesses of the next tokens."""
        return self._chooser.drafts(sequence)

    def close(self) -> None:
        """End the drafts."""
        self._chooser.close()

    def prepare(self) -> None:
        """Compute ahead which tokens the structure allows."""
        self._chooser.prepare()

    def advance(self, rows: list[tuple[Sequence, NDArray[np.float32]]], fork: Fork) -> None:  # noqa: ARG002
        """Choose the next tokens and deliver them."""
        for sequence, logits in rows:
            for token, logprob in self._chooser.choose(sequence, logits):
                self._last = time.perf_counter()
                if self._first is None:
                    self._first = self._last
                proceed = self._sink([token]) if logprob is None else self._sink([token], (logprob,))
                if self._chooser.ended or not proceed:
                    self.finish()
                    break

    def abandon(self) -> None:
        """End the reply with what has come; before its first token it is cancelled."""
        self.finish(None if self._first is not None else Cancelled())

    def report(self) -> BackendReport:
        """What it took."""
        made = len(self.prompt) - self.prompt.num_prompt
        first = self._first
        return BackendReport(
            hit_limit=self._chooser.hit_limit,
            ttft_ms=None if first is None else (first - self._began) * 1000.0,
            tpot_ms=(self._last - first) * 1000.0 / (made - 1) if first is not None and made > 1 else None,
            reused_tokens=self.reused_tokens,
            recomputed_tokens=self.recomputed_tokens,
            generated=self.prompt.generated,
            in_loop=self._chooser.in_loop,
            steps=self._chooser.steps,
            drafted_tokens=self._chooser.drafted,
            accepted_tokens=self._chooser.accepted,
            forced_tokens=self._chooser.forced,
        )


class PrefillGroup(Group):
    """The keys and values of a prompt, and no reply.

    Attributes:
        entry: a copy of them, once it has finished.
    """

    entry: KVEntry | None = None

    def match_limit(self, sequence: Sequence) -> int:
        """All tokens; after a preemption all but the last."""
        return len(sequence) if self.reused_tokens is None else len(sequence) - 1

    def advance(self, rows: list[tuple[Sequence, NDArray[np.float32]]], fork: Fork) -> None:  # noqa: ARG002
        """End: everything is computed."""
        if rows:
            self.report_progress()
            self.finish()

    def before_release(self, read: Callable[[Sequence], KVEntry]) -> None:
        """Keep a copy."""
        self.entry = read(self.prompt)


class ScoreGroup(Group):
    """Log-probabilities of a sequence's ids from `start` on.

    Attributes:
        logprobs: one for each id from `start` on, once it has finished.
    """

    max_chunk = _SCORED_PER_PASS

    def __init__(self, request: Request, start: int, rope_boundary: int | None = None) -> None:
        super().__init__(replace(request, ids=request.ids[:-1]), rope_boundary)  # the last id predicts nothing
        self._ids = np.array(request.ids)
        self._start = start
        self.logprobs: list[float] = []

    def match_limit(self, sequence: Sequence) -> int:  # noqa: ARG002
        """The tokens before the one that predicts the next id to score."""
        return self._start - 1 + len(self.logprobs)

    def rows(self, sequence: Sequence, count: int) -> tuple[int, ...]:
        """The tokens that predict an id without a score; after a preemption the earlier ones have theirs."""
        return tuple(range(max(0, self._start - 1 + len(self.logprobs) - sequence.num_cached), count))

    def advance(self, rows: list[tuple[Sequence, NDArray[np.float32]]], fork: Fork) -> None:  # noqa: ARG002
        """Look up the log-probabilities of the next ids."""
        for sequence, logits in rows:
            first = self._start + len(self.logprobs)
            for at in range(0, len(logits), _SCORED_AT_ONCE):
                batch = log_softmax(logits[at : at + _SCORED_AT_ONCE])
                ids = self._ids[first + at : first + at + len(batch)]
                self.logprobs += batch[np.arange(len(batch)), ids].tolist()
            if not sequence.num_uncached:
                self.finish()


class SampleGroup(Group):
    """Several samples of one prompt, as forks of its sequence: the prompt is computed once."""

    def __init__(
        self,
        request: Request,
        rope_boundary: int | None = None,
        constraint: Constraint | None = None,
        drafter: Callable[[], Drafter | None] = lambda: None,
    ) -> None:
        super().__init__(request, rope_boundary)
        config = request.config
        count, seed = config.num_return_sequences or 1, config.seed or 0
        seeds = [(seed + index * _SEEDS_APART) % 2**64 for index in range(count)]
        self._choosers = [
            TokenChooser(
                request,
                config.replace(seed=seed, num_return_sequences=1, top_logprobs=0),
                None if constraint is None else constraint.fork(),
                drafter(),
            )
            for seed in seeds
        ]
        self.can_prepare = constraint is not None
        self._scores = [0.0] * count
        watch = request.stop_watch
        self._watches = [None if watch is None else watch.fork() for _ in range(count)]
        self._samples: list[Sequence] = []

    def drafts(self, sequence: Sequence) -> Sequence_[int]:
        """Guesses of the next tokens of a sample."""
        return self._choosers[self._samples.index(sequence)].drafts(sequence) if self._samples else ()

    def close(self) -> None:
        """End the drafts of all samples."""
        for chooser in self._choosers:
            chooser.close()

    def prepare(self) -> None:
        """Compute ahead which tokens the structure allows in each sample that has not ended."""
        for chooser in self._choosers:
            if not chooser.ended:
                chooser.prepare()

    def advance(self, rows: list[tuple[Sequence, NDArray[np.float32]]], fork: Fork) -> None:
        """Choose the next tokens of every sample; the first step makes the samples."""
        if not self._samples:
            (sequence, logits), *_ = rows
            self._samples = [fork(sequence) for _ in self._choosers[1:]]
            self._samples.insert(0, sequence)
            self.sequences = list(self._samples)
            rows = [(sample, logits) for sample in self._samples]
        for sequence, logits in rows:
            if self._advance_sample(self._samples.index(sequence), sequence, logits):
                self.sequences.remove(sequence)
        if not self.sequences:
            self.finish()

    def _advance_sample(self, index: int, sequence: Sequence, logits: NDArray[np.float32]) -> bool:
        """Choose the next tokens of a sample; returns whether it has ended, which a stop string does too."""
        chooser, watch = self._choosers[index], self._watches[index]
        for token, logprob in chooser.choose(sequence, logits):
            self._scores[index] += 0.0 if logprob is None else logprob.logprob
            if watch is not None and watch.add(token):
                return True
        return chooser.ended

    def abandon(self) -> None:
        """End the samples with what has come; before their first token they are cancelled."""
        self.finish(None if self._samples else Cancelled())

    def hypotheses(self) -> list[Hypothesis]:
        """The samples, the most likely first; the score is the sum of the log-probabilities."""
        hypotheses = []
        for sequence, chooser, score in zip(self._samples, self._choosers, self._scores, strict=True):
            hypotheses.append(Hypothesis(sequence.generated, score, chooser.hit_limit, chooser.in_loop))
        return sorted(hypotheses, key=lambda hypothesis: -hypothesis.score)
