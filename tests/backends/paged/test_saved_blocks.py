"""Saved prefixes and chats hold the blocks of the cache bit for bit, in every precision of the cache."""

from __future__ import annotations

import hashlib
import json
import random
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import run

import ov_phi3
from ov_phi3 import ModelWarning, Pipeline, SnapshotError
from ov_phi3.kv import snapshot
from snapshots import same

GREEDY: dict[str, Any] = {"do_sample": False, "ignore_eos": True}
PRECISIONS = ["f32", "f16", "u8", "u4"]
TOKENS = 75  # two blocks and a part of the third one
Ids = list[int]
LoadWith = Callable[[str], Pipeline]


def drawn(count: int, seed: int = 0) -> Ids:
    return np.random.default_rng(seed).integers(300, 31_000, count).tolist()


@pytest.fixture(scope="module")
def load_with(tiny_fp32: Path, device: str) -> Iterator[LoadWith]:
    """Loads a new pipeline with a precision of the cache; all of them are closed at the end."""
    pipes: list[Pipeline] = []

    def load(precision: str) -> Pipeline:
        config = {"KV_CACHE_PRECISION": precision}
        pipes.append(ov_phi3.load(tiny_fp32, device, backend="infer_request", ov_config=config))
        return pipes[-1]

    yield load
    for pipe in pipes:
        pipe.close()


def digest(pipe: Pipeline, ids: Ids) -> str:
    """A checksum of the blocks that hold these tokens, as they lie in the cache."""
    entry = pipe.prefill(ids)._entry
    assert entry.ids.tolist() == ids
    return hashlib.sha256(b"".join(array.tobytes() for array in entry.tensors.arrays)).hexdigest()


OTHER_PROCESS = """
import hashlib, sys
import ov_phi3
model, device, precision, folder, ids = sys.argv[1:]
ids = [int(i) for i in ids.split()]
greedy = {"do_sample": False, "ignore_eos": True, "max_new_tokens": 20}
with ov_phi3.load(model, device, backend="infer_request", ov_config={"KV_CACHE_PRECISION": precision}) as pipe:
    prefix = pipe.load_prefix(folder + "/prefix.kv")
    entry = pipe.prefill(ids)._entry
    print(hashlib.sha256(b"".join(array.tobytes() for array in entry.tensors.arrays)).hexdigest())
    reply = pipe.generate([*ids, 5, 6, 7], prefix=prefix, **greedy)
    print(reply.metrics.reused_tokens, *reply.token_ids)
    reply = pipe.load_chat(folder + "/chat.kv").send("And then?", **greedy)
    print(reply.metrics.reused_tokens, *reply.token_ids)
"""


@pytest.mark.parametrize("precision", PRECISIONS)
def test_restored_blocks_are_the_saved_ones(
    load_with: LoadWith, tiny_fp32: Path, device: str, tmp_path: Path, precision: str
) -> None:
    """In another pipeline and in another process: equal bytes, and the reply goes on with equal ids."""
    ids, first = drawn(TOKENS), load_with(precision)
    prefix = first.prefill(ids)
    prefix.save(tmp_path / "prefix.kv")
    chat = first.chat(system="Be brief.")
    chat.send("Name a river.", max_new_tokens=30, **GREEDY)
    chat.save(tmp_path / "chat.kv")
    expected = digest(first, ids)
    reply = first.generate([*ids, 5, 6, 7], prefix=prefix, max_new_tokens=20, **GREEDY)
    turn = chat.send("And then?", max_new_tokens=20, **GREEDY)
    assert reply.metrics.reused_tokens == TOKENS

    saved = snapshot.read(tmp_path / "prefix.kv").entry.tensors
    assert hashlib.sha256(b"".join(array.tobytes() for array in saved.arrays)).hexdigest() == expected
    other = load_with(precision)
    loaded = other.load_prefix(tmp_path / "prefix.kv")
    assert digest(other, ids) == expected
    again = other.generate([*ids, 5, 6, 7], prefix=loaded, max_new_tokens=20, **GREEDY)
    assert (again.metrics.reused_tokens, again.token_ids) == (TOKENS, reply.token_ids)
    resumed = other.load_chat(tmp_path / "chat.kv")
    answer = resumed.send("And then?", max_new_tokens=20, **GREEDY)
    assert (answer.metrics.reused_tokens, answer.token_ids) == (turn.metrics.reused_tokens, turn.token_ids)

    process = run(OTHER_PROCESS, tiny_fp32, device, precision, tmp_path, " ".join(map(str, ids)))
    assert process.returncode == 0, process.stderr
    assert process.stdout.split("\n")[:3] == [
        expected,
        " ".join(map(str, [TOKENS, *reply.token_ids])),
        " ".join(map(str, [turn.metrics.reused_tokens, *turn.token_ids])),
    ]


