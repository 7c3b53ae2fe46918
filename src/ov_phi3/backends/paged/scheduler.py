"""Which tokens the next step computes: decodes first, prefill in chunks beside them, in order of arrival.

The scheduler holds no tensors. It gives blocks to the sequences that it schedules. When no block is left it preempts
the group that arrived last: its blocks go, its ids stay, and it is prefilled again later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from ov_phi3.backends.paged.block_tables import BlockTables
from ov_phi3.backends.paged.model_runner import ScheduledTokens

if TYPE_CHECKING:
    from ov_phi3.backends.paged.block_manager import BlockManager
    from ov_phi3.backends.paged.group import Group

__all__ = ["OutOfBlocks", "Scheduler"]


class OutOfBlocks(RuntimeError):  # noqa: N818 - named by what is missing
    """A group alone needs more blocks than the cache has."""


class Scheduler:
    """The groups that wait and run.

    Args:
        blocks: the block manager.
        admit: finds what is cached of a group that starts, or starts again after a preemption.
        copy: copies the contents of a block to another.
        grow: enlarges the cache, if it can; returns whether it did.
        chunk: most prefill tokens in a step without decodes; 0 for whole prompts.

    Attributes:
        waiting: groups that have not started, or were preempted, in their order.
        running: groups that have blocks, in order of arrival.
        preemptions: number of preemptions so far.
        tables: gives blocks to sequences.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        admit: Callable[[Group], None],
        copy: Callable[[int, int], None],
        grow: Callable[[], bool] = lambda: False,
        chunk: int = 0,
    ) -> None:
        self._blocks = blocks
        self._admit = admit
        self.tables = BlockTables(blocks, copy)
        self._grow = grow
        self._chunk = chunk
        self.waiting: deque[Group] = deque()
        self.running: list[Group] = []
        self.preemptions = 0
        self._mixed = 0  # tokens of the last step with decodes and prefill

    @property
    def groups(self) -> list[Group]:
        """All groups."""
        return [*self.running, *self.waiting]

    def load(self) -> tuple[int, int, bool]:
        """How many groups decode, how many are not yet prefilled, and whether any of the first is streamed."""
        decoding = [group for group in self.running if _is_decoding(group)]
        prefilling = len(self.running) + len(self.waiting) - len(decoding)
        return len(decoding), prefilling, any(group.request.streamed for group in decoding)

    def add(self, group: Group) -> None:
        """Add a group at the end."""
        self.waiting.append(group)

    def remove(self, group: Group) -> None:
        """Remove a group, whose blocks were released before."""
        if group in self.running:
            self.running.remove(group)
        elif group in self.waiting:
            self.waiting.remove(group)

    def schedule(self, budget: int) -> list[tuple[Group, ScheduledTokens]]:
        """The next step; empty if there is nothing to do.

        Args:
            budget: most prefill tokens in a step that also decodes.

        Raises:
            OutOfBlocks: a group alone does not fit the cache; it is the last one in `running`.
        """
        step: list[tuple[Group, ScheduledTokens]] = []
        for group in list(self.running):
            if group in self.running and _is_decoding(group):  # it may have been preempted for an earlier one
                self._schedule_decode(group, step)
        budget = self._steady_budget(len(step), budget) if step else self._chunk or 2**31
        for group in list(self.running):
            if group in self.running and not _is_decoding(group):
                budget -= self._schedule_prefill(group, step, budget)
        while self.waiting and budget > 0:
            group = self.waiting[0]
            if self.running and not self._fits(group):
                break
            self.waiting.popleft()
            self.running.append(group)
            self._admit(group)
            budget -= self._schedule_prefill(group, step, budget)
        return [(group, self._with_drafts(group, part)) for group, part in step]

    def _steady_budget(self, decodes: int, budget: int) -> int:
        """At most `budget` prefill tokens: as many as in the last such step if that uses most of the budget.

        A pass with another number of tokens than the one before takes longer, since the CPU plugin prepares every node
        again (openvino 2026.4.1; `benchmarks/overhead.py`).
        """
        rounded = _rounded_budget(decodes, budget)
        if not 0.75 * rounded <= self._mixed - decodes <= budget:
            self._mixed = decodes + rounded
        return self._mixed - decodes

    def _fits(self, group: Group) -> bool:
        """Whether there are blocks for a waiting group's sequences, so that it is not preempted at once.

        The cache grows for them, if it can.
        """
        size = self._blocks.block_size
        needed = sum(len(sequence) // size + 1 for sequence in group.sequences)
        while needed > self._blocks.num_available:
            if not self._grow():
                return False
        return True

    def _schedule_decode(self, group: Group, step: list[tuple[Group, ScheduledTokens]]) -> None:
        """The next token of every sequence of a group; all of them or none, as beams are compared with each other."""
        parts = []
        for sequence in group.sequences:
            count = sequence.num_uncached
            while not self.tables.reserve(sequence, count):
                if not self._preempt(group, step):
                    return
            parts.append((group, ScheduledTokens(sequence, count, group.rows(sequence, count))))
        if group in self.running:
            step += parts

    def _schedule_prefill(self, group: Group, step: list[tuple[Group, ScheduledTokens]], budget: int) -> int:
        """A chunk of every sequence that is not computed yet; returns the number of tokens."""
        used = 0
        for sequence in group.sequences:
            count = min(sequence.num_uncached, budget - used, group.max_chunk or budget)
            if count < 1:
                continue
            while not self.tables.reserve(sequence, count):
                if not self._preempt(group, step):
                    return used
            step.append((group, ScheduledTokens(sequence, count, group.rows(sequence, count))))
            used += count
        return used

    def _with_drafts(self, group: Group, part: ScheduledTokens) -> ScheduledTokens:
        """A decode with the drafts of its sequence, if there are blocks for them; nobody is preempted for drafts."""
        sequence = part.sequence
        try:
            drafts = tuple(group.drafts(sequence)) if sequence.is_decoding else ()
        except Exception as exc:  # noqa: BLE001 - a failure of a draft model or a structure ends this group only
            group.finish(exc)
            return part
        if not drafts:
            return part
        known = sequence.num_uncached
        count = known + len(drafts)
        if not self.tables.reserve(sequence, count):
            self.tables.release_unused(sequence)
            return part
        return ScheduledTokens(sequence, count, tuple(range(known - 1, count)), drafts)

    def _preempt(self, group: Group, step: list[tuple[Group, ScheduledTokens]]) -> bool:
        """Make room by growing, or by taking the blocks of the group that arrived last.

        Returns:
            Whether `group` still runs.

        Raises:
            OutOfBlocks: `group` is the only one.
        """
        if self._grow():
            return True
        victim = self.running[-1]
        if victim is group and len(self.running) == 1:
            raise OutOfBlocks("the KV cache has no room for this request.")
        self.running.remove(victim)
        self.waiting.appendleft(victim)
        self.preemptions += 1
        step[:] = [part for part in step if part[0] is not victim]
        for sequence in victim.all_sequences:
            self._blocks.release(sequence.forget_cache())
        return victim is not group


def _rounded_budget(decodes: int, budget: int) -> int:
    """At most `budget` prefill tokens, so that few different numbers of tokens, decodes included, occur in a step.

    The first pass with a number of tokens takes longer than the next ones: the CPU plugin prepares kernels for it
    (openvino 2026.4.1). The numbers are 1 to 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, ... Where these would leave less
    than half of the budget, it stays as it is.
    """
    total = decodes + budget
    total -= total % (1 << max(0, total.bit_length() - 3))
    return total - decodes if 2 * (total - decodes) >= budget else budget


def _is_decoding(group: Group) -> bool:
    return all(sequence.is_decoding for sequence in group.sequences)
