"""Blocks of the KV cache: which are free, which hold what, who shares them, which is evicted next.

The manager holds no tensors. A block has room for `block_size` tokens. A *registered* block is known by its tokens and
all tokens before them, so that later sequences with the same beginning can share it. A block is in exactly one state:

- free: unregistered, no references;
- in use: one or more references (sequences whose table holds it), registered or not;
- cached: registered, no references; the least recently used one is evicted when no block is free.

All operations take constant time per block. Methods may be called from any thread.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["ROOT", "BlockManager", "PrefixMatch", "chain_key"]

ROOT = b""
"""Key in front of the first block of a sequence; other roots separate sequences with equal ids and different keys."""


def chain_key(before: bytes, ids: NDArray[np.int64]) -> bytes:
    """Key of a block: a hash of its ids and of the key of the block before it."""
    return hashlib.blake2b(before + ids.tobytes(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """The longest cached beginning of a sequence.

    Attributes:
        blocks: full blocks, in order.
        partial: a block whose first tokens continue the full ones, or None.
        tokens: matched tokens, those of the partial block included.
    """

    blocks: tuple[int, ...]
    partial: int | None
    tokens: int


@dataclass(slots=True)
class _Entry:
    """Registration of a block."""

    key: bytes
    before: bytes
    ids: NDArray[np.int64]


class BlockManager:
    """The blocks of one cache.

    Args:
        num_blocks: number of blocks.
        block_size: tokens per block.
        reserved: blocks from 0 on that are never given out.
    """

    def __init__(self, num_blocks: int, block_size: int, *, reserved: int = 0) -> None:
        self.block_size = block_size
        self._reserved = reserved
        self._references = [0] * num_blocks
        self._entries: list[_Entry | None] = [None] * num_blocks
        self._free: deque[int] = deque(range(reserved, num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._by_key: dict[bytes, int] = {}
        # Blocks behind a key by their first id, for matches that end inside a block.
        self._followers: dict[tuple[bytes, int], dict[int, None]] = {}
        self._lock = threading.RLock()

    @property
    def num_blocks(self) -> int:
        """Number of blocks that can be given out."""
        return len(self._references) - self._reserved

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated now: free ones, and cached ones that would be evicted."""
        return len(self._free) + len(self._cached)

    def grow(self, num_blocks: int) -> None:
        """Add blocks, to this number in all, the reserved ones included."""
        with self._lock:
            first = len(self._references)
            self._references += [0] * (num_blocks - first)
            self._entries += [None] * (num_blocks - first)
            self._free.extend(range(first, num_blocks))

    # -- matching ----------------------------------------------------------------------------------------------------

    def match(self, ids: NDArray[np.int64], root: bytes = ROOT, *, limit: int | None = None) -> PrefixMatch:
        """The longest cached beginning of a sequence.

        Args:
            ids: the sequence, int64, shape [tokens].
            root: see `ROOT`.
            limit: most tokens to match; default: all but the last, which is computed for its logits.
        """
        limit = len(ids) - 1 if limit is None else min(limit, len(ids))
        blocks: list[int] = []
        key, done, size = root, 0, self.block_size
        with self._lock:
            while done + size <= limit:
                full = chain_key(key, ids[done : done + size])
                block = self._by_key.get(full)
                if block is None:
                    break
                blocks.append(block)
                key, done = full, done + size
            partial, length = self._match_partial(key, ids[done : min(limit, done + size)])
        return PrefixMatch(tuple(blocks), partial, done + length)

    def _match_partial(self, key: bytes, rest: NDArray[np.int64]) -> tuple[int | None, int]:
        """The block behind a key that shares the most first ids with the rest of a sequence.

        Of equal ones the block with the fewest other ids: a sequence continues in its own block, without a copy, and a
        quantised block whose scales later tokens have changed is not used instead.
        """
        best, length, others = None, 0, 0
        if not len(rest):
            return best, length
        for block in self._followers.get((key, int(rest[0])), ()):
            entry = self._entries[block]
            assert entry is not None
            common = min(len(entry.ids), len(rest))
            different = entry.ids[:common] != rest[:common]
            common = int(different.argmax()) if different.any() else common
            if common > length or (common == length > 0 and len(entry.ids) - common < others):
                best, length, others = block, common, len(entry.ids) - common
        return best, length

    def match_and_acquire(self, ids: NDArray[np.int64], root: bytes = ROOT, *, limit: int) -> PrefixMatch:
        """`match`, with a reference added to every block that it names."""
        with self._lock:
            match = self.match(ids, root, limit=limit)
            self.acquire(match.blocks)
            if match.partial is not None:
                self.acquire([match.partial])
            return match

    def tokens_in(self, block: int) -> int:
        """Tokens that a registered block is known to hold; 0 for an unregistered one."""
        entry = self._entries[block]
        return 0 if entry is None else len(entry.ids)

    # -- allocating --------------------------------------------------------------------------------------------------

    def allocate(self) -> int | None:
        """A block with one reference, after evicting the least recently used one if needed; None if all are in use."""
        with self._lock:
            if self._free:
                block = self._free.popleft()
            elif self._cached:
                block, _ = self._cached.popitem(last=False)
                self._unregister(block)
            else:
                return None
            self._references[block] = 1
            return block

    def acquire(self, blocks: Iterable[int]) -> None:
        """Add a reference to blocks that are in use or cached."""
        with self._lock:
            for block in blocks:
                self._cached.pop(block, None)
                self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Remove a reference from the blocks of a sequence, given in its order.

        Registered blocks without a reference become cached; the last block of a sequence is evicted first.
        """
        with self._lock:
            for block in reversed(blocks):
                self._references[block] -= 1
                if self._references[block]:
                    continue
                if self._entries[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def is_shared(self, block: int) -> bool:
        """Whether another sequence refers to this block, so that it must be copied before it is written."""
        return self._references[block] > 1

    # -- registering -------------------------------------------------------------------------------------------------

    def register(self, block: int, before: bytes, ids: NDArray[np.int64]) -> bytes:
        """Make the contents of a block known.

        A block with the same contents that is known already stays the known one.

        Args:
            block: a block in use.
            before: key of the block before it.
            ids: its tokens, up to `block_size`; int64.

        Returns:
            The key of the contents.
        """
        key = chain_key(before, ids)
        with self._lock:
            entry = self._entries[block]
            if entry is not None and entry.key == key:
                return key
            if entry is not None:
                self._unregister(block)
            if key not in self._by_key:
                self._by_key[key] = block
                self._entries[block] = _Entry(key, before, np.array(ids))
                self._followers.setdefault((before, int(ids[0])), {})[block] = None
            return key

    def forget(self, blocks: Iterable[int]) -> None:
        """Unregister blocks whose contents are about to change, or are unknown after a failure."""
        with self._lock:
            for block in blocks:
                if self._entries[block] is not None:
                    self._unregister(block)
                    if block in self._cached:
                        del self._cached[block]
                        self._free.append(block)

    def _unregister(self, block: int) -> None:
        entry = self._entries[block]
        assert entry is not None
        self._entries[block] = None
        del self._by_key[entry.key]
        followers = self._followers[entry.before, int(entry.ids[0])]
        del followers[block]
        if not followers:
            del self._followers[entry.before, int(entry.ids[0])]

    # -- invariants --------------------------------------------------------------------------------------------------

    def check_idle(self) -> None:
        """Check, in constant time, that no sequence holds a block and none is lost.

        Raises:
            AssertionError: an invariant is violated.
        """
        with self._lock:
            unused = len(self._free) + len(self._cached)
            _require(unused == self.num_blocks, f"{self.num_blocks - unused} blocks are held by no sequence")

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Check that every block is in one state and every reference comes from a table.

        Args:
            tables: the block tables of all live sequences.

        Raises:
            AssertionError: an invariant is violated.
        """
        with self._lock:
            counts = [0] * len(self._references)
            for table in tables:
                for block in table:
                    counts[block] += 1
            _require(counts == self._references, "references differ from the block tables")
            free, cached = set(self._free), set(self._cached)
            _require(len(free) == len(self._free), "a block is free twice")
            _require(not free & cached, "a block is free and cached")
            for block in range(self._reserved, len(self._references)):
                registered = self._entries[block] is not None
                states = (block in free, block in cached, self._references[block] > 0)
                _require(sum(states) == 1, f"block {block} is in {sum(states)} states")
                _require(not (block in free and registered), f"free block {block} is registered")
                _require(not (block in cached and not registered), f"cached block {block} is not registered")
            registered_blocks = {b for b, entry in enumerate(self._entries) if entry is not None}
            _require(set(self._by_key.values()) == registered_blocks, "keys and registrations differ")
            in_followers = {b for followers in self._followers.values() for b in followers}
            _require(in_followers == registered_blocks, "followers and registrations differ")


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise AssertionError(f"block manager: {problem}")
