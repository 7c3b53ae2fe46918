"""The engine: one thread that steps while there is work.

A step reads as a sentence: schedule, run, deliver. Callers add groups from any thread and wait for them; only the owner
thread touches sequences, the scheduler and the compiled model. The interpreter's lock is free during a pass. The thread
ends when nothing is left to do.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from ov_phi3.backends.paged.cache import PagedCache
from ov_phi3.backends.paged.model_runner import ModelRunner, ScheduledTokens
from ov_phi3.backends.paged.pace import Pace
from ov_phi3.backends.paged.scheduler import OutOfBlocks, Scheduler
from ov_phi3.backends.paged.sequence import Sequence
from ov_phi3.backends.protocol import Cancelled
from ov_phi3.backends.request_queue import mark_engine_thread

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ov_phi3.backends.paged.group import Group
    from ov_phi3.kv.entry import KVEntry

__all__ = ["PagedEngine"]


class PagedEngine:
    """Runs groups on one compiled model.

    Args:
        runner: the compiled model and its cache.
        rope_boundary: see `ModelInfo.rope_boundary`; None if the boundary cannot be reached.
        chunk: most prefill tokens in a step; 0 for whole prompts.
        max_blocks: blocks that the cache may grow to, the scratch block included; 0 for a cache of fixed size.

    Attributes:
        blocks: the block manager.
    """

    def __init__(
        self, runner: ModelRunner, *, rope_boundary: int | None = None, chunk: int = 0, max_blocks: int = 0
    ) -> None:
        self._runner = runner
        self._boundary = rope_boundary
        self._cache = cache = PagedCache(runner, max_blocks)
        self.blocks, self._prefixes = cache.blocks, cache.prefixes
        self._scheduler = Scheduler(self.blocks, admit=self._admit, copy=cache.copy, grow=cache.grow, chunk=chunk)
        self._pace = Pace()
        self._inbox: deque[Group] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    # -- for callers in any thread -----------------------------------------------------------------------------------

    def run(self, group: Group) -> None:
        """Add a group and wait until it has finished.

        Raises:
            BaseException: what ended it.
        """
        with self._lock:
            self._inbox.append(group)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="ov_phi3-engine", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError:  # the system has no more threads
                    self._thread = None
                    self._inbox.remove(group)
                    raise
        try:
            group.wait()
        except BaseException:
            group.give_up()  # Ctrl-C in the caller's thread
            raise

    def match(self, ids: NDArray[np.int64], *, isolated: bool = False) -> int:
        """Tokens of a prompt that are cached, its last one left out."""
        return self._prefixes.match(Sequence(ids, self._boundary), isolated=isolated)

    def add_entry(self, entry: KVEntry) -> None:
        """Let groups start from an entry for as long as it is referenced elsewhere."""
        self._prefixes.add_entry(entry)

    @property
    def num_sequences(self) -> int:
        """Sequences that run, or whose group waits."""
        return sum(len(group.sequences) for group in self._scheduler.groups)

    def close(self) -> None:
        """Wait for the thread to end, and free the model. No group may be running."""
        with self._lock:
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._runner.close()

    # -- the owner thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        mark_engine_thread()
        while self._take_in():
            self._step()

    def _take_in(self) -> bool:
        """Take in new groups; False if nothing is left to do, so that the thread ends."""
        with self._lock:
            while self._inbox:
                self._scheduler.add(self._inbox.popleft())
            if self._scheduler.groups:
                return True
            self._thread = None
            self.blocks.check_idle()
            return False

    def _step(self) -> None:
        """Schedule, run, deliver."""
        self._drop_unwanted()
        try:
            step = self._scheduler.schedule(self._pace.prefill_budget(*self._scheduler.load()))
        except OutOfBlocks as exc:
            self._end(self._scheduler.running[-1], exc)
            return
        except Exception as exc:  # noqa: BLE001 - whatever fails here must not leave callers waiting
            self._end_all(exc)
            return
        self._end_finished()  # a prefill that was cached as a whole
        step = [part for part in step if part[0] in self._scheduler.running]
        if not step:
            return
        parts = [part for _, part in step]
        groups = list(dict.fromkeys(group for group, _ in step))
        preparing = [group for group in groups if group.can_prepare]
        began = time.perf_counter()
        try:
            logits = self._runner.run(
                parts,
                lambda: any(_is_wanted(group) for group in groups),
                partial(_prepare, preparing) if preparing else None,
            )
        except Cancelled:
            self._cache.undo(part.sequence for part in parts)
            return
        except BaseException as exc:  # noqa: BLE001 - reported to the callers
            self._cache.undo(part.sequence for part in parts)
            for group in groups:
                group.finish(exc)
            self._end_finished()
            return
        self._pace.note(parts, time.perf_counter() - began)
        self._deliver(step, logits)

    def _drop_unwanted(self) -> None:
        """End the groups whose callers do not wait any more."""
        for group in self._scheduler.groups:
            try:
                if not group.wanted:
                    group.abandon()
            except BaseException as exc:  # noqa: BLE001 - raised by a callback, reported to its caller
                group.finish(exc)
        self._end_finished()

    def _deliver(self, step: list[tuple[Group, ScheduledTokens]], logits: NDArray[np.float32]) -> None:
        """Note what is cached now, and give every group the logits that it wanted."""
        rows: dict[Group, list[tuple[Sequence, NDArray[np.float32]]]] = {}
        prefilled: list[Group] = []
        at = 0
        for group, part in step:
            wanted = len(part.rows)
            if wanted:
                rows.setdefault(group, []).append((part.sequence, logits[at : at + wanted]))
            elif group not in prefilled:
                prefilled.append(group)
            at += wanted
            part.sequence.cached_long = part.sequence.is_long
            part.sequence.num_cached += part.known
            self._prefixes.register_full_blocks(part.sequence)
        for group in prefilled:
            self._guard(group, group.report_progress)
        lengths = [len(part.sequence) for _, part in step]
        for group, logits_of in rows.items():
            self._guard(group, partial(group.advance, logits_of, partial(self._fork, group)))
        for (_, part), length in zip(step, lengths, strict=True):
            if part.drafts:
                self._keep_accepted(part, length)
        self._end_finished()
        for group in rows:
            if group in self._scheduler.running:
                self._recompute_crossed(group)

    def _keep_accepted(self, part: ScheduledTokens, length: int) -> None:
        """Count the drafts that the reply has taken as cached. The others are in no table and are overwritten.

        Args:
            part: what was computed.
            length: of the sequence before the step.
        """
        sequence = part.sequence
        taken = sequence.ids[length : length + len(part.drafts)].tolist()
        pairs = enumerate(zip(taken, part.drafts, strict=False))
        # The last token was chosen, not computed.
        right = next((index for index, (token, draft) in pairs if token != draft), len(sequence) - length - 1)
        sequence.num_cached += max(0, min(right, len(part.drafts)))
        if not sequence.has_crossed:
            self._prefixes.register_full_blocks(sequence)
        self._scheduler.tables.release_unused(sequence)

    @staticmethod
    def _guard(group: Group, action: Callable[[], object]) -> None:
        """Run something that calls the caller's code; what it raises ends that group only."""
        try:
            action()
        except BaseException as exc:  # noqa: BLE001 - reported to the caller
            group.finish(exc)

    def _recompute_crossed(self, group: Group) -> None:
        """Compute the sequences again that have crossed the LongRoPE boundary."""
        for sequence in group.sequences:
            if self._cache.recompute_crossed(sequence):
                group.recomputed_tokens += len(sequence) - sequence.num_cached

    def _fork(self, group: Group, sequence: Sequence) -> Sequence:
        """A copy of a group's sequence that shares its blocks."""
        copy = sequence.fork()
        self.blocks.acquire(copy.blocks)
        group.all_sequences.append(copy)
        return copy

    # -- the cache ---------------------------------------------------------------------------------------------------

    def _admit(self, group: Group) -> None:
        """Find what is cached of a group that starts, or starts again."""
        first = group.reused_tokens is None
        for sequence in group.sequences:
            self._prefixes.take(sequence, group.match_limit(sequence), isolated=group.request.isolated and first)
        if first:
            group.reused_tokens = group.prompt.num_cached
            self._guard(group, group.report_progress)
            if not group.prompt.num_uncached:
                group.finish()

    # -- the end of groups -------------------------------------------------------------------------------------------

    def _end_finished(self) -> None:
        """Release the sequences that need nothing any more, and remove the groups that have finished."""
        for group in self._scheduler.groups:
            if not group.sequences and group.error is None:
                self._guard(group, partial(group.before_release, self._prefixes.read))
            self._release_ended(group)
            if not group.sequences:
                self._scheduler.remove(group)
                self._guard(group, group.close)
                group.notify()

    def _end(self, group: Group, error: BaseException | None) -> None:
        group.finish(error)
        self._end_finished()

    def _release_ended(self, group: Group) -> None:
        """Release the blocks of the sequences that a group does not continue."""
        for sequence in group.take_ended():
            self._cache.release(sequence)

    def _end_all(self, error: BaseException) -> None:
        for group in self._scheduler.groups:
            group.finish(error)
        self._end_finished()

    def check(self) -> None:
        """Check the invariants of the block manager.

        Raises:
            AssertionError: one is violated.
        """
        with self._lock:
            if self._thread is None:
                tables = [sequence.blocks for group in self._scheduler.groups for sequence in group.all_sequences]
                self.blocks.check(tables)


def _prepare(groups: list[Group]) -> None:
    for group in groups:
        group.prepare()


def _is_wanted(group: Group) -> bool:
    try:
        return group.wanted
    except BaseException:  # noqa: BLE001 - raised again, to the caller, between two steps
        return False
