"""The state of an infer request, read out and written back.

An engine hands out its state as float32 whatever it holds it in. What it holds is found again by looking: bfloat16 has
sixteen zero bits behind it, float16 survives the way there and back. So what is kept is bit for bit what the engine
had, at half the size, and a sequence that goes on from it goes on exactly. Only of an engine that quantises its cache
to integers can no exact copy be had in that size: its values are kept as float16, and quantised again when they go
back.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ov_phi3.kv_tensors import DTYPES, KVTensors

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["read_state", "write_state"]

_STATE = re.compile(r"past_key_values\.(\d+)\.(key|value)")


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
            A device that gives its state out as float16 (a GPU) holds it so.
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
