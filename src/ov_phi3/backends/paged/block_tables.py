"""The block tables of sequences: blocks for their next tokens, and back what they do not need."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ov_phi3.backends.paged.block_manager import BlockManager
    from ov_phi3.backends.paged.sequence import Sequence

__all__ = ["BlockTables"]


class BlockTables:
    """Gives blocks to sequences.

    Args:
        blocks: the block manager.
        copy: copies the contents of a block to another.
    """

    def __init__(self, blocks: BlockManager, copy: Callable[[int, int], None]) -> None:
        self._blocks = blocks
        self._copy = copy

    def reserve(self, sequence: Sequence, count: int) -> bool:
        """Give a sequence blocks for its next tokens; the one that is written to first must be its own.

        Returns:
            False if there are not enough blocks. It has those that there were.
        """
        size = self._blocks.block_size
        first = sequence.num_cached // size
        needed = -(-(sequence.num_cached + count) // size)
        for index in range(first, min(needed, len(sequence.blocks))):
            block = sequence.blocks[index]
            if not self._blocks.is_shared(block):
                self._blocks.forget([block])  # its contents are about to change
                continue
            own = self._blocks.allocate()
            if own is None:
                return False
            if index == first and sequence.num_cached % size:
                self._copy(block, own)
            self._blocks.release([block])
            sequence.blocks[index] = own
        while len(sequence.blocks) < needed:
            block_or_none = self._blocks.allocate()
            if block_or_none is None:
                return False
            sequence.blocks.append(block_or_none)
        return True

    def release_unused(self, sequence: Sequence) -> None:
        """Release the blocks that a sequence does not need for its tokens."""
        used = -(-max(len(sequence), sequence.num_cached + 1) // self._blocks.block_size)
        self._blocks.release(sequence.blocks[used:])
        del sequence.blocks[used:]
