"""Keys and values of a token sequence as arrays, independent of any engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DTYPES", "KVEntry", "KVTensors", "tensor_names"]

DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
"""safetensors type name -> numpy type that holds it; numpy has no bfloat16, so its bits are held as uint16."""


def tensor_names(layers: int) -> list[str]:
    """Names of a model's KV tensors, in storage order."""
    return [f"past_key_values.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


@dataclass(frozen=True)
class KVTensors:
    """Keys and values of some tokens, in all layers.

    Attributes:
        dtype: a key of `DTYPES`.
        arrays: keys and values of the first layer, then of the second, and so on; each of shape
            [kv_heads, tokens, head_dim].
        exact: whether they equal the engine's own keys and values bit for bit.
    """

    dtype: str
    arrays: tuple[NDArray[Any], ...]
    exact: bool = True

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return int(self.arrays[0].shape[1]) if self.arrays else 0

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(array.nbytes for array in self.arrays)

    def first(self, tokens: int) -> KVTensors:
        """The first tokens, as views."""
        return KVTensors(self.dtype, tuple(array[:, :tokens] for array in self.arrays), self.exact)


@dataclass(frozen=True, eq=False)
class KVEntry:
    """Keys and values of a sequence from its first position on.

    Attributes:
        ids: token ids, int64, shape [tokens].
        tensors: keys and values of the same number of tokens.
        long_rope: whether the keys were rotated with the long factors of a LongRoPE model.
    """

    ids: NDArray[np.int64]
    tensors: KVTensors
    long_rope: bool = False

    @classmethod
    def empty(cls) -> KVEntry:
        """No tokens."""
        return cls(np.empty(0, dtype=np.int64), KVTensors("F16", ()))
