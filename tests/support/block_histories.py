"""Random operations on a block manager, beside a plain dictionary of what every block holds."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np

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
