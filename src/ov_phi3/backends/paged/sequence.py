"""One sequence: its token ids, its block table, and how many of its tokens are in the cache."""

from __future__ import annotations

from collections.abc import Sequence as Sequence_
from typing import TYPE_CHECKING

import numpy as np

from ov_phi3.backends.paged.block_manager import ROOT

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Sequence"]

_LONG_ROOT = b"past the LongRoPE boundary"


class Sequence:
    """A growing list of token ids and the blocks that hold their keys and values.

    Args:
        ids: the first ids, int64, shape [tokens].
        rope_boundary: length past which a LongRoPE model uses its long factors; None for other models.

    Attributes:
        num_prompt: length of the prompt.
        num_cached: tokens from the start whose keys and values are in `blocks`.
        blocks: the block table.
        keys: keys of the full blocks at the start of the table, as far as they are registered.
        num_forced: its last tokens that were added without a pass, because nothing else might come.
        cached_long: whether the cached keys were rotated with the long factors of LongRoPE.
    """

    def __init__(self, ids: NDArray[np.int64], rope_boundary: int | None = None) -> None:
        self._ids = np.empty(max(64, 2 * len(ids)), dtype=np.int64)
        self._ids[: len(ids)] = ids
        self._length = len(ids)
        self._boundary = rope_boundary
        self.num_prompt = len(ids)
        self.num_cached = 0
        self.blocks: list[int] = []
        self.keys: list[bytes] = []
        self.num_forced = 0
        self.cached_long = False

    def __len__(self) -> int:
        return self._length

    @property
    def ids(self) -> NDArray[np.int64]:
        """All token ids, as a view; int64, shape [tokens]."""
        return self._ids[: self._length]

    @property
    def generated(self) -> list[int]:
        """The ids behind the prompt."""
        generated: list[int] = self._ids[self.num_prompt : self._length].tolist()
        return generated

    @property
    def num_uncached(self) -> int:
        """Tokens whose keys and values are still to be computed."""
        return self._length - self.num_cached

    @property
    def is_decoding(self) -> bool:
        """Whether only its last chosen token is uncached, and the forced ones behind it."""
        return 1 <= self._length - self.num_cached <= 1 + self.num_forced

    @property
    def is_long(self) -> bool:
        """Whether its keys are rotated with the long factors of LongRoPE."""
        return self._boundary is not None and self._length > self._boundary

    @property
    def root(self) -> bytes:
        """Key in front of its first block, see `block_manager.ROOT`."""
        return _LONG_ROOT if self.is_long else ROOT

    @property
    def has_crossed(self) -> bool:
        """Whether it crossed the LongRoPE boundary after its cache was computed, which is then invalid."""
        return self.num_cached > 0 and self.cached_long != self.is_long

    @property
    def room_on_this_side(self) -> int | None:
        """Tokens that it can get before it crosses the LongRoPE boundary; None if it does not cross one any more."""
        return None if self._boundary is None or self.is_long else self._boundary - self._length

    def append(self, ids: Sequence_[int]) -> None:
        """Add generated ids."""
        needed = self._length + len(ids)
        if needed > len(self._ids):
            self._ids = np.concatenate([self.ids, np.empty(max(needed, 64), dtype=np.int64)])
        self._ids[self._length : needed] = ids
        self._length = needed

    def fork(self) -> Sequence:
        """A copy with the same blocks; the caller adds the references to them."""
        copy = Sequence(self.ids, self._boundary)
        copy.num_prompt = self.num_prompt
        copy.num_cached = self.num_cached
        copy.blocks = list(self.blocks)
        copy.keys = list(self.keys)
        copy.cached_long = self.cached_long
        return copy

    def forget_cache(self) -> list[int]:
        """Give up the cache; returns the blocks, whose references the caller removes."""
        blocks, self.blocks = self.blocks, []
        self.keys = []
        self.num_cached = 0
        return blocks
