"""Small snapshots, and edited files of them."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from ov_phi3.kv import snapshot
from ov_phi3.kv.entry import KVEntry, KVTensors

DTYPES = ("f32", "f16", "bf16")


def small(dtype: str = "f16", kind: str = "prefix", tokens: int = 5) -> snapshot.Snapshot:
    """A snapshot of two layers, with blocks of four tokens, 24 bytes of keys and 40 bytes of values."""
    draw = np.random.default_rng(1)
    blocks = -(-tokens // 4)
    arrays = tuple(draw.integers(0, 256, (blocks, width), dtype=np.uint8) for width in (24, 40, 24, 40))
    ids = np.arange(tokens + (kind == "chat"), dtype=np.int64)
    entry = KVEntry(ids[:tokens], KVTensors("4 tokens a block", dtype, 4, arrays), long_rope=True)
    conversation = {"system": None, "turns": [["ä", "b", [1, 2]]]} if kind == "chat" else None
    return snapshot.Snapshot(kind, {"model": "m", "engine": "e"}, ids, entry, conversation)


def version_1(kind: str = "chat", dtype: str = "F16") -> bytes:
    """A file of format 1, which held keys and values as tensors of shape [kv_heads, tokens, head_dim]."""
    ids = np.arange(6, dtype="<i8")
    kv = [np.full((2, 5, 8), layer, dtype={"F32": "<f4"}.get(dtype, "<u2")) for layer in range(4)]
    conversation = json.dumps({"system": None, "turns": []}).encode() if kind == "chat" else b""
    parts = [ids.tobytes(), *(array.tobytes() for array in kv), conversation]
    checksums = np.array([zlib.crc32(part) for part in parts], dtype="<u4").tobytes()
    numbers = {"version": 1, "ids": 6, "tokens": 5, "layers": 2, "kv_heads": 2, "head_dim": 8}
    metadata = {
        "format": snapshot.FORMAT,
        **{name: str(value) for name, value in numbers.items()},
        "conversation_bytes": str(len(conversation)),
        "kind": kind,
        "dtype": dtype,
        "exact": "true",
        "past_boundary": "false",
        "model": "m",
    }
    entries: list[tuple[str, str, list[int], bytes]] = [("token_ids", "I64", [6], parts[0])]
    names = [f"past_key_values.{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    entries += [(name, dtype, [2, 5, 8], part) for name, part in zip(names, parts[1:5], strict=True)]
    entries += [("checksums", "U32", [6], checksums), ("conversation", "U8", [len(conversation)], conversation)]
    table: dict[str, Any] = {}
    begin = 0
    for name, kind_of, shape, data in [*entries, ("header_sha256", "U8", [32], bytes(32))]:
        table[name] = {"dtype": kind_of, "shape": shape, "data_offsets": [begin, begin + len(data)]}
        begin += len(data)
    text = json.dumps({"__metadata__": metadata, **table}).encode()
    head = len(text).to_bytes(8, "little") + text
    return head + b"".join(data for *_, data in entries) + hashlib.sha256(head).digest()


def version_2(raw: bytes) -> bytes:
    """A file of the present format as one of format 2, which had the CRC-32 of all bytes of each tensor."""
    length = int.from_bytes(raw[:8], "little")
    header, data = json.loads(raw[8 : 8 + length]), bytearray(raw)
    table = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    parts = [raw[8 + length + begin : 8 + length + end] for begin, end in table.values()]
    names = [name for name in table if name not in ("checksums", "header_sha256")]
    checksums = [zlib.crc32(part) for name, part in zip(table, parts, strict=True) if name in names]
    begin, end = (8 + length + offset for offset in table["checksums"])
    data[begin:end] = np.array(checksums, dtype="<u4").tobytes()
    return edited(bytes(data), meta(version="2"))


def same(one: snapshot.Snapshot, other: snapshot.Snapshot) -> bool:
    """Whether two snapshots are equal, bit for bit."""
    return (
        (one.kind, dict(one.fingerprint), one.conversation, one.entry.long_rope)
        == (other.kind, dict(other.fingerprint), other.conversation, other.entry.long_rope)
        and one.ids.tolist() == other.ids.tolist()
        and one.entry.ids.tolist() == other.entry.ids.tolist()
        and (one.entry.tensors.layout, one.entry.tensors.dtype, one.entry.tensors.block_size)
        == (other.entry.tensors.layout, other.entry.tensors.dtype, other.entry.tensors.block_size)
        and all(
            a.tobytes() == b.tobytes()
            for a, b in zip(one.entry.tensors.arrays, other.entry.tensors.arrays, strict=True)
        )
    )


def edited(raw: bytes, change: Callable[[dict[str, Any]], None], *, sign: bool = True) -> bytes:
    """A file with a changed header; with `sign`, its digest matches the change, as in a forged file."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    head = len(text).to_bytes(8, "little") + text
    return head + raw[8 + length : -32] + (hashlib.sha256(head).digest() if sign else raw[-32:])


def meta(**changes: str) -> Callable[[dict[str, Any]], None]:
    """A change of entries of the metadata."""
    return lambda header: header["__metadata__"].update(changes)
