"""The block manager: thousands of random histories against a plain dictionary of what every block holds."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
from block_histories import OTHER_ROOT, SIZE, History, Tokens, array, key_of

from ov_phi3.backends.paged.block_manager import ROOT, BlockManager


@pytest.mark.parametrize("part", range(10))
def test_random_histories_equal_the_oracle(part: int) -> None:
    for seed in range(200 * part, 200 * (part + 1)):
        history = History(seed)
        for number in range(60):
            try:
                history.step()
            except AssertionError as error:
                raise AssertionError(f"history {seed}, operation {number}: {error}") from error
        for _, _, table in history.sequences:
            history.manager.release(table)
        history.manager.check([])
        assert history.manager.num_available == history.manager.num_blocks, f"history {seed} lost blocks"


def test_the_histories_reach_every_state() -> None:
    """Evictions, matches that end inside a block, shared blocks, and a full cache all occur."""
    seen = dict.fromkeys(["evicted", "partial", "shared", "full", "duplicate"], 0)
    for seed in range(50):
        history = History(seed)
        for _ in range(60):
            before = set(history.oracle.cached)
            history.step()
            seen["evicted"] += bool(before & history.oracle.references.keys() - history.oracle.registered.keys())
            seen["shared"] += any(count > 1 for count in history.oracle.references.values())
            seen["full"] += history.manager.num_available == 0
            seen["partial"] += any(len(own) < SIZE for _, _, own in history.oracle.registered.values())
            seen["duplicate"] += any(
                own == other and one != two
                for _, own, one in history.sequences
                for _, other, two in history.sequences
                if one and two
            )
    assert all(count > 20 for count in seen.values()), seen


# -- single rules ------------------------------------------------------------------------------------------------------


def filled(manager: BlockManager, ids: Tokens) -> list[int]:
    """A table with registered blocks for these tokens."""
    table: list[int] = []
    for start in range(0, len(ids), SIZE):
        block = manager.allocate()
        assert block is not None
        manager.register(block, key_of(ids[:start], ROOT), array(ids[start : start + SIZE]))
        table.append(block)
    return table


def test_a_match_leaves_the_last_token_to_be_computed() -> None:
    manager = BlockManager(8, SIZE)
    manager.release(filled(manager, (1, 2, 3, 4, 5, 6, 7, 8)))
    assert manager.match(array((1, 2, 3, 4, 5, 6, 7, 8))).tokens == 7
    assert manager.match(array((1, 2, 3, 4, 5, 6, 7, 8)), limit=8).tokens == 8
    assert manager.match(array((1, 2, 3, 4, 5, 6, 7, 8)), limit=99).tokens == 8
    assert manager.match(array((1,))).tokens == 0
    assert manager.match(array(())).tokens == 0


def test_the_end_of_a_sequence_is_evicted_before_its_beginning() -> None:
    manager = BlockManager(3, SIZE)
    table = filled(manager, tuple(range(12)))
    manager.release(table)
    assert [manager.allocate() for _ in range(4)] == [*reversed(table), None]


def test_a_block_that_is_used_again_is_evicted_last() -> None:
    manager = BlockManager(2, SIZE)
    old, new = filled(manager, (1, 1, 1, 1)), filled(manager, (2, 2, 2, 2))
    manager.release(old)
    manager.release(new)
    manager.acquire(old)
    manager.release(old)
    assert manager.allocate() == new[0]


def test_a_block_in_use_is_never_evicted() -> None:
    manager = BlockManager(2, SIZE)
    table = filled(manager, (1, 2, 3, 4, 5, 6, 7, 8))
    assert manager.allocate() is None
    assert manager.match(array((1, 2, 3, 4, 5, 6, 7, 8, 9))).blocks == tuple(table)


def test_a_chain_with_a_missing_block_ends_there_until_the_block_is_back() -> None:
    manager = BlockManager(4, SIZE)
    ids = (1, 2, 3, 4, 5, 6, 7, 8, 9)
    table = filled(manager, ids[:8])
    manager.forget(table[:1])
    assert manager.match(array(ids)).tokens == 0
    other = manager.allocate()
    assert other is not None
    manager.register(other, ROOT, array(ids[:4]))
    assert manager.match(array(ids)).blocks == (other, table[1])


def test_equal_ids_behind_another_root_do_not_match() -> None:
    manager = BlockManager(4, SIZE)
    filled(manager, (1, 2, 3, 4))
    assert manager.match(array((1, 2, 3, 4, 5)), OTHER_ROOT).tokens == 0


def test_equal_ids_behind_other_ids_do_not_match() -> None:
    manager = BlockManager(4, SIZE)
    filled(manager, (9, 9, 9, 9, 1, 2, 3, 4))
    assert manager.match(array((8, 8, 8, 8, 1, 2, 3, 4, 5))).tokens == 0
    assert manager.match(array((1, 2, 3, 4, 5))).tokens == 0


def test_the_registered_ids_are_a_copy() -> None:
    """The ids of a growing sequence are a view of a buffer that is written to later."""
    manager = BlockManager(2, SIZE)
    block = manager.allocate()
    assert block is not None
    ids = array((1, 2))
    manager.register(block, ROOT, ids)
    ids[:] = 7
    assert manager.match(array((1, 2, 3))).tokens == 2


def test_reserved_blocks_are_never_given_out() -> None:
    manager = BlockManager(5, SIZE, reserved=2)
    assert sorted(block for _ in range(3) if (block := manager.allocate()) is not None) == [2, 3, 4]
    assert manager.allocate() is None


def test_threads_may_match_while_blocks_change() -> None:
    """`Pipeline` asks from the callers' threads how much of a prompt is cached."""
    history = History(7)
    errors: list[BaseException] = []
    ended = threading.Event()

    def ask() -> None:
        draw = random.Random(1)
        while not ended.is_set():
            try:
                history.manager.match(array(tuple(draw.randrange(3) for _ in range(9))))
            except BaseException as error:
                errors.append(error)
                return

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(1500):
            history.step()
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert errors == []


