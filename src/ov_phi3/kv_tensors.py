"""Keys and values as arrays, beside the engine: what is read out of one, given to another, and written to a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DTYPES", "KVTensors", "KVValue", "names"]

DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
"""Names of safetensors -> what numpy holds them in; it has no bfloat16, so that is kept as its bits."""


def names(layers: int) -> list[str]:
    """What the tensors of a model are called, in the order in which they are kept."""
    return [f"past_key_values.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


@dataclass(frozen=True)
class KVTensors:
    """Keys and values of some tokens, in all layers.

    Attributes:
        dtype: a key of `DTYPES`.
        arrays: keys and values of the first layer, then of the second, and so on; each of shape
            [kv_heads, tokens, head_dim].
        exact: whether they are what the engine holds, bit for bit.
    """

    dtype: str
    arrays: tuple[NDArray[Any], ...]
    exact: bool = True

    @property
    def tokens(self) -> int:
        """Tokens that there are keys and values of."""
        return int(self.arrays[0].shape[1]) if self.arrays else 0

    @property
    def nbytes(self) -> int:
        """Their size."""
        return sum(array.nbytes for array in self.arrays)

    def first(self, tokens: int) -> KVTensors:
        """Those of the first tokens, as views."""
        return KVTensors(self.dtype, tuple(array[:, :tokens] for array in self.arrays), self.exact)


@dataclass(frozen=True, eq=False)
class KVValue:
    """Keys and values that belong to these token ids, in this order, from the first position on.

    Attributes:
        ids: int64, shape [tokens].
        tensors: as many tokens of them.
        past_boundary: whether the keys were rotated with the long factors of a LongRoPE model.
    """

    ids: NDArray[np.int64]
    tensors: KVTensors
    past_boundary: bool = False
