"""The file that keys and values are saved in: safetensors, with a fingerprint and checksums.

The format is that of https://github.com/huggingface/safetensors: eight bytes with the header's length, a JSON header,
then the tensors one behind the other, so that any tool which reads safetensors opens it, and it can be mapped into
memory. `docs/kv-snapshots.md` lists the tensors and what is in the header's `__metadata__`. It is written and read here
rather than by the safetensors package: its writer wants all tensors in memory at once and its reader copies them, and
what a file of ours may hold is so narrow that the whole table of tensors can be reckoned and compared.

A reader believes nothing: lengths are checked against the file's before anything is read, the header is parsed only
when it is short, and no tensor is handed out before all checksums were right.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import secrets
import stat
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from ov_phi3.errors import SnapshotError
from ov_phi3.files import expanded
from ov_phi3.kv.cache import DTYPES, KVTensors, KVValue, names
from ov_phi3.system import versions

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ov_phi3.model.info import ModelInfo
    from ov_phi3.text.template import ChatTemplate

__all__ = ["FORMAT", "VERSION", "Snapshot", "check_identity", "identity_of", "read", "write"]

FORMAT = "ov_phi3-kv"
VERSION = 1

_MOST_HEADER = 2**20  # bytes; the header of a model with 1,000 layers has a quarter of that
_MOST_CONVERSATION = 16 * 2**20
_MOST_NUMBER = 2**40
_NUMBERS = ("version", "ids", "tokens", "layers", "kv_heads", "head_dim", "conversation_bytes")
_KINDS = ("prefix", "chat")
_ITEMS = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U32": 4, "U8": 1}


@dataclass(frozen=True)
class Snapshot:
    """What a snapshot file holds.

    Attributes:
        kind: "prefix" or "chat".
        identity: what the keys and values are of, see `identity.identity_of`.
        ids: all token ids; of a chat also those that there are no keys of yet.
        value: keys and values, and the ids that they belong to.
        conversation: of a chat, what it needs to go on; otherwise None.
        size: bytes of the file.
    """

    kind: str
    identity: Mapping[str, str]
    ids: NDArray[np.int64]
    value: KVValue
    conversation: Mapping[str, Any] | None = None
    size: int = 0


# -- writing -----------------------------------------------------------------------------------------------------------


def write(path: str | os.PathLike[str], snapshot: Snapshot) -> int:
    """Write a snapshot: whole, or not at all; returns the file's size in bytes.

    It is written beside `path` and renamed, so that a file which is there stays as it was until the new one is whole
    and on the disk.

    Raises:
        SnapshotError: it cannot be written.
        TypeError: `path` is not a path.
    """
    target = expanded(path)
    conversation = b"" if snapshot.conversation is None else json.dumps(snapshot.conversation).encode()
    if len(conversation) > _MOST_CONVERSATION:
        raise SnapshotError(
            f"{target}: the conversation takes {len(conversation)} bytes; at most {_MOST_CONVERSATION} can be saved."
        )
    header = _header(snapshot, len(conversation))
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with _removed_on_failure(partial):
            with partial.open("xb") as file:
                file.write(header)
                _write_tensors(file, snapshot, conversation)
                file.write(hashlib.sha256(header).digest())
                file.flush()
                os.fsync(file.fileno())
                size = file.tell()
            partial.replace(target)
    except OSError as exc:
        held = " A snapshot that is loaded from it may hold it open." if sys.platform == "win32" else ""
        raise SnapshotError(f"{target} cannot be written: {exc.strerror or exc}.{held}") from exc
    return size


def _write_tensors(file: IO[bytes], snapshot: Snapshot, conversation: bytes) -> None:
    checksums = []
    for array in (snapshot.ids, *snapshot.value.tensors.arrays):
        data = np.ascontiguousarray(array).data.cast("B")
        checksums.append(zlib.crc32(data))
        file.write(data)
    file.write(np.array([*checksums, zlib.crc32(conversation)], dtype="<u4").tobytes())
    file.write(conversation)


@contextlib.contextmanager
def _removed_on_failure(partial: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def _header(snapshot: Snapshot, conversation: int) -> bytes:
    """The length and the JSON of a snapshot's header, filled up so that the tensors begin at a multiple of 64."""
    tensors = snapshot.value.tensors
    shape = tensors.arrays[0].shape if tensors.arrays else (0, 0, 0)
    numbers = {
        "version": VERSION,
        "ids": len(snapshot.ids),
        "tokens": tensors.tokens,
        "layers": len(tensors.arrays) // 2,
        "kv_heads": shape[0],
        "head_dim": shape[2],
        "conversation_bytes": conversation,
    }
    metadata = {
        "format": FORMAT,
        **{name: str(numbers[name]) for name in _NUMBERS},
        "kind": snapshot.kind,
        "dtype": tensors.dtype,
        "exact": str(tensors.exact).lower(),
        "past_boundary": str(snapshot.value.past_boundary).lower(),
        **snapshot.identity,
    }
    text = json.dumps({"__metadata__": metadata, **_table(numbers, tensors.dtype)}, separators=(",", ":"))
    raw = text.encode()
    raw += b" " * (-(len(raw) + 8) % 64)
    return len(raw).to_bytes(8, "little") + raw


