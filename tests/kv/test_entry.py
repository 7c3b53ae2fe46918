"""Keys and values as arrays."""

from __future__ import annotations

import numpy as np

from ov_phi3.kv.entry import DTYPES, KVEntry, KVTensors, tensor_names


def tensors(tokens: int) -> KVTensors:
    return KVTensors("F16", tuple(np.full((2, tokens, 8), layer, dtype=DTYPES["F16"]) for layer in range(4)))


def test_size() -> None:
    assert tensors(5).tokens == 5
    assert tensors(5).nbytes == 4 * 2 * 5 * 8 * 2


def test_the_first_tokens_are_views() -> None:
    whole = tensors(5)
    part = whole.first(3)
    assert (part.tokens, part.dtype, part.exact) == (3, whole.dtype, whole.exact)
    assert all(np.shares_memory(a, b) for a, b in zip(part.arrays, whole.arrays, strict=True))


def test_an_empty_entry() -> None:
    entry = KVEntry.empty()
    assert (len(entry.ids), entry.tensors.tokens, entry.tensors.nbytes, entry.long_rope) == (0, 0, 0, False)


def test_names_are_in_storage_order() -> None:
    assert tensor_names(2) == [
        "past_key_values.0.key",
        "past_key_values.0.value",
        "past_key_values.1.key",
        "past_key_values.1.value",
    ]
