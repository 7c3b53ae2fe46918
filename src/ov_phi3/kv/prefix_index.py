"""Which token ids are in an engine's prefix cache.

openvino-genai (2026.4.1) does not report what it finds in its prefix cache. `BlockLedger` estimates it by applying the
engine's own rules to the same requests. `benchmarks/prefix_cache.py` checks the estimates against measured prefill
time.
"""

from __future__ import annotations

import hashlib
import heapq
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["BlockLedger", "PrefixCache", "PrefixIndex"]

_GROWTH_TOKENS = 256


class PrefixIndex(Protocol):
    """Index of the token ids in a prefix cache.

    Attributes:
        block_size: tokens per block; prompts are prefilled in chunks of whole blocks.
        growable: whether the cache has no fixed number of blocks.
    """

    block_size: int
    growable: bool

    @property
    def capacity(self) -> int:
        """Number of tokens that the cache has room for."""
        ...

    def match(self, ids: NDArray[np.int64], namespace: bytes = b"", *, isolated: bool = False) -> int:
        """Number of prompt tokens that are cached; `isolated`: see `Request`."""
        ...

    def commit(
        self,
        ids: NDArray[np.int64],
        generated: Sequence[int],
        *,
        longest: int,
        exact: bool,
        namespace: bytes = b"",
        extra_blocks: int = 0,
    ) -> None:
        """Record the blocks of a reply that has ended."""
        ...

    def invalidate(self) -> None:
        """Mark the contents as unknown, after a failure of the engine."""
        ...


@dataclass(frozen=True, slots=True)
class PrefixCache:
    """Size of a block-granular prefix cache.

    Attributes:
        block_size: tokens per block.
        num_blocks: number of blocks; 0 for a cache that grows.
    """

    block_size: int
    num_blocks: int


