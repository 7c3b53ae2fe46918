"""Values of a safetensors file, in every type that an adapter can have."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from ov_phi3 import ModelError
from ov_phi3.model.safetensors import read_header, read_tensor

VALUES = np.array([[1.0, -0.5, 3.0], [2**-20, -(2.0**20), 0.0]], np.float32)  # exact in bfloat16


def write(path: Path, dtype: str, values: bytes) -> Path:
    """A file with another tensor of eight bytes in front of `values`."""
    header = {
        "other": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "x": {"dtype": dtype, "shape": [2, 3], "data_offsets": [8, 8 + len(values)]},
    }
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\1" * 8 + values)
    return path


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("F64", VALUES.astype("<f8").tobytes()),
        ("F32", VALUES.astype("<f4").tobytes()),
        ("BF16", (VALUES.view(np.uint32) >> 16).astype("<u2").tobytes()),
    ],
)
def test_every_type_of_floats(tmp_path: Path, dtype: str, values: bytes) -> None:
    file = write(tmp_path / "a.safetensors", dtype, values)
    read = read_tensor(file, read_header(file)["x"])
    assert read.dtype == np.float32
    assert read.tolist() == VALUES.tolist()


def test_float16_is_rounded_as_numpy_does(tmp_path: Path) -> None:
    half = (VALUES / 1000).astype("<f2")
    file = write(tmp_path / "a.safetensors", "F16", half.tobytes())
    assert read_tensor(file, read_header(file)["x"]).tolist() == half.astype(np.float32).tolist()


def test_other_types_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", "I8", bytes(6))
    with pytest.raises(ModelError, match=r"a\.safetensors has a tensor of type I8; expected F64, F32, F16, BF16"):
        read_tensor(file, read_header(file)["x"])


def test_a_size_that_is_not_the_shapes_is_damage(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", "F32", bytes(20))
    with pytest.raises(ModelError, match=r"is damaged: a tensor of shape \[2, 3\] and type F32 has 20 bytes"):
        read_tensor(file, read_header(file)["x"])
