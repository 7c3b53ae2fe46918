"""Keys and values as blocks."""

from __future__ import annotations

import numpy as np

from ov_phi3.kv.entry import KVEntry, KVTensors, tensor_names


def test_size() -> None:
    arrays = tuple(np.zeros((3, width), dtype=np.uint8) for width in (10, 20, 10, 20))
    tensors = KVTensors("a layout", "u8", 4, arrays)
    assert tensors.blocks == 3
    assert tensors.nbytes == 3 * 60


def test_an_empty_entry() -> None:
    entry = KVEntry.empty()
    assert (len(entry.ids), entry.tensors.blocks, entry.tensors.nbytes, entry.long_rope) == (0, 0, 0, False)
    assert entry.tensors.layout == ""


def test_names_are_in_storage_order() -> None:
    assert tensor_names(2) == [
        "past_key_values.0.key",
        "past_key_values.0.value",
        "past_key_values.1.key",
        "past_key_values.1.value",
    ]
