"""The scheduler: random histories with a simulated cache, without a model.

The simulated cache holds, for every slot of every block, the tokens up to and including the one whose keys and values
would lie there. A block that was shared, evicted or overwritten at the wrong time shows as wrong contents. Longer than
400 lines because the random histories and the tests of single rules use the same simulation.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ov_phi3.backends.paged.block_manager import BlockManager
from ov_phi3.backends.paged.scheduler import OutOfBlocks, Scheduler
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
    """

    def __init__(self, arrival: int, ids: Tokens, replies: list[int], max_chunk: int = 0) -> None:
        self.arrival = arrival
        self.replies = replies
        self.max_chunk = max_chunk
        self.sequences = [Sequence(np.array(ids, dtype=np.int64))]
        self.all_sequences = list(self.sequences)
        self.length_of = {self.sequences[0]: replies[0]}

    def __repr__(self) -> str:
        return f"<group {self.arrival}>"

    def rows(self, sequence: Sequence, count: int) -> tuple[int, ...]:
        return (count - 1,) if count == sequence.num_uncached else ()


def is_decoding(group: FakeGroup) -> bool:
    return all(sequence.num_uncached == 1 for sequence in group.sequences)


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
        prefill = sum(part.count for group, part in step if group not in decoding)
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
            assert 1 <= part.count <= min(part.sequence.num_uncached, group.max_chunk or 2**31)
            assert part.rows == group.rows(part.sequence, part.count)
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
                self.memory.setdefault(block, [None] * SIZE)[position % SIZE] = tokens_of(sequence, position + 1)
        for _, part in step:
            part.sequence.num_cached += part.count
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


# -- random histories --------------------------------------------------------------------------------------------------


def play(seed: int) -> tuple[World, dict[str, int]]:
    """One random history to its end; returns how often which event occurred."""
    draw = random.Random(seed)
    world = World(draw.randrange(4, 14), chunk=draw.choice([0, 0, 3, 9]), max_blocks=draw.choice([0, 0, 20]))
    texts = [tuple(draw.randrange(3) for _ in range(draw.randrange(1, 30))) for _ in range(3)]
    events = dict.fromkeys(["preempted", "cancelled", "too large", "forked", "matched"], 0)
    arrivals, steps = 0, 0
    while arrivals < 12 or world.scheduler.groups:
        if arrivals < 12 and (draw.random() < 0.4 or not world.scheduler.groups):
            text = draw.choice(texts)
            ids = text[: draw.randrange(len(text) + 1)] + tuple(draw.randrange(3) for _ in range(draw.randrange(1, 9)))
            replies = [draw.randrange(1, 15) for _ in range(draw.choice([1, 1, 1, 2, 3]))]
            world.add(FakeGroup(arrivals, ids, replies, draw.choice([0, 0, 2, 7])))
            arrivals += 1
            events["forked"] += len(replies) > 1
        if world.scheduler.groups and draw.random() < 0.03:
            world.remove(draw.choice(world.scheduler.groups))
            events["cancelled"] += 1
        try:
            step = world.schedule(draw.randrange(1, 12))
        except OutOfBlocks:
            (alone,) = world.scheduler.running
            held = {block for sequence in alone.all_sequences for block in sequence.blocks}
            assert len(held) == world.blocks.num_blocks, "a group that fits was refused"
            world.remove(alone)
            events["too large"] += 1
            continue
        events["matched"] += any(group.arrival and part.sequence.num_cached for group, part in step)
        draw.shuffle(step)
        world.run(step)
        world.advance(step)
        world.check_blocks()
        steps += 1
        assert steps < 3000, "a group starves"
    events["preempted"] = world.scheduler.preemptions
    return world, events


@pytest.mark.parametrize("part", range(10))
def test_random_histories(part: int) -> None:
    """Decodes first, in order of arrival, within the budget; nothing is lost, and every group ends."""
    total: dict[str, int] = {}
    for seed in range(100 * part, 100 * (part + 1)):
        try:
            world, events = play(seed)
        except AssertionError as error:
            raise AssertionError(f"history {seed}: {error}") from error
        world.blocks.check([])
        assert world.blocks.num_available == world.blocks.num_blocks, f"history {seed} lost blocks"
        assert len(world.finished) == 12
        for name, count in events.items():
            total[name] = total.get(name, 0) + count
    assert all(count > 20 for count in total.values()), total


# -- single rules ------------------------------------------------------------------------------------------------------


def prompt(length: int, start: int = 0) -> Tokens:
    return tuple(range(1000 * start, 1000 * start + length))


def test_decodes_first_and_prefill_beside_them_within_the_budget() -> None:
    world = World(64)
    world.add(FakeGroup(0, prompt(6), [9]), FakeGroup(1, prompt(30, 1), [9]))
    assert world.step() == [(0, 6), (1, 30)]
    world.add(FakeGroup(2, prompt(12, 2), [9]))
    assert world.step(budget=5) == [(0, 1), (1, 1), (2, 5)]
    assert world.step(budget=5) == [(0, 1), (1, 1), (2, 5)]
    assert world.step(budget=5) == [(0, 1), (1, 1), (2, 2)]
    assert world.step(budget=5) == [(0, 1), (1, 1), (2, 1)]


def test_the_budget_goes_to_the_prompt_that_came_first() -> None:
    world = World(64)
    world.add(FakeGroup(0, prompt(3), [20]))
    world.step()
    world.add(FakeGroup(1, prompt(6, 1), [9]), FakeGroup(2, prompt(6, 2), [9]))
    assert world.step(budget=4) == [(0, 1), (1, 4)]
    assert world.step(budget=4) == [(0, 1), (1, 2), (2, 2)]