def test_quantized_files_are_smaller(load_with: LoadWith, tmp_path: Path) -> None:
    ids = drawn(320, seed=1)
    sizes = {precision: load_with(precision).prefill(ids).save(tmp_path / precision) for precision in PRECISIONS}
    blocks = {precision: snapshot.read(tmp_path / precision).entry.tensors.nbytes for precision in PRECISIONS}
    assert all(0 < sizes[precision] - blocks[precision] < 6000 for precision in PRECISIONS)
    assert sizes["f16"] < 0.52 * sizes["f32"]
    # A scale and a zero point for each channel of the keys and each token of the values, in float32: with 16 channels a
    # head they are more, relative to the rest, than with the 96 channels of Phi-3-mini.
    assert blocks["u8"] < 0.7 * blocks["f16"]
    assert blocks["u4"] < 0.5 * blocks["f16"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_file_holds_nothing_of_other_conversations(load_with: LoadWith, precision: str) -> None:
    """The slots behind the last token are cleared: a block that is used again has keys and values in them."""
    ids, used, fresh = drawn(TOKENS, seed=8), load_with(precision), load_with(precision)
    for seed in range(60):  # more than the cache has at first
        used.generate(drawn(64, seed=100 + seed), max_new_tokens=2, **GREEDY)
    assert digest(used, ids) == digest(fresh, ids)


class TestAnotherLayout:
    """The tokens are prefilled again, and the ids are those of this pipeline."""

    @pytest.mark.parametrize(("saved", "loaded"), [("f32", "u8"), ("u8", "f16"), ("f16", "f32")])
    def test_prefix_and_chat(self, load_with: LoadWith, tmp_path: Path, saved: str, loaded: str) -> None:
        ids, writer, reader, fresh = drawn(TOKENS, seed=2), load_with(saved), load_with(loaded), load_with(loaded)
        writer.prefill(ids).save(tmp_path / "prefix.kv")
        chat = writer.chat(system="Be brief.")
        first = chat.send("Name a river.", max_new_tokens=30, **GREEDY)
        chat.save(tmp_path / "chat.kv")
        with pytest.warns(ModelWarning, match="another memory layout .*prefilled again"):
            prefix = reader.load_prefix(tmp_path / "prefix.kv")
        assert prefix._entry.tensors.layout != snapshot.read(tmp_path / "prefix.kv").entry.tensors.layout
        assert digest(reader, ids) == digest(fresh, ids)
        reply = reader.generate([*ids, 5, 6, 7], prefix=prefix, max_new_tokens=20, **GREEDY)
        expected = fresh.generate([*ids, 5, 6, 7], max_new_tokens=20, **GREEDY)
        assert (reply.metrics.reused_tokens, reply.token_ids) == (TOKENS, expected.token_ids)
        turn = reader.load_chat(tmp_path / "chat.kv").send("And then?", max_new_tokens=20, **GREEDY)
        assert turn.metrics.reused_tokens == 0
        assert turn.prompt_token_ids[: len(first.prompt_token_ids)] == first.prompt_token_ids
        expected = fresh.generate(turn.prompt_token_ids, max_new_tokens=20, **GREEDY)
        assert turn.token_ids == expected.token_ids

    def test_a_file_that_is_saved_again_is_used(self, load_with: LoadWith, tmp_path: Path) -> None:
        ids = drawn(TOKENS, seed=3)
        load_with("f32").prefill(ids).save(tmp_path / "prefix.kv")
        reader = load_with("u8")
        with pytest.warns(ModelWarning):
            reader.load_prefix(tmp_path / "prefix.kv").save(tmp_path / "prefix.kv")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_with("u8").load_prefix(tmp_path / "prefix.kv")


# -- files of format 1 -------------------------------------------------------------------------------------------------


def version_1(saved: snapshot.Snapshot, info: ov_phi3.ModelInfo) -> bytes:
    """The bytes that the first format had for a snapshot, with keys and values of any numbers.

    It held one tensor of shape [kv_heads, tokens, head_dim] for the keys and one for the values of each layer.
    """
    tokens = len(saved.entry.ids)
    conversation = b"" if saved.conversation is None else json.dumps(saved.conversation).encode()
    shape = [info.num_kv_heads, tokens, info.head_dim]
    draw = np.random.default_rng(6)
    names = [f"past_key_values.{layer}.{part}" for layer in range(info.num_layers) for part in ("key", "value")]
    tensors: list[tuple[str, str, list[int], bytes]] = [
        ("token_ids", "I64", [len(saved.ids)], saved.ids.astype("<i8").tobytes()),
        *((name, "F32", shape, draw.normal(size=shape).astype("<f4").tobytes()) for name in names),
    ]
    checksums = [zlib.crc32(data) for *_, data in tensors]
    tensors.append(
        ("checksums", "U32", [len(names) + 2], np.array([*checksums, zlib.crc32(conversation)], "<u4").tobytes())
    )
    tensors.append(("conversation", "U8", [len(conversation)], conversation))
    sizes = {"version": 1, "ids": len(saved.ids), "tokens": tokens, "layers": info.num_layers}
    sizes |= {"kv_heads": info.num_kv_heads, "head_dim": info.head_dim, "conversation_bytes": len(conversation)}
    metadata: Mapping[str, str] = {
        "format": "ov_phi3-kv",
        **{name: str(size) for name, size in sizes.items()},
        "kind": saved.kind,
        "dtype": "F32",
        "exact": "true",
        "past_boundary": "false",
        **saved.fingerprint,
    }
    header: dict[str, Any] = {"__metadata__": metadata}
    begin = 0
    for name, kind, dimensions, data in [*tensors, ("header_sha256", "U8", [32], bytes(32))]:
        header[name] = {"dtype": kind, "shape": dimensions, "data_offsets": [begin, begin + len(data)]}
        begin += len(data)
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(len(raw) + 8) % 64)
    head = len(raw).to_bytes(8, "little") + raw
    return head + b"".join(data for *_, data in tensors) + hashlib.sha256(head).digest()


