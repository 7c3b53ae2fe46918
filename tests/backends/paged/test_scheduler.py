"""The scheduler: random histories and single rules with a simulated cache, without a model."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from scheduler_world import FakeGroup, Tokens, World

from ov_phi3.backends.paged.scheduler import OutOfBlocks

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
            drafts = draw.choice([0, 0, 3, 9])
            world.add(FakeGroup(arrivals, ids, replies, draw.choice([0, 0, 2, 7]), drafts))
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


@pytest.mark.parametrize(("decodes", "budget"), [(d, b) for d in (1, 2, 7, 8, 31) for b in (1, 2, 3, 40, 97, 2048)])
def test_the_budget_is_rounded_down_by_half_at_most(decodes: int, budget: int) -> None:
    world = World(4096)
    world.add(*(FakeGroup(index, prompt(2, index), [9]) for index in range(decodes)))
    world.step()
    world.add(FakeGroup(99, prompt(4000, 99), [9]))
    chunk = world.step(budget=budget)[-1][1]
    assert budget / 2 <= chunk <= budget
    assert (decodes + chunk) % 2 ** max(0, (decodes + chunk).bit_length() - 3) == 0 or chunk == budget


def test_a_budget_that_varies_a_little_gives_steps_of_one_size() -> None:
    world = World(4096)
    world.add(FakeGroup(0, prompt(2), [400]))
    world.step()
    world.add(FakeGroup(1, prompt(4000, 1), [9]))
    chunks = [world.step(budget=budget)[-1][1] for budget in (31, 30, 35, 33, 39, 29, 27, 33, 60, 31)]
    assert chunks == [31, 27, 27, 27, 39, 27, 27, 27, 55, 31]


def test_the_budget_goes_to_the_prompt_that_came_first() -> None:
    world = World(64)
    world.add(FakeGroup(0, prompt(3), [20]))
    world.step()
    world.add(FakeGroup(1, prompt(8, 1), [9]), FakeGroup(2, prompt(6, 2), [9]))
    assert world.step(budget=5) == [(0, 1), (1, 5)]
    assert world.step(budget=5) == [(0, 1), (1, 3), (2, 2)]


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


def test_the_cache_grows_for_a_group_that_waits() -> None:
    world = World(5, max_blocks=64)
    world.add(*(FakeGroup(index, prompt(8, index), [4]) for index in range(4)))
    assert world.step() == [(0, 8), (1, 8), (2, 8), (3, 8)]


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
    copy: Callable[[int, int], None] = world.scheduler.tables._copy
    world.scheduler.tables._copy = lambda source, target: (copies.append((source, target)), copy(source, target))
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
