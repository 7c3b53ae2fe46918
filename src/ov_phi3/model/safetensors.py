"""A safetensors file: which tensors it holds, of which type and shape, and their values."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ov_phi3.errors import ModelError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["TensorEntry", "read_header", "read_tensor"]

_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""How numpy reads a type; it has none for bfloat16, the upper half of a float32."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        dtype: its element type, such as "F32" or "BF16".
        shape: its shape.
        size: its size in bytes.
        start: where its values begin in the file, in bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    size: int
    start: int


def read_header(file: Path) -> Mapping[str, TensorEntry]:
    """The tensors of a safetensors file by name: 8 bytes with the header's length, a JSON header, the values.

    Source: https://github.com/huggingface/safetensors#format.

    Raises:
        ModelError: the file cannot be read, is cut off, or is none.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            if start == b"version ":
                raise ModelError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` in its directory.")
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            header: dict[str, Any] = json.loads(stream.read(length)) if length < size else {}
        found = {name: value for name, value in header.items() if name != "__metadata__"}
        needed = 8 + length + max((value["data_offsets"][1] for value in found.values()), default=0)
        entries = {
            name: TensorEntry(
                str(value["dtype"]),
                tuple(int(width) for width in value["shape"]),
                int(value["data_offsets"][1] - value["data_offsets"][0]),
                8 + length + int(value["data_offsets"][0]),
            )
            for name, value in found.items()
        }
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror or error}.") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{file} is not a safetensors file; download it again.") from error
    if size < needed:
        raise ModelError(f"{file} is cut off: it has {size} bytes, and its header needs {needed}. Download it again.")
    return entries


def read_tensor(file: Path, entry: TensorEntry) -> NDArray[np.float32]:
    """The values of one tensor of floating-point numbers, of its shape.

    Raises:
        ModelError: the file cannot be read, or the tensor has another element type, or a size that is not its shape's.
    """
    import numpy as np  # the export reads headers only

    if entry.dtype not in _FLOATS:
        raise ModelError(f"{file} has a tensor of type {entry.dtype}; expected {', '.join(_FLOATS)}.")
    width = np.dtype(_FLOATS[entry.dtype]).itemsize
    if entry.size != math.prod(entry.shape) * width:
        raise ModelError(
            f"{file} is damaged: a tensor of shape {list(entry.shape)} and type {entry.dtype} has {entry.size} bytes. "
            "Save it again."
        )
    try:
        with file.open("rb") as stream:
            stream.seek(entry.start)
            data = stream.read(entry.size)
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror or error}.") from error
    values = np.frombuffer(data, _FLOATS[entry.dtype])
    floats = (values.astype(np.uint32) << 16).view(np.float32) if entry.dtype == "BF16" else values.astype(np.float32)
    return floats.reshape(entry.shape)
