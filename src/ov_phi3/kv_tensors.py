"""Keys and values as arrays: read out of an engine's state, given to another, written to a file.

An engine hands out its state as float32 whatever it holds it in. What it holds is found again by looking: bfloat16 has
sixteen zero bits behind it, float16 survives the way there and back. So what is kept is bit for bit what the engine
had, at half the size, and a sequence that goes on from it goes on exactly. Only of an engine that quantises its cache
to integers can no exact copy be had in that size: its values are kept as float16, and quantised again when they go
back.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DTYPES", "KVTensors", "KVValue", "names", "read_state", "write_state"]

DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
"""Names of safetensors -> what numpy holds them in; it has no bfloat16, so that is kept as its bits."""

_STATE = re.compile(r"past_key_values\.(\d+)\.(key|value)")


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


def _ordered(states: Sequence[Any]) -> list[Any]:
    """The engine's states in the order of `names`."""

    def place(state: Any) -> tuple[int, str]:
        found = _STATE.match(state.name)
        if found is None:
            raise RuntimeError(f"the model has a state named {state.name!r}, which is not one of a key or a value")
        return int(found[1]), found[2]

    return sorted(states, key=place)


def read_state(states: Sequence[Any], tokens: int, candidates: Sequence[str]) -> KVTensors:
    """A copy of the first tokens of a state.

    Args:
        states: of an infer request, as `query_state()` gives them.
        tokens: how many.
        candidates: keys of `DTYPES` to try, in order. The first that holds the values exactly is taken, or the last.
    """
    ordered = _ordered(states)
    for dtype in candidates:
        arrays = []
        exact = True
        for state in ordered:
            array, same = _converted(state.state.data[0, :, :tokens], dtype)
            exact = exact and same
            if not exact and dtype != candidates[-1]:
                break
            arrays.append(array)
        else:
            return KVTensors(dtype, tuple(arrays), exact)
    raise AssertionError("no candidates")


def _converted(values: NDArray[Any], dtype: str) -> tuple[NDArray[Any], bool]:
    """A copy of some values in another type, and whether nothing was lost."""
    if values.dtype == DTYPES[dtype]:
        return np.array(values), True
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        return (bits >> 16).astype(np.uint16), not np.bitwise_and(bits, 0xFFFF).any()
    with np.errstate(over="ignore"):
        converted = values.astype(DTYPES[dtype])
    return converted, bool((converted.astype(values.dtype) == values).all())


def write_state(states: Sequence[Any], tensors: KVTensors, tokens: int) -> None:
    """Give the first tokens of some tensors to a state, in place of what it held."""
    import openvino as ov

    kinds = {"F32": ov.Type.f32, "F16": ov.Type.f16, "BF16": ov.Type.bf16}
    for state, array in zip(_ordered(states), tensors.arrays, strict=True):
        heads, total, width = array.shape
        whole = np.ascontiguousarray(array)
        tensor = ov.Tensor(whole, ov.Shape([1, heads, total, width]), kinds[tensors.dtype])
        if tokens < total:  # a view of the first ones, not a copy
            tensor = ov.Tensor(tensor, ov.Coordinate([0, 0, 0, 0]), ov.Coordinate([1, heads, tokens, width]))
        state.state = tensor