def _table(numbers: Mapping[str, int], dtype: str) -> dict[str, dict[str, Any]]:
    """The tensors that a file has, by what its metadata says."""
    kv = [numbers["kv_heads"], numbers["tokens"], numbers["head_dim"]]
    layers = names(numbers["layers"])
    entries: list[tuple[str, str, list[int]]] = [
        ("token_ids", "I64", [numbers["ids"]]),
        *((name, dtype, kv) for name in layers),
        ("checksums", "U32", [len(layers) + 2]),
        ("conversation", "U8", [numbers["conversation_bytes"]]),
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
    """Read a snapshot, and check that it is whole.

    The keys and values are the file's own pages, mapped into memory: the file must not be cut or overwritten in place
    while they are in use. (`write` never does.)

    Args:
        path: the file.
        verify: compare the checksums of all tensors; without it, only the header's.

    Raises:
        SnapshotError: no file, not a snapshot, of a newer format, cut off, or damaged; the message says which.
        TypeError: `path` is not a path.
    """
    target = expanded(path)
    data = _mapped(target)
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(_MOST_HEADER, len(data) - 8):
        raise SnapshotError(f"{target} is not a snapshot: it does not begin with the header of one.")
    header, metadata = _parsed(data[8 : 8 + length], target)
    numbers, dtype = _numbers(metadata, target)
    table = _table(numbers, dtype)
    expected = 8 + length + table["header_sha256"]["data_offsets"][1]
    if len(data) != expected:
        change = "cut off" if len(data) < expected else "longer than it was written"
        raise SnapshotError(f"{target} is {change}: it has {len(data)} bytes, and its header tells of {expected}.")
    if hashlib.sha256(data[: 8 + length]).digest() != bytes(data[-32:]):
        raise _damaged(target, "its header")
    if header != {"__metadata__": metadata, **table} or metadata["kind"] not in _KINDS:
        raise _damaged(target, "its header, or made by something else: its table of tensors is not that of a snapshot")
    views = {
        name: data[8 + length + entry["data_offsets"][0] : 8 + length + entry["data_offsets"][1]]
        for name, entry in table.items()
    }
    _check_sums(views, target, all_of_them=verify)
    return _snapshot(metadata, numbers, dtype, views, target, len(data))


def _mapped(target: Path) -> memoryview:
    """The bytes of a regular file, as its own pages; read on Windows, which keeps mapped files from being replaced."""
    try:
        if not stat.S_ISREG(target.stat().st_mode):
            raise SnapshotError(f"{target} is not a file.")
        with target.open("rb") as file:
            if os.fstat(file.fileno()).st_size < 8 + 2 + 32:
                raise SnapshotError(f"{target} is not a snapshot, or cut off: it is shorter than any.")
            if sys.platform == "win32":
                return memoryview(file.read())
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except FileNotFoundError as exc:
        raise SnapshotError(f"{target} does not exist.") from exc
    except (OSError, ValueError) as exc:
        raise SnapshotError(f"{target} cannot be read: {getattr(exc, 'strerror', None) or exc}.") from exc


def _parsed(raw: memoryview, target: Path) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    """The header, which is short, and its metadata."""
    try:
        header = json.loads(bytes(raw).decode("utf-8"))
        metadata = header["__metadata__"]
        if metadata["format"] != FORMAT:
            raise KeyError
        if not all(isinstance(value, str) for value in metadata.values()):
            raise TypeError
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as exc:
        raise SnapshotError(f"{target} is not a snapshot, or its header is damaged.") from exc
    return header, metadata


def _numbers(metadata: Mapping[str, str], target: Path) -> tuple[dict[str, int], str]:
    """The sizes that the metadata tells of."""
    numbers = {}
    for name in _NUMBERS:
        text = metadata.get(name, "")
        if not (text.isascii() and text.isdecimal() and len(text) < 14 and int(text) < _MOST_NUMBER):
            raise _damaged(target, f"its header, where {name} is {text[:40]!r}")
        numbers[name] = int(text)
        if name == "version" and numbers[name] > VERSION:
            raise SnapshotError(
                f"{target} is of a newer format ({numbers[name]}) than this ov_phi3 reads ({VERSION}); update ov_phi3, "
                "or build it again."
            )
    dtype = metadata.get("dtype", "")
    if dtype not in DTYPES or not numbers["tokens"] <= numbers["ids"] or 2 * numbers["layers"] > _MOST_HEADER // 64:
        raise _damaged(target, "its header, whose sizes contradict each other")
    return numbers, dtype


def _check_sums(views: Mapping[str, memoryview], target: Path, *, all_of_them: bool) -> None:
    checked = [name for name in views if name not in ("checksums", "header_sha256")]
    wanted = np.frombuffer(views["checksums"], dtype="<u4").tolist()
    # In this thread: helpers would each leave a heap behind, and the engine's next threads find theirs cold.
    for name, checksum in zip(checked, wanted, strict=True):
        if (all_of_them or not name.startswith("past_key")) and zlib.crc32(views[name]) != checksum:
            raise _damaged(target, name)


def _snapshot(
    metadata: Mapping[str, str],
    numbers: Mapping[str, int],
    dtype: str,
    views: Mapping[str, memoryview],
    target: Path,
    size: int,
) -> Snapshot:
    ids = np.frombuffer(views["token_ids"], dtype="<i8").astype(np.int64)
    shape = (numbers["kv_heads"], numbers["tokens"], numbers["head_dim"])
    arrays = tuple(np.frombuffer(views[n], dtype=DTYPES[dtype]).reshape(shape) for n in names(numbers["layers"]))
    value = KVValue(
        ids[: numbers["tokens"]],
        KVTensors(dtype, arrays, metadata.get("exact") == "true"),
        metadata.get("past_boundary") == "true",
    )
    known = {"format", "kind", "dtype", "exact", "past_boundary", *_NUMBERS}
    identity = {key: text for key, text in metadata.items() if key not in known}
    return Snapshot(metadata["kind"], identity, ids, value, _conversation(metadata, views, target), size)


def _conversation(
    metadata: Mapping[str, str], views: Mapping[str, memoryview], target: Path
) -> Mapping[str, Any] | None:
    if metadata["kind"] != "chat":
        return None
    raw = views["conversation"]
    try:
        found = json.loads(bytes(raw).decode("utf-8")) if len(raw) <= _MOST_CONVERSATION else None
    except (ValueError, RecursionError) as exc:
        raise _damaged(target, "its conversation") from exc
    if not isinstance(found, dict):
        raise _damaged(target, "its conversation")
    return found


def _damaged(target: Path, where: str) -> SnapshotError:
    return SnapshotError(f"{target} is damaged: {where}. Build or save it again.")


# -- what it is of -----------------------------------------------------------------------------------------------------

# Keys and values mean something only to the model that made them, behind the ids that its tokenizer gave. So all that
# they depend on is written beside them, and compared when they are loaded.
_WORDS = {
    "model": "another model",
    "recipe": "another export of the model",
    "tokenizer": "another tokenizer",
    "template": "another chat layout",
    "rope": "another RoPE regime",
    "engine": "another OpenVINO release",
}
"""What differs, in the order in which it is told."""


def identity_of(info: ModelInfo, template: ChatTemplate) -> dict[str, str]:
    """The parts of a fingerprint, each as text: model, recipe, tokenizer, template, rope and engine.

    `model` is `ModelInfo.fingerprint` (config, graph, samples of the weights), `tokenizer` and `template` are SHA-256
    of the tokenizer's files and of the layout, cut to 32 digits; the others can be read.
    """
    digest = hashlib.sha256()
    for name in ("openvino_tokenizer.xml", "openvino_tokenizer.bin"):
        file = info.path / name
        digest.update(file.read_bytes() if file.is_file() else b"")
    regime = "none" if info.rope_boundary is None else f"factors change at {info.rope_boundary} tokens"
    return {
        "model": info.fingerprint,
        "recipe": info.quantization,
        "tokenizer": digest.hexdigest()[:32],
        "template": f"{template.name} {hashlib.sha256(repr(template).encode()).hexdigest()[:32]}",
        "rope": f"{info.rope_type or 'plain'}, {regime}",
        "engine": f"openvino {versions.release(versions.package_version('openvino') or 'unknown')}",
    }


def check_identity(found: Mapping[str, str], wanted: Mapping[str, str], where: str, *, engine: bool = True) -> None:
    """Refuse a snapshot of something else.

    Args:
        found: the snapshot's identity.
        wanted: the pipeline's.
        where: the file, for the message.
        engine: whether the OpenVINO release counts.

    Raises:
        SnapshotError: they differ; the message says in what.
    """
    for key, words in _WORDS.items():
        if found.get(key) != wanted[key] and (engine or key != "engine"):
            raise SnapshotError(
                f"{where} is of {words}: {key} is {found.get(key, 'not told')!r} there and {wanted[key]!r} here. "
                "Load it with the model that it was made with, or build it again."
            )