# -- the check ---------------------------------------------------------------------------------------------------------


# Every invariant, and a change of the state that violates it, given the manager and a table in use.
CORRUPTIONS: list[tuple[str, Callable[[Any, list[int]], object]]] = [
    ("references differ", lambda m, table: m._references.__setitem__(table[0], 2)),
    ("references differ", lambda m, table: table.pop()),
    ("a block is free twice", lambda m, _: m._free.append(m._free[0])),
    ("is free and cached", lambda m, _: m._cached.__setitem__(m._free[0], None)),
    ("is in 0 states", lambda m, _: m._free.pop()),
    ("is in 0 states", lambda m, _: m._cached.popitem()),
    ("is in 2 states", lambda m, table: m._free.append(table[0])),
    ("is in 2 states", lambda m, table: m._cached.__setitem__(table[0], None)),
    (r"free block \d+ is registered", lambda m, table: m._entries.__setitem__(m._free[0], m._entries[table[0]])),
    (r"cached block \d+ is not registered", lambda m, _: m._entries.__setitem__(next(iter(m._cached)), None)),
    ("keys and registrations differ", lambda m, _: m._by_key.popitem()),
    ("keys and registrations differ", lambda m, table: m._by_key.__setitem__(b"more", m._free[0])),
    ("followers and registrations differ", lambda m, _: m._followers.popitem()),
]


@pytest.mark.parametrize(("message", "corrupt"), CORRUPTIONS)
def test_check_finds_every_violation(message: str, corrupt: Callable[[Any, list[int]], object]) -> None:
    manager = BlockManager(10, SIZE, reserved=1)
    table = filled(manager, (1, 2, 3, 4, 5, 6))
    manager.release(filled(manager, (7, 7, 7, 7, 8)))
    manager.check([table])
    corrupt(manager, table)
    with pytest.raises(AssertionError, match=message):
        manager.check([table])


def test_check_idle_finds_a_block_that_is_still_held() -> None:
    manager = BlockManager(10, SIZE, reserved=1)
    table = filled(manager, (1, 2, 3, 4, 5, 6))
    with pytest.raises(AssertionError, match="2 blocks are held by no sequence"):
        manager.check_idle()
    manager.release(table)
    manager.check_idle()
    manager.grow(12)
    manager.check_idle()