@pytest.mark.parametrize(("chunk", "expected"), [(0, [20]), (8, [8, 8, 4])])
def test_a_prompt_alone_comes_in_chunks_if_there_is_a_chunk(chunk: int, expected: list[int]) -> None:
    world = World(64, chunk=chunk)
    world.add(FakeGroup(0, prompt(20), [1]))
    assert [world.step(budget=1)[0][1] for _ in expected] == expected


def test_a_group_may_limit_its_chunk() -> None:
    world = World(64)
    world.add(FakeGroup(0, prompt(10), [1], max_chunk=4))
    assert [world.step() for _ in range(3)] == [[(0, 4)], [(0, 4)], [(0, 2)]]


def test_a_group_waits_until_there_are_blocks_for_it() -> None:
    world = World(5)
    world.add(FakeGroup(0, prompt(8), [4]), FakeGroup(1, prompt(12, 1), [1]))
    assert [world.step() for _ in range(4)] == [[(0, 8)], [(0, 1)], [(0, 1)], [(0, 1)]]
    assert world.step() == [(1, 12)]
    assert world.scheduler.preemptions == 0


def test_later_groups_do_not_pass_one_that_waits_for_blocks() -> None:
    world = World(5)
    world.add(FakeGroup(0, prompt(8), [3]), FakeGroup(1, prompt(12, 1), [1]), FakeGroup(2, prompt(1, 2), [1]))
    world.step()
    assert [group.arrival for group in world.scheduler.waiting] == [1, 2]


def test_the_group_that_came_last_is_preempted_and_comes_back_first() -> None:
    world = World(5)
    world.add(FakeGroup(0, prompt(4), [12]), FakeGroup(1, prompt(4, 1), [12]))
    while not world.scheduler.preemptions:
        world.step()
    world.add(FakeGroup(2, prompt(4, 2), [1]))
    assert [group.arrival for group in world.scheduler.running] == [0]
    assert [group.arrival for group in world.scheduler.waiting] == [1, 2]
    order = [arrival for _ in range(60) for arrival, _ in (world.step() if world.scheduler.groups else [])]
    assert order.index(1) < order.index(2)
    assert [group.arrival for group in world.finished] in ([0, 1, 2], [0, 2, 1])


def test_a_preempted_group_keeps_its_ids_and_finds_its_blocks_again() -> None:
    world = World(6)
    first, second = FakeGroup(0, prompt(8), [8]), FakeGroup(1, prompt(8, 1), [8])
    world.add(first, second)
    while not world.scheduler.preemptions:
        world.step()
    length = len(second.all_sequences[0])
    assert length > 8
    assert second.all_sequences[0].num_cached == 0
    world.remove(first)
    assert world.step()[0][1] < length


def test_the_cache_grows_rather_than_preempt() -> None:
    world = World(4, max_blocks=12)
    world.add(FakeGroup(0, prompt(4), [12]), FakeGroup(1, prompt(4, 1), [12]))
    while world.scheduler.groups:
        world.step()
    assert world.scheduler.preemptions == 0
    assert 8 <= world.blocks.num_blocks <= 12


def test_a_group_that_needs_more_than_the_cache_is_refused_when_it_is_alone() -> None:
    world = World(4)
    world.add(FakeGroup(0, prompt(4), [4]), FakeGroup(1, prompt(17, 1), [1]))
    while 0 in [group.arrival for group in world.scheduler.groups]:
        world.step()
    with pytest.raises(OutOfBlocks):
        world.schedule(5)
    (refused,) = world.scheduler.running
    assert refused.arrival == 1
    world.remove(refused)
    world.blocks.check([])


def test_all_sequences_of_a_group_decode_or_none() -> None:
    """Beams are compared with each other after every token."""
    world = World(11)
    world.add(FakeGroup(0, prompt(8), [8]), FakeGroup(1, prompt(7, 1), [7, 7, 7]))
    while world.scheduler.groups:
        step = world.step()
        decoded = [arrival for arrival, count in step if count == 1]
        assert decoded.count(1) in (0, 1, 3)
    assert world.scheduler.preemptions > 0


def test_forks_share_a_block_until_they_write_to_it() -> None:
    """The last one that has the block writes in place; a full block is never copied."""
    world = World(16)
    group = FakeGroup(0, prompt(6), [3, 3, 3])
    world.add(group)
    world.step()
    tables = [list(sequence.blocks) for sequence in group.sequences]
    assert tables[0] == tables[1] == tables[2]
    world.step()
    first, second, third = (sequence.blocks for sequence in group.sequences)
    assert first[0] == second[0] == third[0] == tables[0][0]
    assert len({first[1], second[1], third[1]}) == 3
    assert tables[0][1] in (first[1], second[1], third[1])
    assert world.blocks.num_available == 16 - 4


def test_forks_at_the_end_of_a_block_copy_nothing() -> None:
    world = World(16)
    copies: list[tuple[int, int]] = []
    copy: Callable[[int, int], None] = world.scheduler._copy
    world.scheduler._copy = lambda source, target: (copies.append((source, target)), copy(source, target))
    world.add(FakeGroup(0, prompt(8), [3, 3]))
    while world.scheduler.groups:
        world.step()
    assert copies == []


def test_a_removed_group_is_in_no_later_step() -> None:
    world = World(64)
    groups = [FakeGroup(index, prompt(5, index), [5]) for index in range(3)]
    world.add(*groups)
    world.step()
    world.remove(groups[1])
    assert world.step() == [(0, 1), (2, 1)]
    world.scheduler.remove(groups[1])  # no effect: it is gone
    assert world.step() == [(0, 1), (2, 1)]


def test_nothing_to_do() -> None:
    assert World(4).schedule(5) == []
