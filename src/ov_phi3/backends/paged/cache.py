"""The KV cache of one compiled model: its blocks, what they hold of sequences, and its growth."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ov_phi3.backends.paged.block_manager import BlockManager
from ov_phi3.backends.paged.model_runner import SCRATCH_BLOCKS, ModelRunner
from ov_phi3.backends.paged.prefix_store import PrefixStore

if TYPE_CHECKING:
    from ov_phi3.backends.paged.sequence import Sequence

__all__ = ["PagedCache"]


class PagedCache:
    """The blocks of a compiled model. Used by the engine's thread.

    Args:
        runner: the compiled model, with the tensors of its cache.
        max_blocks: blocks that the cache may grow to, the scratch block included; 0 for a cache of fixed size.

    Attributes:
        blocks: the block manager.
        prefixes: what is cached of new sequences.
    """

    def __init__(self, runner: ModelRunner, max_blocks: int = 0) -> None:
        self._runner = runner
        self._max_blocks = max_blocks
        self.blocks = BlockManager(runner.pool.num_blocks, runner.block_size, reserved=SCRATCH_BLOCKS)
        self.prefixes = PrefixStore(runner, self.blocks)

    def copy(self, source: int, target: int) -> None:
        """Copy the contents of a block."""
        self._runner.pool.copy(source, target)

    def grow(self) -> bool:
        """Double the cache, up to its limit; returns whether it grew."""
        before = self._runner.pool.num_blocks
        wanted = min(2 * before, self._max_blocks)
        if wanted <= before:
            return False
        try:
            self._runner.grow(wanted)
        except (MemoryError, RuntimeError):  # no more memory: preempt instead
            self._max_blocks = before
            return False
        self.blocks.grow(wanted)
        return True

    def undo(self, sequences: Iterable[Sequence]) -> None:
        """After a pass that did not end: give up the blocks that it wrote to, whose contents are unknown."""
        size = self.blocks.block_size
        for sequence in sequences:
            whole = sequence.num_cached // size
            self.blocks.forget(sequence.blocks[whole:])
            sequence.num_cached = whole * size
            del sequence.keys[whole:]

    def release(self, sequence: Sequence) -> None:
        """Release the blocks of a sequence that has ended, registered for later sequences."""
        if not sequence.has_crossed:
            self.prefixes.register_full_blocks(sequence)
            self.prefixes.register_last_block(sequence)
        self.blocks.release(sequence.forget_cache())

    def recompute_crossed(self, sequence: Sequence) -> bool:
        """Give up what is cached of a sequence that has crossed the LongRoPE boundary; returns whether it has."""
        if not sequence.has_crossed:
            return False
        self.blocks.release(sequence.forget_cache())
        self.prefixes.match_blocks(sequence, len(sequence) - 1)
        return True