class BlockLedger:
    """Estimated contents of GenAI's paged prefix cache, by the same rules as the engine's.

    A sequence is stored in blocks. A block is identified by its ids and all ids before it. It stays cached after its
    sequence has ended until its memory is needed: unused blocks are taken first, then the least recently used one. A
    prompt reuses every full block from its start that is cached, then the shortest cached remainder of a block that
    some sequence ended with. The last prompt token is always computed. (`openvino.genai`, `block_manager.hpp`.)

    Args:
        block_size: tokens per block.
        num_blocks: number of blocks; 0 for a cache that grows: to twice the prompt, and by 256 tokens when it is full.
    """

    def __init__(self, block_size: int, num_blocks: int = 0) -> None:
        self.block_size = block_size
        self.growable = num_blocks == 0
        self._lock = threading.Lock()
        self._stored = _BlocksByAge()
        self._free: deque[int] = deque()  # unused blocks; the engine dates them by the time of their allocation
        self._clock = 0
        self._num_blocks = 0
        self._unknown = 0
        self._enlarge(num_blocks)

    @classmethod
    def of(cls, cache: PrefixCache) -> BlockLedger:
        """A ledger for a cache of this size."""
        return cls(cache.block_size, cache.num_blocks)

    def match(self, ids: NDArray[np.int64], namespace: bytes = b"", *, isolated: bool = False) -> int:  # noqa: ARG002
        """Number of prompt tokens that are cached.

        Args:
            ids: the prompt, int64, shape [tokens].
            namespace: separates sequences with equal ids and different keys.
            isolated: has no effect: the engine shares its blocks with every request.
        """
        with self._lock:
            keys, tokens = self._match_blocks(ids, namespace)
        return min(tokens, len(ids) - 1) if keys else 0

    def commit(
        self,
        ids: NDArray[np.int64],
        generated: Sequence[int],
        *,
        longest: int,
        exact: bool,
        namespace: bytes = b"",
        extra_blocks: int = 0,
    ) -> None:
        """Record the blocks of a reply that has ended.

        Args:
            ids: the prompt, int64, shape [tokens].
            generated: reply ids whose keys were computed: all but the last.
            longest: the reply's length limit, in tokens; a growing cache allocates by it.
            exact: whether the engine computed exactly these ids. Otherwise the key of the last block is unknown.
            namespace: as for `match`.
            extra_blocks: blocks that the request may have filled with other content: other beams, other samples.
        """
        block = self.block_size
        content = np.concatenate([ids, np.array(generated, dtype=np.int64)])
        blocks = -(-len(content) // block)
        with self._lock:
            reused, _ = self._match_blocks(ids, namespace)
            if self.growable:
                self._enlarge(-(-min(2 * len(ids), len(ids) + longest) // block))
            self._clock += 1
            for key in reused:
                self._stored.remove(key)
            dates = [self._clock] * len(reused)
            dates += [self._allocate() for _ in range(blocks - len(reused))]
            key = namespace
            for index, date in enumerate(dates):
                part = content[index * block : (index + 1) * block]
                key = _block_key(key, part)
                self._store(key if exact or len(part) == block else self._unknown_key(), date)
            for _ in range(min(extra_blocks, self._num_blocks or extra_blocks)):
                self._store(self._unknown_key(), self._allocate())

    def invalidate(self) -> None:
        """Mark the contents of all blocks as unknown, after a failure of the engine."""
        with self._lock:
            dates = self._stored.dates()
            self._stored = _BlocksByAge()
            for date in dates:
                self._stored.set(self._unknown_key(), date)

    @property
    def capacity(self) -> int:
        """Number of tokens that the cache has room for."""
        return self._num_blocks * self.block_size

    def _match_blocks(self, ids: NDArray[np.int64], namespace: bytes) -> tuple[list[bytes], int]:
        """Keys of the stored blocks that a prompt reuses, and the number of tokens in them."""
        keys: list[bytes] = []
        done, key = 0, namespace
        while done < len(ids):
            part = ids[done : done + self.block_size]
            full = _block_key(key, part)
            if full not in self._stored:
                for length in range(1, len(part)):
                    if (partial := _block_key(key, part[:length])) in self._stored:
                        return [*keys, partial], done + length
                break
            keys.append(full)
            done, key = done + len(part), full
        return keys, done

    def _allocate(self) -> int:
        """Take a block, evicting the least recently used one if necessary; returns the block's date."""
        if not self._free and not self._stored and self.growable:
            self._enlarge(self._num_blocks + _GROWTH_TOKENS // self.block_size)
        if self._free:
            return self._free.popleft()
        if self._stored:
            self._stored.pop_oldest()
        return self._clock

    def _store(self, key: bytes, date: int) -> None:
        before = self._stored.get(key)
        if before is not None:  # equal content twice: the older block becomes free
            self._free.append(before)
        self._stored.set(key, date)

    def _enlarge(self, num_blocks: int) -> None:
        while self._num_blocks < num_blocks:
            self._clock += 1
            self._num_blocks += 1
            self._free.append(self._clock)

    def _unknown_key(self) -> bytes:
        self._unknown += 1
        return b"?%d" % self._unknown


class _BlocksByAge:
    """Block key -> date, with the oldest block found without a search.

    A heap of (date, order of insertion, key) with lazy removal: an entry counts only while the key still has that date.
    """

    def __init__(self) -> None:
        self._entries: dict[bytes, tuple[int, int]] = {}
        self._heap: list[tuple[int, int, bytes]] = []
        self._inserted = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def dates(self) -> list[int]:
        """All dates, in order of insertion."""
        return [date for date, _ in self._entries.values()]

    def get(self, key: bytes) -> int | None:
        """A block's date, or None."""
        entry = self._entries.get(key)
        return None if entry is None else entry[0]

    def set(self, key: bytes, date: int) -> None:
        """Add a block, or change its date."""
        before = self._entries.get(key)
        if before is None:
            self._inserted += 1
        order = self._inserted if before is None else before[1]
        self._entries[key] = (date, order)
        heapq.heappush(self._heap, (date, order, key))
        if len(self._heap) > 2 * len(self._entries) + 64:  # stale entries of blocks that were used again
            self._heap = [(date, order, key) for key, (date, order) in self._entries.items()]
            heapq.heapify(self._heap)

    def remove(self, key: bytes) -> None:
        """Remove a block."""
        del self._entries[key]

    def pop_oldest(self) -> None:
        """Remove the block with the lowest date; of equal dates the one that was inserted first."""
        while True:
            date, order, key = heapq.heappop(self._heap)
            if self._entries.get(key) == (date, order):
                del self._entries[key]
                return


def _block_key(before: bytes, part: NDArray[np.int64]) -> bytes:
    return hashlib.blake2b(before + part.tobytes(), digest_size=16).digest()
