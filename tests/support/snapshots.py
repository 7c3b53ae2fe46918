"""Small snapshots, and edited files of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from ov_phi3.kv import snapshot
from ov_phi3.kv.entry import DTYPES, KVEntry, KVTensors


def small(dtype: str = "F16", kind: str = "prefix", tokens: int = 5) -> snapshot.Snapshot:
    """A snapshot of two layers, two heads and eight channels."""
    draw = np.random.default_rng(1)
    arrays = tuple(
        draw.integers(0, 2**16, (2, tokens, 8)).astype(DTYPES[dtype])
        if dtype == "BF16"
        else draw.normal(size=(2, tokens, 8)).astype(DTYPES[dtype])
        for _ in range(4)
    )
    ids = np.arange(tokens + (kind == "chat"), dtype=np.int64)
    entry = KVEntry(ids[:tokens], KVTensors(dtype, arrays), long_rope=True)
    conversation = {"system": None, "turns": [["ä", "b", [1, 2]]]} if kind == "chat" else None
    return snapshot.Snapshot(kind, {"model": "m", "engine": "e"}, ids, entry, conversation)


def same(one: snapshot.Snapshot, other: snapshot.Snapshot) -> bool:
    """Whether two snapshots are equal, bit for bit."""
    return (
        (one.kind, dict(one.fingerprint), one.conversation, one.entry.long_rope)
        == (other.kind, dict(other.fingerprint), other.conversation, other.entry.long_rope)
        and one.ids.tolist() == other.ids.tolist()
        and one.entry.ids.tolist() == other.entry.ids.tolist()
        and one.entry.tensors.dtype == other.entry.tensors.dtype
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
