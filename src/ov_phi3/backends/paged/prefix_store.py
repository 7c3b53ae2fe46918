"""What is cached of a sequence: found in registered blocks or saved entries, and registered for later sequences."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

import numpy as np

from ov_phi3.backends.paged.sequence import Sequence
from ov_phi3.kv.entry import KVEntry

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ov_phi3.backends.paged.block_manager import BlockManager, PrefixMatch
    from ov_phi3.backends.paged.model_runner import ModelRunner

__all__ = ["PrefixStore"]


class PrefixStore:
    """The cached beginnings of one engine: registered blocks, and entries that live outside of the cache.

    `add_entry` and `match` may be called from any thread, the other methods from the owner thread only.

    Args:
        runner: the compiled model, whose cache is read and written.
        blocks: the block manager.
    """

    def __init__(self, runner: ModelRunner, blocks: BlockManager) -> None:
        self._runner = runner
        self._blocks = blocks
        self._entries: weakref.WeakSet[KVEntry] = weakref.WeakSet()
        self._lock = threading.Lock()

    def add_entry(self, entry: KVEntry) -> None:
        """Let sequences start from an entry for as long as it is referenced elsewhere."""
        with self._lock:
            self._entries.add(entry)

    def match(self, sequence: Sequence, *, isolated: bool = False) -> int:
        """Tokens of a sequence that are cached, its last one left out."""
        limit = len(sequence) - 1
        matching = self._matching_entries(sequence, isolated, limit)
        in_entries = max((tokens for _, tokens in matching), default=0)
        return max(in_entries, 0 if isolated else self._blocks.match(sequence.ids, sequence.root, limit=limit).tokens)

    def take(self, sequence: Sequence, limit: int, *, isolated: bool = False) -> None:
        """Give a sequence without blocks what is cached of it.

        Args:
            sequence: the sequence.
            limit: most tokens to take.
            isolated: use only entries that are a beginning as a whole, not what other sequences have left in blocks.
        """
        self._restore_entry(sequence, isolated, limit)
        if not isolated:
            self.match_blocks(sequence, limit)

    def match_blocks(self, sequence: Sequence, limit: int) -> None:
        """Share the cached blocks that a sequence begins with, if they are more than it has."""
        if limit <= sequence.num_cached:
            return
        match = self._blocks.match_and_acquire(sequence.ids, sequence.root, limit=limit)
        held = [*match.blocks, *(() if match.partial is None else (match.partial,))]
        if match.tokens <= sequence.num_cached:
            self._blocks.release(held)
            return
        self._blocks.release(sequence.forget_cache())
        sequence.blocks = list(match.blocks)
        sequence.num_cached = len(match.blocks) * self._blocks.block_size
        sequence.cached_long = sequence.is_long
        if match.partial is not None:
            self._take_partial(sequence, match)
        self.register_full_blocks(sequence)

    def _take_partial(self, sequence: Sequence, match: PrefixMatch) -> None:
        """Continue in a block of another sequence: in the block itself if nobody else needs it, else in a copy."""
        assert match.partial is not None
        block: int | None = match.partial
        inside = match.tokens - sequence.num_cached
        if self._blocks.is_shared(match.partial) or self._blocks.tokens_in(match.partial) != inside:
            block = self._blocks.allocate()
            if block is not None:
                self._runner.pool.copy(match.partial, block)
            self._blocks.release([match.partial])
        if block is not None:
            sequence.blocks.append(block)
            sequence.num_cached = match.tokens

    def _restore_entry(self, sequence: Sequence, isolated: bool, limit: int) -> None:
        """Write the entry with the longest common beginning into blocks, if it is longer than what the blocks hold."""
        if limit < 1:
            return
        in_blocks = 0 if isolated else self._blocks.match(sequence.ids, sequence.root, limit=limit).tokens
        candidates = self._matching_entries(sequence, isolated, limit)
        entry, tokens = max(candidates, key=lambda found: found[1], default=(None, 0))
        if entry is None or tokens <= in_blocks:
            return
        count = -(-tokens // self._blocks.block_size)
        blocks: list[int] = []
        while len(blocks) < count and (block := self._blocks.allocate()) is not None:
            blocks.append(block)
        if len(blocks) < count:
            self._blocks.release(blocks)
            return
        self._runner.pool.write(blocks, [array[:count] for array in entry.tensors.arrays])
        sequence.blocks, sequence.num_cached, sequence.cached_long = blocks, tokens, sequence.is_long
        if not isolated:
            self.register_full_blocks(sequence)

    def _matching_entries(self, sequence: Sequence, isolated: bool, limit: int) -> list[tuple[KVEntry, int]]:
        """Entries that share a beginning with a sequence, and its length; if isolated, only whole ones."""
        matching = []
        with self._lock:  # a set must not change while it is iterated over
            entries = list(self._entries)
        for entry in entries:
            if entry.long_rope != sequence.is_long:
                continue
            common = min(_common(entry.ids, sequence.ids), limit)
            if common and (not isolated or common >= len(entry.ids) - 1):
                matching.append((entry, common))
        return matching

    def register_full_blocks(self, sequence: Sequence) -> None:
        """Register the blocks that a sequence has filled since the last call."""
        size = self._blocks.block_size
        while len(sequence.keys) < sequence.num_cached // size:
            index = len(sequence.keys)
            before = sequence.keys[-1] if sequence.keys else sequence.root
            ids = sequence.ids[index * size : (index + 1) * size]
            sequence.keys.append(self._blocks.register(sequence.blocks[index], before, ids))

    def register_last_block(self, sequence: Sequence) -> None:
        """Register the partial block at the end of a sequence that has ended."""
        size = self._blocks.block_size
        index = sequence.num_cached // size
        if sequence.num_cached % size and index < len(sequence.blocks) and len(sequence.keys) == index:
            before = sequence.keys[-1] if sequence.keys else sequence.root
            ids = sequence.ids[index * size : sequence.num_cached]
            if not self._blocks.is_shared(sequence.blocks[index]):
                self._blocks.register(sequence.blocks[index], before, ids)

    def read(self, sequence: Sequence) -> KVEntry:
        """A copy of the keys and values of a sequence."""
        blocks = sequence.blocks[: -(-sequence.num_cached // self._blocks.block_size)]
        ids = np.array(sequence.ids[: sequence.num_cached])
        return KVEntry(ids, self._runner.kv_tensors(blocks, len(ids)), sequence.is_long)


def _common(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """Length of the common beginning of two sequences."""
    length = min(len(one), len(other))
    different = one[:length] != other[:length]
    return int(different.argmax()) if different.any() else length
