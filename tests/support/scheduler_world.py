"""A scheduler with a simulated cache, without a model.

The simulated cache holds, for every slot of every block, the tokens up to and including the one whose keys and values
would lie there. A block that was shared, evicted or overwritten at the wrong time shows as wrong contents.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ov_phi3.backends.paged.block_manager import BlockManager
from ov_phi3.backends.paged.scheduler import Scheduler
from ov_phi3.backends.paged.sequence import Sequence

SIZE = 4
Tokens = tuple[int, ...]


class FakeGroup:
    """Sequences that grow by one token a step, as the scheduler sees a group.

    Args:
        arrival: position in the order of arrival.
        ids: the prompt.
        replies: length of the reply of each sequence; all sequences fork from the first one with its first token.
        max_chunk: see `Group`.
        num_drafts: draft tokens at each step; all of them are wrong.
    """

    def __init__(self, arrival: int, ids: Tokens, replies: list[int], max_chunk: int = 0, num_drafts: int = 0) -> None:
        self.arrival = arrival
        self.replies = replies
        self.max_chunk = max_chunk
        self.num_drafts = num_drafts
        self.sequences = [Sequence(np.array(ids, dtype=np.int64))]
        self.all_sequences = list(self.sequences)
        self.length_of = {self.sequences[0]: replies[0]}

    def __repr__(self) -> str:
        return f"<group {self.arrival}>"

    def rows(self, sequence: Sequence, count: int) -> tuple[int, ...]:
        return (count - 1,) if count == sequence.num_uncached else ()

    def drafts(self, sequence: Sequence) -> list[int]:
        assert sequence.is_decoding
        return [-1] * self.num_drafts


def is_decoding(group: FakeGroup) -> bool:
    return all(sequence.is_decoding for sequence in group.sequences)


def tokens_of(sequence: Sequence, end: int) -> Tokens:
    return tuple(sequence.ids[:end].tolist())


class World:
    """A scheduler, its block manager and a simulated cache; what the engine does between two steps is done here."""

    def __init__(self, num_blocks: int, *, chunk: int = 0, max_blocks: int = 0) -> None:
        self.blocks = BlockManager(num_blocks, SIZE)
        self.max_blocks = max_blocks
        self.memory: dict[int, list[Tokens | None]] = {}
        self.scheduler: Any = Scheduler(self.blocks, admit=self._admit, copy=self._copy, grow=self._grow, chunk=chunk)
        self.chunk = chunk
        self.finished: list[FakeGroup] = []

    def add(self, *groups: FakeGroup) -> None:
        for group in groups:
            self.scheduler.add(group)

    # -- what the scheduler calls ------------------------------------------------------------------------------------

    def _admit(self, group: FakeGroup) -> None:
        for sequence in group.sequences:
            assert sequence.blocks == []
            assert sequence.num_cached == 0
            match = self.blocks.match_and_acquire(sequence.ids, limit=len(sequence) - 1)
            sequence.blocks = list(match.blocks)
            sequence.num_cached = len(match.blocks) * SIZE
            if match.partial is not None:  # continued in place: the scheduler copies it if it is shared
                sequence.blocks.append(match.partial)
                sequence.num_cached = match.tokens
            self._register(sequence)
            self.check_contents(sequence)

    def _copy(self, source: int, target: int) -> None:
        self.memory[target] = list(self.memory.get(source, [None] * SIZE))

    def _grow(self) -> bool:
        if self.blocks.num_blocks >= self.max_blocks:
            return False
        self.blocks.grow(self.blocks.num_blocks + 1)
        return True

    def _register(self, sequence: Sequence) -> None:
        while len(sequence.keys) < sequence.num_cached // SIZE:
            index = len(sequence.keys)
            before = sequence.keys[-1] if sequence.keys else sequence.root
            ids = sequence.ids[index * SIZE : (index + 1) * SIZE]
            sequence.keys.append(self.blocks.register(sequence.blocks[index], before, ids))

    # -- a step ------------------------------------------------------------------------------------------------------

    def schedule(self, budget: int) -> list[Any]:
        """The next step, checked against every rule."""
        decoding = [group for group in self.scheduler.running if is_decoding(group)]
        step = self.scheduler.schedule(budget)
        groups: list[FakeGroup] = list(dict.fromkeys(group for group, _ in step))
        kinds = [group in decoding for group in groups]
        assert kinds == sorted(kinds, reverse=True), "a prefill is in front of a decode"
        for group in decoding:  # all sequences of a decoding group, or none because it was preempted
            parts = [part.sequence for other, part in step if other is group]
            assert parts == (group.sequences if group in self.scheduler.running else [])
        for kind in (True, False):
            order = [group.arrival for group in groups if (group in decoding) == kind]
            assert order == sorted(order)
        prefill = sum(part.known for group, part in step if group not in decoding)
        limit = budget if any(kinds) else self.chunk
        assert not limit or prefill <= limit, f"{prefill} prefill tokens with a budget of {limit}"
        order = [group.arrival for group in self.scheduler.groups]
        assert order == sorted(order), "the order of arrival is lost"
        assert all(group.all_sequences[0].blocks == [] for group in self.scheduler.waiting)
        if self.scheduler.running:
            assert self.scheduler.running[0] in groups, "the oldest group makes no progress"
        self.check_blocks()
        for group, part in step:
            assert group in self.scheduler.running
            assert 1 <= part.known <= min(part.sequence.num_uncached, group.max_chunk or 2**31)
            assert len(part.drafts) in (0, group.num_drafts if part.sequence.num_uncached == 1 else 0)
            expected = tuple(range(part.count)) if part.drafts else group.rows(part.sequence, part.count)
            assert part.rows == expected
        return step

    def run(self, step: list[Any]) -> None:
        """Write to the simulated cache, in any order: no part of a step may depend on another one."""
        for _, part in step:
            sequence, start = part.sequence, part.sequence.num_cached
            self.check_contents(sequence)
            for position in range(start, start + part.count):
                block = sequence.blocks[position // SIZE]
                assert not self.blocks.is_shared(block), "a shared block is written to"
                assert not self.blocks.tokens_in(block), "a registered block is written to"
                tokens = (*tokens_of(sequence, position + 1), *part.drafts[: max(0, position - len(sequence) + 1)])
                self.memory.setdefault(block, [None] * SIZE)[position % SIZE] = tokens
        for _, part in step:
            part.sequence.num_cached += part.known
            self._register(part.sequence)
            self.check_contents(part.sequence)

    def advance(self, step: list[Any]) -> None:
        """Append the next tokens, fork with the first one, and end the sequences that are long enough."""
        for group, part in step:
            if not part.rows or group not in self.scheduler.running:
                continue
            sequences = [part.sequence]
            if len(group.length_of) < len(group.replies):
                for reply in group.replies[1:]:
                    fork = part.sequence.fork()
                    self.blocks.acquire(fork.blocks)
                    group.length_of[fork] = reply
                    group.sequences.append(fork)
                    group.all_sequences.append(fork)
                    sequences.append(fork)
            for index, sequence in enumerate(sequences):
                sequence.append([100 * group.arrival + list(group.length_of).index(sequence) + index % 2])
                if part.drafts:
                    self.scheduler.tables.release_unused(sequence)
                if len(sequence) - sequence.num_prompt >= group.length_of[sequence]:
                    self.end(group, sequence)
            if not group.sequences:
                self.remove(group)

    def end(self, group: FakeGroup, sequence: Sequence) -> None:
        """End one sequence, whose last block becomes known if nobody else has it."""
        group.sequences.remove(sequence)
        group.all_sequences.remove(sequence)
        index = sequence.num_cached // SIZE
        if sequence.num_cached % SIZE and not self.blocks.is_shared(sequence.blocks[index]):
            before = sequence.keys[-1] if sequence.keys else sequence.root
            self.blocks.register(sequence.blocks[index], before, sequence.ids[index * SIZE : sequence.num_cached])
        self.blocks.release(sequence.forget_cache())

    def remove(self, group: FakeGroup) -> None:
        for sequence in list(group.sequences):
            self.end(group, sequence)
        self.scheduler.remove(group)
        self.finished.append(group)

    def check_blocks(self) -> None:
        tables = [sequence.blocks for group in self.scheduler.groups for sequence in group.all_sequences]
        self.blocks.check(tables)
        for table in tables:
            assert len(set(table)) == len(table), "a table has a block twice"

    def check_contents(self, sequence: Sequence) -> None:
        """The cache holds what the table says."""
        for position in range(sequence.num_cached):
            slot = self.memory[sequence.blocks[position // SIZE]][position % SIZE]
            assert slot == tokens_of(sequence, position + 1), f"position {position} of {sequence.ids} holds {slot}"

    def step(self, budget: int = 5) -> list[tuple[int, int]]:
        """One whole step; returns the arrival and the number of tokens of its parts."""
        step = self.schedule(budget)
        self.run(step)
        self.advance(step)
        self.check_blocks()
        return [(group.arrival, part.count) for group, part in step]
