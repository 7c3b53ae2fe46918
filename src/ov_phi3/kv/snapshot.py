"""File format of saved KV caches: safetensors with a fingerprint and checksums.

The format is that of https://github.com/huggingface/safetensors: eight bytes with the length of the header, a JSON
header, then the tensors one after another. Any tool that reads safetensors opens it, and it can be memory-mapped.
`docs/kv-snapshots.md` lists the tensors and the entries of the header's `__metadata__`. This module does not use the
safetensors package: its writer needs all tensors in memory at once, its reader copies them, and the contents of these
files are so restricted that the complete tensor table can be computed and compared.

Versions 3 and 2 hold blocks of a paged cache, byte by byte; they differ in the checksum of a tensor only. Version 1
held keys and values as arrays of numbers; such a file is still read, without them: its ids are prefilled again.

The reader does not trust the file: lengths are checked against the file's size before anything is read, the header is
parsed only if it is short, and no tensor is returned before all checksums match.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import stat
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ov_phi3.errors import SnapshotError
from ov_phi3.files import expanded, write_atomically
from ov_phi3.kv.entry import KVEntry, KVTensors, tensor_names

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FORMAT", "VERSION", "Snapshot", "read", "write"]

FORMAT = "ov_phi3-kv"
VERSION = 3
"""The format that is written; older ones are read too."""

_MAX_HEADER = 2**20  # bytes; the header of a model with 1,000 layers has a quarter of that
_MAX_CONVERSATION = 16 * 2**20
_MAX_NUMBER = 2**40
_PAGE = 4096  # bytes that a checksum adds up first
_KINDS = ("prefix", "chat")
_ITEMS = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U32": 4, "U8": 1}
_COMMON_SIZES = ("version", "ids", "tokens", "layers", "conversation_bytes")
_BLOCK_SIZES = (*_COMMON_SIZES, "blocks", "block_size", "key_bytes", "value_bytes")
_SIZES = {1: (*_COMMON_SIZES, "kv_heads", "head_dim"), 2: _BLOCK_SIZES, 3: _BLOCK_SIZES}
"""Version -> the sizes in its metadata."""
_V1_TYPES = ("F32", "F16", "BF16")
_TEXTS = ("format", "kind", "dtype", "layout", "exact", "past_boundary")


@dataclass(frozen=True)
class Snapshot:
    """Contents of a snapshot file.

    Attributes:
        kind: "prefix" or "chat".
        fingerprint: what the keys and values depend on, see `fingerprint_of`.
        ids: all token ids, int64, shape [tokens]; those of a chat may be more than have keys and values.
        entry: keys and values, and the ids that they belong to.
        conversation: the state of a chat as JSON values; None for a prefix.
        size: size of the file in bytes.
    """

    kind: str
    fingerprint: Mapping[str, str]
    ids: NDArray[np.int64]
    entry: KVEntry
    conversation: Mapping[str, Any] | None = None
    size: int = 0


# -- writing -----------------------------------------------------------------------------------------------------------


def write(path: str | os.PathLike[str], snapshot: Snapshot) -> int:
    """Write a snapshot, whole or not at all; returns the size of the file in bytes.

    It is written beside `path` and renamed, so that an existing file stays unchanged until the new one is complete and
    on the disk.

    Raises:
        SnapshotError: it cannot be written.
        TypeError: `path` is not a path.
    """
    target = expanded(path)
    conversation = b"" if snapshot.conversation is None else json.dumps(snapshot.conversation).encode()
    if len(conversation) > _MAX_CONVERSATION:
        raise SnapshotError(
            f"{target}: the conversation takes {len(conversation)} bytes; at most {_MAX_CONVERSATION} can be saved."
        )
    header = _header(snapshot, len(conversation))
    try:
        with write_atomically(target) as file:
            file.write(header)
            _write_tensors(file, snapshot, conversation)
            file.write(hashlib.sha256(header).digest())
            size = file.tell()
    except OSError as exc:
        hint = " A snapshot that is loaded from it may hold it open." if sys.platform == "win32" else ""
        raise SnapshotError(f"{target} cannot be written: {exc.strerror or exc}.{hint}") from exc
    return size


def _write_tensors(file: IO[bytes], snapshot: Snapshot, conversation: bytes) -> None:
    checksums = []
    for array in (snapshot.ids, *snapshot.entry.tensors.arrays):
        data = np.ascontiguousarray(array).data.cast("B")
        checksums.append(_checksum(data))
        file.write(data)
    file.write(np.array([*checksums, _checksum(memoryview(conversation))], dtype="<u4").tobytes())
    file.write(conversation)


def _checksum(data: memoryview) -> int:
    """CRC-32 of the sums of the 64-bit words of each 4 KiB, and of the bytes that are left.

    A CRC of all bytes would take most of the time that it takes to load a prefix: zlib's runs at a tenth of the speed
    of memory. A changed word changes its sum, and exchanged or missing pages change the CRC; words that are exchanged
    within a page go unnoticed, which no failing disk or transfer does.
    """
    whole = len(data) - len(data) % _PAGE
    words = np.frombuffer(data[:whole], dtype="<u8").reshape(-1, _PAGE // 8)
    sums = words.sum(axis=1, dtype=np.uint64).astype("<u8", copy=False)
    return zlib.crc32(data[whole:], zlib.crc32(sums.data))


def _header(snapshot: Snapshot, conversation: int) -> bytes:
    """Length and JSON of the header, padded so that the tensors begin at a multiple of 64 bytes."""
    tensors = snapshot.entry.tensors
    widths = [array.shape[1] for array in tensors.arrays[:2]] or [0, 0]
    sizes = {
        "version": VERSION,
        "ids": len(snapshot.ids),
        "tokens": len(snapshot.entry.ids),
        "layers": len(tensors.arrays) // 2,
        "conversation_bytes": conversation,
        "blocks": tensors.blocks,
        "block_size": tensors.block_size,
        "key_bytes": widths[0],
        "value_bytes": widths[1],
    }
    metadata = {
        "format": FORMAT,
        **{name: str(sizes[name]) for name in _SIZES[VERSION]},
        "kind": snapshot.kind,
        "dtype": tensors.dtype,
        "layout": tensors.layout,
        "past_boundary": str(snapshot.entry.long_rope).lower(),
        **snapshot.fingerprint,
    }
    text = json.dumps({"__metadata__": metadata, **_table(sizes, tensors.dtype)}, separators=(",", ":"))
    raw = text.encode()
    raw += b" " * (-(len(raw) + 8) % 64)
    return len(raw).to_bytes(8, "little") + raw


def _table(sizes: Mapping[str, int], dtype: str) -> dict[str, dict[str, Any]]:
    """The tensor table that follows from the metadata."""
    names = tensor_names(sizes["layers"])
    if sizes["version"] == 1:
        kv = [(name, dtype, [sizes["kv_heads"], sizes["tokens"], sizes["head_dim"]]) for name in names]
    else:
        widths = {"key": sizes["key_bytes"], "value": sizes["value_bytes"]}
        kv = [(name, "U8", [sizes["blocks"], widths[name.rpartition(".")[2]]]) for name in names]
    entries: list[tuple[str, str, list[int]]] = [
        ("token_ids", "I64", [sizes["ids"]]),
        *kv,
        ("checksums", "U32", [len(names) + 2]),
        ("conversation", "U8", [sizes["conversation_bytes"]]),
        ("header_sha256", "U8", [32]),
    ]
    table = {}
    begin = 0
    for name, kind, shape in entries:
        size = _ITEMS[kind]
        for length in shape:
            size *= length
        table[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, begin + size]}
        begin += size
    return table


# -- reading -----------------------------------------------------------------------------------------------------------


def read(path: str | os.PathLike[str], *, verify: bool = True) -> Snapshot:
    """Read a snapshot and check that it is complete.

    The keys and values are pages of the file, mapped into memory: the file must not be truncated or overwritten in
    place while they are in use. (`write` never does that.)

    Args:
        path: the file.
        verify: compare the checksums of all tensors, not only those of header and ids.

    Raises:
        SnapshotError: no file, not a snapshot, of a newer format, truncated, or damaged; the message says which.
        TypeError: `path` is not a path.
    """
    target = expanded(path)
    data = _map_file(target)
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(_MAX_HEADER, len(data) - 8):
        raise SnapshotError(f"{target} is not a saved KV cache: it does not begin with the header of one.")
    header, metadata = _parse_header(data[8 : 8 + length], target)
    sizes, dtype = _read_sizes(metadata, target)
    table = _table(sizes, dtype)
    expected = 8 + length + table["header_sha256"]["data_offsets"][1]
    if len(data) != expected:
        change = "cut off" if len(data) < expected else "longer than it was written"
        raise SnapshotError(f"{target} is {change}: it has {len(data)} bytes, and its header says {expected}.")
    if hashlib.sha256(data[: 8 + length]).digest() != bytes(data[-32:]):
        raise _damaged(target, "its header")
    if header != {"__metadata__": metadata, **table} or metadata["kind"] not in _KINDS:
        raise _damaged(target, "its header, or made by something else: its table of tensors is not that of a snapshot")
    views = {
        name: data[8 + length + entry["data_offsets"][0] : 8 + length + entry["data_offsets"][1]]
        for name, entry in table.items()
    }
    _check_sums(views, zlib.crc32 if sizes["version"] < 3 else _checksum, target, tensors=verify)
    return _snapshot(metadata, sizes, views, target, len(data))


def _map_file(target: Path) -> memoryview:
    """A regular file, memory-mapped; read into memory on Windows, where a mapped file cannot be replaced."""
    try:
        if not stat.S_ISREG(target.stat().st_mode):
            raise SnapshotError(f"{target} is not a file.")
        with target.open("rb") as file:
            if os.fstat(file.fileno()).st_size < 8 + 2 + 32:
                raise SnapshotError(f"{target} is not a saved KV cache, or cut off: it is shorter than any.")
            if sys.platform == "win32":
                return memoryview(file.read())
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except FileNotFoundError as exc:
        raise SnapshotError(f"{target} does not exist.") from exc
    except (OSError, ValueError) as exc:
        raise SnapshotError(f"{target} cannot be read: {getattr(exc, 'strerror', None) or exc}.") from exc


def _parse_header(raw: memoryview, target: Path) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    """The header and its metadata."""
    try:
        header = json.loads(bytes(raw).decode("utf-8"))
        metadata = header["__metadata__"]
        if metadata["format"] != FORMAT:
            raise KeyError
        if not all(isinstance(value, str) for value in metadata.values()):
            raise TypeError
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as exc:
        raise SnapshotError(f"{target} is not a saved KV cache, or its header is damaged.") from exc
    return header, metadata


def _read_sizes(metadata: Mapping[str, str], target: Path) -> tuple[dict[str, int], str]:
    """The sizes in the metadata, and the type of the keys and values."""
    version = _read_size(metadata, "version", target)
    if version > VERSION:
        raise SnapshotError(
            f"{target} is of a newer format ({version}) than this ov_phi3 reads ({VERSION}); update ov_phi3, or build "
            "it again."
        )
    sizes = {name: _read_size(metadata, name, target) for name in _SIZES.get(version, _COMMON_SIZES)}
    dtype = metadata.get("dtype", "")
    consistent = sizes["tokens"] <= sizes["ids"] and 2 * sizes["layers"] <= _MAX_HEADER // 64
    if version == 1:
        consistent = consistent and dtype in _V1_TYPES
    else:
        consistent = consistent and version in _SIZES and sizes["tokens"] <= sizes["blocks"] * sizes["block_size"]
    if not consistent:
        raise _damaged(target, "its header, whose sizes contradict each other")
    return sizes, dtype


def _read_size(metadata: Mapping[str, str], name: str, target: Path) -> int:
    text = metadata.get(name, "")
    if not (text.isascii() and text.isdecimal() and len(text) < 14 and int(text) < _MAX_NUMBER):
        raise _damaged(target, f"its header, where {name} is {text[:40]!r}")
    return int(text)


def _check_sums(
    views: Mapping[str, memoryview], checksum_of: Callable[[memoryview], int], target: Path, *, tensors: bool
) -> None:
    checked = [name for name in views if name not in ("checksums", "header_sha256")]
    checksums = np.frombuffer(views["checksums"], dtype="<u4").tolist()
    # In this thread: helper threads would each leave a malloc arena behind.
    for name, checksum in zip(checked, checksums, strict=True):
        if (tensors or not name.startswith("past_key")) and checksum_of(views[name]) != checksum:
            raise _damaged(target, name)


def _snapshot(
    metadata: Mapping[str, str], sizes: Mapping[str, int], views: Mapping[str, memoryview], target: Path, size: int
) -> Snapshot:
    ids = np.frombuffer(views["token_ids"], dtype="<i8").astype(np.int64)
    tensors = KVTensors.empty()
    if sizes["version"] > 1:
        arrays = [np.frombuffer(views[name], dtype=np.uint8) for name in tensor_names(sizes["layers"])]
        blocks = tuple(array.reshape(sizes["blocks"], -1) for array in arrays)
        tensors = KVTensors(metadata.get("layout", ""), metadata["dtype"], sizes["block_size"], blocks)
    entry = KVEntry(ids[: sizes["tokens"]], tensors, metadata.get("past_boundary") == "true")
    known = {*_TEXTS, *_SIZES[sizes["version"]]}
    fingerprint = {key: text for key, text in metadata.items() if key not in known}
    return Snapshot(metadata["kind"], fingerprint, ids, entry, _conversation(metadata, views, target), size)


def _conversation(
    metadata: Mapping[str, str], views: Mapping[str, memoryview], target: Path
) -> Mapping[str, Any] | None:
    if metadata["kind"] != "chat":
        return None
    raw = views["conversation"]
    try:
        conversation = json.loads(bytes(raw).decode("utf-8")) if len(raw) <= _MAX_CONVERSATION else None
    except (ValueError, RecursionError) as exc:
        raise _damaged(target, "its conversation") from exc
    if not isinstance(conversation, dict):
        raise _damaged(target, "its conversation")
    return conversation


def _damaged(target: Path, where: str) -> SnapshotError:
    return SnapshotError(f"{target} is damaged: {where}. Build or save it again.")
