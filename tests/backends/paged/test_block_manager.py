"""The block manager: thousands of random histories against a plain dictionary of what every block holds.

Longer than 400 lines because the oracle, the histories and the tests of single rules use the same helpers.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ov_phi3.backends.paged.block_manager import ROOT, BlockManager, chain_key

SIZE = 4
OTHER_ROOT = b"another root"
Tokens = tuple[int, ...]


def array(ids: Tokens) -> Any:
    return np.array(ids, dtype=np.int64)


def key_of(ids: Tokens, root: bytes) -> bytes:
    """Key of the full blocks that hold `ids`."""
    key = root
    for start in range(0, len(ids), SIZE):
        key = chain_key(key, array(ids[start : start + SIZE]))
    return key


class Oracle:
    """What the manager should know, with a linear search for everything.

    Attributes:
        registered: block -> root, all tokens before the block, its own tokens.
        references: block -> number of references, without the blocks that have none.
        free: unregistered blocks without references.
        cached: registered blocks without references, the least recently used one first.
    """

    def __init__(self, blocks: range) -> None:
        self.registered: dict[int, tuple[bytes, Tokens, Tokens]] = {}
        self.references: dict[int, int] = {}
        self.free = set(blocks)
        self.cached: list[int] = []

    def common_prefix(self, ids: Tokens, root: bytes, limit: int) -> int:
        """Length of the longest beginning that registered blocks hold without a gap."""
        done = 0
        while done + SIZE <= limit and (root, ids[:done], ids[done : done + SIZE]) in self.registered.values():
            done += SIZE
        rest = ids[done : min(limit, done + SIZE)]
        candidates = [own for at, before, own in self.registered.values() if (at, before) == (root, ids[:done])]
        return done + max((common(own, rest) for own in candidates), default=0)

    def acquire(self, block: int) -> None:
        assert block not in self.free
        if block in self.cached:
            self.cached.remove(block)
        self.references[block] = self.references.get(block, 0) + 1

    def release(self, table: list[int]) -> None:
        for block in reversed(table):
            self.references[block] -= 1
            if not self.references[block]:
                del self.references[block]
                if block in self.registered:
                    self.cached.append(block)
                else:
                    self.free.add(block)

    def allocated(self, block: int | None) -> None:
        """Note an allocation: a free block, else the least recently used one, else none."""
        if self.free:
            assert block in self.free, "a block was evicted although another one was free"
        elif self.cached:
            assert block == self.cached[0], "another block than the least recently used one was evicted"
        else:
            assert block is None
        if block is None:
            return
        self.free.discard(block)
        if block in self.cached:
            self.cached.remove(block)
        self.registered.pop(block, None)
        self.references[block] = 1

    def register(self, block: int, root: bytes, before: Tokens, own: Tokens) -> None:
        contents = (root, before, own)
        if self.registered.get(block) == contents:
            return
        self.registered.pop(block, None)
        if contents not in self.registered.values():
            self.registered[block] = contents

    def forget(self, block: int) -> None:
        if self.registered.pop(block, None) is not None and block in self.cached:
            self.cached.remove(block)
            self.free.add(block)


def common(one: Tokens, other: Tokens) -> int:
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return length


class History:
    """Random operations on a manager and on the oracle.

    Args:
        seed: determines the history.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.reserved = self.random.randrange(2)
        self.total = self.reserved + self.random.randrange(1, 12)
        self.manager = BlockManager(self.total, SIZE, reserved=self.reserved)
        self.oracle = Oracle(range(self.reserved, self.total))
        # A sequence: its root, its tokens, and its table.
        self.sequences: list[tuple[bytes, Tokens, list[int]]] = []
        self.texts: list[Tokens] = [()]

    def step(self) -> None:
        operations: list[Callable[[], None]] = [
            *[self.start] * 4,
            *[self.register] * 6,
            *[self.write] * 2,
            *[self.end] * 3,
            self.fork,
            self.forget,
            self.grow,
        ]
        self.random.choice(operations)()
        self.check()

    def check(self) -> None:
        """All that can be observed from outside equals the oracle."""
        self.manager.check([table for _, _, table in self.sequences])
        assert self.manager.num_blocks == self.total - self.reserved
        assert self.manager.num_available == len(self.oracle.free) + len(self.oracle.cached)
        for block in range(self.reserved, self.total):
            own = self.oracle.registered.get(block, (ROOT, (), ()))[2]
            assert self.manager.tokens_in(block) == len(own)
            assert self.manager.is_shared(block) == (self.oracle.references.get(block, 0) > 1)

    def text(self) -> Tokens:
        """Tokens that often begin like earlier ones."""
        known = self.random.choice(self.texts)
        new = tuple(self.random.randrange(3) for _ in range(self.random.randrange(1, 3 * SIZE)))
        text = known[: self.random.randrange(len(known) + 1)] + new
        self.texts.append(text)
        return text

    def start(self) -> None:
        """Match a new sequence, share what is cached, and allocate the rest."""
        root, ids = self.random.choice([ROOT, ROOT, OTHER_ROOT]), self.text()
        limit = self.random.choice([len(ids), len(ids) - 1, self.random.randrange(len(ids) + 1)])
        expected = self.oracle.common_prefix(ids, root, limit)
        assert self.manager.match(array(ids), root, limit=limit).tokens == expected
        if limit == len(ids) - 1:
            assert self.manager.match(array(ids), root).tokens == expected
        match = self.manager.match_and_acquire(array(ids), root, limit=limit)
        assert match.tokens == expected
        assert len(match.blocks) == expected // SIZE
        assert (match.partial is None) == (expected % SIZE == 0)
        held = [*match.blocks, *(() if match.partial is None else (match.partial,))]
        for index, block in enumerate(held):
            assert self.oracle.registered[block][:2] == (root, ids[: index * SIZE])
            tokens = min(SIZE, expected - index * SIZE)
            own = self.oracle.registered[block][2]
            assert own[:tokens] == ids[index * SIZE : index * SIZE + tokens]
            self.oracle.acquire(block)
        table = list(match.blocks)
        self.sequences.append((root, ids, table))
        if match.partial is not None:  # the part of a block is continued in a copy
            copy = self.manager.allocate()
            self.oracle.allocated(copy)
            self.manager.release([match.partial])
            self.oracle.release([match.partial])
            table += [] if copy is None else [copy]
        while len(table) < -(-len(ids) // SIZE):
            block = self.manager.allocate()
            self.oracle.allocated(block)
            if block is None:
                break
            table.append(block)

    def chosen(self) -> tuple[bytes, Tokens, list[int]] | None:
        return self.random.choice(self.sequences) if self.sequences else None

    def register(self) -> None:
        """Register a block of a sequence, full or not."""
        if (chosen := self.chosen()) is None or not chosen[2]:
            return
        root, ids, table = chosen
        index = self.random.randrange(len(table))
        before, own = ids[: index * SIZE], ids[index * SIZE : (index + 1) * SIZE]
        if self.random.random() < 0.2:
            own = own[: self.random.randrange(1, len(own) + 1)]
        key = self.manager.register(table[index], key_of(before, root), array(own))
        assert key == chain_key(key_of(before, root), array(own))
        self.oracle.register(table[index], root, before, own)

    def write(self) -> None:
        """Make a block of a sequence writable: copied if it is shared, else forgotten."""
        if (chosen := self.chosen()) is None or not chosen[2]:
            return
        table = chosen[2]
        index = self.random.randrange(len(table))
        block = table[index]
        if self.manager.is_shared(block):
            own = self.manager.allocate()
            self.oracle.allocated(own)
            if own is not None:
                self.manager.release([block])
                self.oracle.release([block])
                table[index] = own
        else:
            self.manager.forget([block])
            self.oracle.forget(block)

    def fork(self) -> None:
        if (chosen := self.chosen()) is None:
            return
        root, ids, table = chosen
        self.manager.acquire(table)
        for block in table:
            self.oracle.acquire(block)
        self.sequences.append((root, ids, list(table)))

    def end(self) -> None:
        if (chosen := self.chosen()) is None:
            return
        self.sequences = [sequence for sequence in self.sequences if sequence is not chosen]
        self.manager.release(chosen[2])
        self.oracle.release(chosen[2])

    def forget(self) -> None:
        blocks = [self.random.randrange(self.reserved, self.total) for _ in range(self.random.randrange(1, 3))]
        self.manager.forget(blocks)
        for block in blocks:
            self.oracle.forget(block)

    def grow(self) -> None:
        if self.total > 20 or self.random.random() < 0.7:
            return
        added = self.random.randrange(1, 4)
        self.manager.grow(self.total + added)
        self.oracle.free |= set(range(self.total, self.total + added))
        self.total += added


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
