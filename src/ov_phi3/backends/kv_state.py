"""Reading and writing the KV state of an infer request.

An engine returns its state as float32, whatever precision it holds it in. That precision is detected from the values:
bfloat16 leaves sixteen zero bits, float16 survives the conversion and back. So the copy equals the engine's state bit
for bit, at half the size, and a sequence that continues from it continues exactly. Only a cache quantised to integers
has no exact copy of that size: its values are kept as float16, and quantised again when they are written back.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ov_phi3.kv.entry import DTYPES, KVTensors

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["read_state", "write_state"]

_STATE = re.compile(r"past_key_values\.(\d+)\.(key|value)")


def _ordered(states: Sequence[Any]) -> list[Any]:
    """The states in the order of `tensor_names`."""

    def position(state: Any) -> tuple[int, str]:
        match = _STATE.match(state.name)
        if match is None:
            raise RuntimeError(f"the model has a state named {state.name!r}, which is neither a key nor a value")
        return int(match[1]), match[2]

    return sorted(states, key=position)


def read_state(states: Sequence[Any], tokens: int, candidates: Sequence[str]) -> KVTensors:
    """A copy of the first tokens of a state.

    Args:
        states: of an infer request, from `query_state()`.
        tokens: how many tokens.
        candidates: keys of `DTYPES` to try, in order. The first that holds the values exactly is used, or the last.
            A device that returns its state as float16 (a GPU) holds it as float16.
    """
    ordered = _ordered(states)
    if ordered and ordered[0].state.data.dtype == DTYPES["F16"]:
        candidates = ("F16",)
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
    """A copy of values in another type, and whether the conversion was exact."""
    if values.dtype == DTYPES[dtype]:
        return np.array(values), True
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        return (bits >> 16).astype(np.uint16), not np.bitwise_and(bits, 0xFFFF).any()
    with np.errstate(over="ignore"):
        converted = values.astype(DTYPES[dtype])
    return converted, bool((converted.astype(values.dtype) == values).all())


def write_state(states: Sequence[Any], tensors: KVTensors, tokens: int) -> None:
    """Replace a state by the first tokens of some tensors."""
    import openvino as ov

    kinds = {"F32": ov.Type.f32, "F16": ov.Type.f16, "BF16": ov.Type.bf16}
    for state, array in zip(_ordered(states), tensors.arrays, strict=True):
        heads, total, width = array.shape
        whole = np.ascontiguousarray(array)
        tensor = ov.Tensor(whole, ov.Shape([1, heads, total, width]), kinds[tensors.dtype])
        if tokens < total:  # a view, not a copy
            tensor = ov.Tensor(tensor, ov.Coordinate([0, 0, 0, 0]), ov.Coordinate([1, heads, tokens, width]))
        state.state = tensor