def test_files_of_format_1_are_read(load_with: LoadWith, tmp_path: Path) -> None:
    """Without their keys and values: a prefix is prefilled again with a warning, a chat at its first turn."""
    pipe, ids = load_with("f32"), drawn(TOKENS, seed=4)
    pipe.prefill(ids).save(tmp_path / "prefix.kv")
    chat = pipe.chat(system="Be brief.")
    chat.send("Name a river.", max_new_tokens=30, **GREEDY)
    chat.save(tmp_path / "chat.kv")
    for name in ("prefix.kv", "chat.kv"):
        saved = snapshot.read(tmp_path / name)
        (tmp_path / name).write_bytes(version_1(saved, pipe.info))
    other = load_with("f32")
    with pytest.warns(ModelWarning, match="older format"):
        prefix = other.load_prefix(tmp_path / "prefix.kv")
    assert digest(other, ids) == digest(pipe, ids)
    reply = other.generate([*ids, 5], prefix=prefix, max_new_tokens=20, **GREEDY)
    expected = pipe.generate([*ids, 5], max_new_tokens=20, **GREEDY)
    assert (reply.metrics.reused_tokens, reply.token_ids) == (TOKENS, expected.token_ids)
    turn = other.load_chat(tmp_path / "chat.kv").send("And then?", max_new_tokens=20, **GREEDY)
    assert turn.metrics.reused_tokens == 0
    assert turn.token_ids == chat.send("And then?", max_new_tokens=20, **GREEDY).token_ids


# -- damaged files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prefix", "chat"])
def test_a_thousand_damaged_files(load_with: LoadWith, tmp_path: Path, kind: str) -> None:
    """Flipped bytes and cuts of a file give a `SnapshotError`, or the same snapshot: never another one."""
    pipe = load_with("u8")
    file = tmp_path / "saved.kv"
    if kind == "prefix":
        pipe.prefill(drawn(TOKENS, seed=5)).save(file)
    else:
        chat = pipe.chat()
        chat.send("Name a river.", max_new_tokens=30, **GREEDY)
        chat.save(file)
    raw, intact = file.read_bytes(), snapshot.read(file)
    header = 8 + int.from_bytes(raw[:8], "little")
    draw = random.Random(7)
    refused = 0
    for number in range(500):
        damaged = bytearray(raw)
        change = draw.randrange(4)
        if change == 0:
            damaged = damaged[: draw.randrange(len(raw))]
        elif change == 1:
            start = draw.randrange(len(raw))
            del damaged[start : start + draw.randrange(1, 200)]
        else:
            for _ in range(draw.randrange(1, 4)):
                at = draw.randrange(header if change == 2 else len(raw))
                damaged[at] ^= draw.randrange(1, 256)
        (tmp_path / "damaged.kv").write_bytes(damaged)
        load: Callable[[Path], object] = pipe.load_prefix if kind == "prefix" else pipe.load_chat
        try:
            read = snapshot.read(tmp_path / "damaged.kv")
        except SnapshotError:
            refused += 1
            if number % 10 == 0:
                with pytest.raises(SnapshotError):
                    load(tmp_path / "damaged.kv")
            continue
        assert bytes(damaged) == raw or same(read, intact), f"file {number}"
    assert refused > 450
