"""Keys and values of a token sequence, as the blocks of the cache that held them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["KVEntry", "KVTensors", "tensor_names"]


def tensor_names(layers: int) -> list[str]:
    """Names of a model's KV tensors, in storage order."""
    return [f"past_key_values.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


@dataclass(frozen=True)
class KVTensors:
    """Keys and values of some tokens in all layers: copies of cache blocks, bit for bit.

    Attributes:
        layout: how a block lies in memory, as text; blocks fit only a cache of the same layout.
        dtype: precision of the keys: "f32", "f16", "bf16", "u8", ...
        block_size: tokens per block.
        arrays: keys and values of the first layer, then of the second, and so on; each of shape
            [blocks, bytes of a block], uint8.
    """

    layout: str
    dtype: str
    block_size: int
    arrays: tuple[NDArray[np.uint8], ...]

    @classmethod
    def empty(cls) -> KVTensors:
        """No blocks."""
        return cls("", "", 0, ())

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return int(self.arrays[0].shape[0]) if self.arrays else 0

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(array.nbytes for array in self.arrays)


@dataclass(frozen=True, eq=False)
class KVEntry:
    """Keys and values of a sequence from its first position on.

    Attributes:
        ids: token ids, int64, shape [tokens]; the last block may have room for more.
        tensors: the blocks that hold their keys and values.
        long_rope: whether the keys were rotated with the long factors of a LongRoPE model.
    """

    ids: NDArray[np.int64]
    tensors: KVTensors
    long_rope: bool = False

    @classmethod
    def empty(cls) -> KVEntry:
        """No tokens."""
        return cls(np.empty(0, dtype=np.int64), KVTensors.empty())
