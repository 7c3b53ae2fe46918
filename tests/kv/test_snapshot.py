"""Saved KV caches: what is read is what was written, or a `SnapshotError` says why not."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import Reference

import ov_phi3
from ov_phi3 import Pipeline, SnapshotError, StreamError
from ov_phi3.kv import snapshot
from ov_phi3.kv.cache import DTYPES, KVTensors, KVValue

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20}
SYSTEM = "You are a helpful assistant who keeps to the facts."


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
    value = KVValue(ids[:tokens], KVTensors(dtype, arrays), past_boundary=True)
    conversation = {"system": None, "turns": [["ä", "b", [1, 2]]]} if kind == "chat" else None
    return snapshot.Snapshot(kind, {"model": "m", "engine": "e"}, ids, value, conversation)


def same(one: snapshot.Snapshot, other: snapshot.Snapshot) -> bool:
    return (
        (one.kind, dict(one.identity), one.conversation, one.value.past_boundary)
        == (other.kind, dict(other.identity), other.conversation, other.value.past_boundary)
        and one.ids.tolist() == other.ids.tolist()
        and one.value.ids.tolist() == other.value.ids.tolist()
        and one.value.tensors.dtype == other.value.tensors.dtype
        and all(
            a.tobytes() == b.tobytes()
            for a, b in zip(one.value.tensors.arrays, other.value.tensors.arrays, strict=True)
        )
    )


class TestFile:
    @pytest.mark.parametrize("dtype", list(DTYPES))
    @pytest.mark.parametrize("kind", ["prefix", "chat"])
    def test_round_trip(self, tmp_path: Path, dtype: str, kind: str) -> None:
        path = tmp_path / "ünï cödé.kv"
        written = small(dtype, kind)
        assert snapshot.write(path, written) == path.stat().st_size
        assert same(snapshot.read(path), written)
        assert [p.name for p in tmp_path.iterdir()] == [path.name]

    def test_a_chat_without_keys(self, tmp_path: Path) -> None:
        empty = snapshot.Snapshot(
            "chat", {}, np.arange(3), KVValue(np.arange(0), KVTensors("F16", ())), {"system": None, "turns": []}
        )
        snapshot.write(tmp_path / "a.kv", empty)
        assert same(snapshot.read(tmp_path / "a.kv"), empty)

    @pytest.mark.parametrize("dtype", list(DTYPES))
    def test_other_tools_read_it(self, tmp_path: Path, dtype: str) -> None:
        """The safetensors package itself, which is strict about its format."""
        safetensors = pytest.importorskip("safetensors")
        written = small(dtype)
        snapshot.write(tmp_path / "a.kv", written)
        with safetensors.safe_open(tmp_path / "a.kv", framework="pt") as file:
            assert file.metadata()["format"] == "ov_phi3-kv"
            assert file.get_tensor("token_ids").tolist() == written.ids.tolist()
            found = file.get_tensor("past_key_values.1.value")
            assert str(found.dtype) == {"F16": "torch.float16", "BF16": "torch.bfloat16", "F32": "torch.float32"}[dtype]
            assert found.view(dtype=found.dtype).numpy(force=True).shape == (2, 5, 8) if dtype != "BF16" else True

    def test_tensors_begin_at_a_multiple_of_64(self, tmp_path: Path) -> None:
        snapshot.write(tmp_path / "a.kv", small())
        raw = (tmp_path / "a.kv").read_bytes()
        assert (8 + int.from_bytes(raw[:8], "little")) % 64 == 0

    def test_a_failed_save_leaves_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "a.kv"
        snapshot.write(path, small())
        before = path.read_bytes()

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(snapshot, "_write_tensors", full)
        with pytest.raises(SnapshotError, match=r"a\.kv cannot be written: No space left on device"):
            snapshot.write(path, small("F32"))
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["a.kv"]

    def test_a_killed_save_leaves_the_old_file(self, tmp_path: Path) -> None:
        path = tmp_path / "a.kv"
        snapshot.write(path, small())
        before = path.read_bytes()
        code = (
            "import os, sys; sys.path.insert(0, sys.argv[2]); import test_snapshot as t\n"
            "from ov_phi3.kv import snapshot\n"
            "def die(*_): os._exit(9)\n"
            "snapshot.hashlib.sha256 = die\n"
            "snapshot.write(sys.argv[1], t.small('F32'))"
        )
        done = subprocess.run([sys.executable, "-c", code, str(path), str(Path(__file__).parent)], check=False)
        assert done.returncode == 9
        assert path.read_bytes() == before
        assert same(snapshot.read(path), small())

    @pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root")
    def test_a_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        with pytest.raises(SnapshotError, match="cannot be written"):
            snapshot.write(tmp_path / "a.kv", small())

    def test_wrong_paths(self, tmp_path: Path) -> None:
        with pytest.raises(SnapshotError, match="cannot be written"):
            snapshot.write(tmp_path / "no" / "a.kv", small())
        with pytest.raises(TypeError):
            snapshot.write(5, small())  # type: ignore[arg-type]
        with pytest.raises(SnapshotError, match="does not exist"):
            snapshot.read(tmp_path / "a.kv")
        with pytest.raises(SnapshotError, match="is not a file"):
            snapshot.read(tmp_path)

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
    def test_a_pipe_does_not_hang(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(SnapshotError, match="is not a file"):
            snapshot.read(tmp_path / "pipe")


def edited(raw: bytes, change: Callable[[dict[str, Any]], None], *, sign: bool = True) -> bytes:
    """The file with another header, and with the digest that belongs to it, as a forger would write it."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    head = len(text).to_bytes(8, "little") + text
    return head + raw[8 + length : -32] + (hashlib.sha256(head).digest() if sign else raw[-32:])


def meta(**changes: str) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["__metadata__"].update(changes)


class TestDamage:
    @pytest.fixture
    def raw(self, tmp_path: Path) -> bytes:
        snapshot.write(tmp_path / "whole.kv", small("F16", "chat"))
        return (tmp_path / "whole.kv").read_bytes()

    def test_a_thousand_damaged_files(self, tmp_path: Path, raw: bytes) -> None:
        """Bits flipped, ends cut off, bytes put in or exchanged: each reads exactly, or is a SnapshotError."""
        draw = random.Random(5)
        path = tmp_path / "damaged.kv"
        wanted = small("F16", "chat")
        exact = 0
        for number in range(1000):
            kind = number % 5
            data = bytearray(raw)
            at = draw.randrange(len(data))
            if kind == 0:
                data[at] ^= 1 << draw.randrange(8)
            elif kind == 1:
                del data[at:]
            elif kind == 2:
                data[at:at] = draw.randbytes(draw.randint(1, 64))
            elif kind == 3:
                end = min(len(data), at + draw.randint(1, 500))
                data[at:end] = draw.randbytes(end - at)
            else:
                data[:16] = draw.randbytes(16)
            path.write_bytes(data)
            try:
                found = snapshot.read(path)
            except SnapshotError:
                continue
            assert same(found, wanted)
            exact += 1
        assert exact < 30  # a byte that was replaced by itself

    def test_every_single_bit_counts(self, tmp_path: Path, raw: bytes) -> None:
        path = tmp_path / "flipped.kv"
        for at in range(0, len(raw), 7):
            data = bytearray(raw)
            data[at] ^= 0x10
            path.write_bytes(data)
            with pytest.raises(SnapshotError):
                snapshot.read(path)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (meta(format="other"), "is not a snapshot"),
            (meta(version="2"), "newer format \\(2\\) than this ov_phi3 reads \\(1\\)"),
            (meta(version="-1"), "version is '-1'"),
            (meta(version="9" * 5000), "version is '9999"),
            (meta(tokens="10"), "damaged: its header"),
            (meta(tokens="99999999999"), "damaged: its header"),
            (meta(ids="1000000000"), "cut off"),
            (meta(layers="100000"), "damaged: its header"),
            (meta(layers="4000"), "cut off"),
            (meta(kv_heads="0", head_dim="0"), "longer than"),
            (meta(head_dim="1e9"), "head_dim is '1e9'"),
            (meta(dtype="F64"), "damaged: its header"),
            (meta(kind="program"), "made by something else"),
            (lambda h: h["token_ids"].update(dtype="I32"), "made by something else"),
            (lambda h: h["checksums"].update(data_offsets=[0, 8]), "made by something else"),
            (lambda h: h.update(extra={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}), "made by something else"),
            (lambda h: h.pop("conversation"), "made by something else"),
            (lambda h: h.pop("__metadata__"), "is not a snapshot"),
            (lambda h: h["__metadata__"].update(model=3), "is not a snapshot"),
            (lambda h: h.update(__metadata__=[]), "is not a snapshot"),
        ],
    )
    def test_forged_headers(self, tmp_path: Path, raw: bytes, change: Any, said: str) -> None:
        """With the right digest, so that nothing but the reader's own care stands in the way."""
        path = tmp_path / "forged.kv"
        path.write_bytes(edited(raw, change))
        with pytest.raises(SnapshotError, match=said):
            snapshot.read(path)

    def test_an_edited_header_without_its_digest(self, tmp_path: Path, raw: bytes) -> None:
        path = tmp_path / "edited.kv"
        path.write_bytes(edited(raw, meta(model="other"), sign=False))
        with pytest.raises(SnapshotError, match="damaged: its header"):
            snapshot.read(path)
        path.write_bytes(edited(raw, lambda header: None))
        assert same(snapshot.read(path), small("F16", "chat"))

    @pytest.mark.parametrize(
        "head",
        [
            b"[" * 500_000,
            b"{" + b'"a":' * 100_000,
            b'{"__metadata__":' + b"1" * 100_000 + b"}",
            b'{"__metadata__":{"format":"ov_phi3-kv","version":"1"},"x":' + b"[" * 100_000,
            b"\xff" * 1000,
            b"",
        ],
    )
    def test_headers_that_are_traps(self, tmp_path: Path, head: bytes) -> None:
        path = tmp_path / "trap.kv"
        path.write_bytes(len(head).to_bytes(8, "little") + head + bytes(100))
        with pytest.raises(SnapshotError, match="is not a snapshot"):
            snapshot.read(path)

    @pytest.mark.parametrize("length", [0, 1, 7, 41, 42, 100])
    def test_short_files(self, tmp_path: Path, length: int) -> None:
        (tmp_path / "short.kv").write_bytes(b"\xff" * length)
        with pytest.raises(SnapshotError, match="is not a snapshot"):
            snapshot.read(tmp_path / "short.kv")

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits address space as Linux does")
    def test_lengths_are_not_believed(self, tmp_path: Path, raw: bytes) -> None:
        """A file that tells of terabytes is refused in a process that may not have a gigabyte more."""
        for number, change in enumerate((meta(ids=str(2**39)), meta(kv_heads=str(2**20), head_dim=str(2**18)))):
            (tmp_path / f"{number}.kv").write_bytes(edited(raw, change))
        (tmp_path / "2.kv").write_bytes((2**62).to_bytes(8, "little") + raw[8:])
        code = (
            "import resource, sys; from ov_phi3 import SnapshotError, snapshot; import numpy\n"
            "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
            "resource.setrlimit(resource.RLIMIT_AS, (size + 2**26,) * 2)\n"
            "for path in sys.argv[1:]:\n"
            "    try: snapshot.read(path)\n"
            "    except SnapshotError: print('refused')\n"
        )
        paths = [str(tmp_path / f"{n}.kv") for n in range(3)]
        done = subprocess.run([sys.executable, "-c", code, *paths], check=True, capture_output=True, text=True)
        assert done.stdout.split() == ["refused"] * 3


class TestPipelines:
    """On the engine, in float32: what is loaded goes on as what was saved would have."""

    def test_chat(self, loop: Pipeline, tmp_path: Path) -> None:
        chat = loop.chat(system=SYSTEM, overflow="drop_oldest", on_cancel="drop")
        for text in ("I am Ada.", "Who am I?"):
            chat.send(text, **GREEDY)
        chat.save(tmp_path / "ada.kv")
        loaded = loop.load_chat(tmp_path / "ada.kv")
        assert loaded.messages == chat.messages
        assert loaded.token_ids.tolist() == chat.token_ids.tolist()
        assert (loaded.overflow, loaded.on_cancel, loaded.dropped_turns) == ("drop_oldest", "drop", 0)
        assert loaded.kv.cached_tokens == len(chat.token_ids) - 1
        reply = loaded.send("And now?", **GREEDY)
        assert reply.token_ids == chat.send("And now?", **GREEDY).token_ids
        loaded.rewind(3)
        assert loaded.messages == [{"role": "system", "content": SYSTEM}]

    def test_before_its_first_turn(self, loop: Pipeline, tmp_path: Path) -> None:
        loop.chat(system=SYSTEM).save(tmp_path / "new.kv")
        loaded = loop.load_chat(tmp_path / "new.kv")
        assert loaded.messages == [{"role": "system", "content": SYSTEM}]
        assert loaded.send("Hi", **GREEDY).token_ids == loop.chat(system=SYSTEM).send("Hi", **GREEDY).token_ids

    def test_what_was_pushed_out_is_computed_again(self, loop: Pipeline, tmp_path: Path) -> None:
        chat = loop.chat(system=SYSTEM)
        chat.send("Name a river.", **GREEDY)
        loop._backend.slots.close()  # type: ignore[union-attr]
        assert chat.kv.cached_tokens == 0
        chat.save(tmp_path / "a.kv")
        assert loop.load_chat(tmp_path / "a.kv").kv.cached_tokens == len(chat.token_ids) - 1

    def test_while_a_reply_comes(self, loop: Pipeline, tmp_path: Path) -> None:
        chat = loop.chat()
        with chat.stream("Tell me about the sea.", max_new_tokens=200, ignore_eos=True) as stream:
            reading = iter(stream)
            next(reading)
            with pytest.raises(StreamError, match="still coming"):
                chat.save(tmp_path / "a.kv")
        chat.save(tmp_path / "a.kv")
        assert loop.load_chat(tmp_path / "a.kv").messages == chat.messages

    def test_prefix(self, loop: Pipeline, tmp_path: Path) -> None:
        prefix = loop.prefill([{"role": "system", "content": SYSTEM}])
        size = prefix.save(tmp_path / "sys.kv")
        assert size == (tmp_path / "sys.kv").stat().st_size
        loaded = loop.load_prefix(tmp_path / "sys.kv")
        assert loaded.token_ids.tolist() == prefix.token_ids.tolist()
        assert loaded.exact
        wanted = loop.generate("Hi", prefix=prefix, **GREEDY)
        assert loop.generate("Hi", prefix=loaded, **GREEDY).token_ids == wanted.token_ids
        # Saved again over the file that it lies in.
        loaded.save(tmp_path / "sys.kv")
        assert loop.generate("Hi", prefix=loaded, **GREEDY).token_ids == wanted.token_ids

    def test_the_other_kind(self, loop: Pipeline, tmp_path: Path) -> None:
        loop.prefill([5, 6, 7]).save(tmp_path / "p.kv")
        loop.chat().save(tmp_path / "c.kv")
        with pytest.raises(SnapshotError, match=r"holds a prefix, not a chat; load it with load_prefix\(\)"):
            loop.load_chat(tmp_path / "p.kv")
        with pytest.raises(SnapshotError, match=r"holds a chat, not a prefix; load it with load_chat\(\)"):
            loop.load_prefix(tmp_path / "c.kv")

    def test_another_model(self, loop: Pipeline, tiny_loop: Pipeline, tmp_path: Path) -> None:
        loop.prefill([5, 6, 7]).save(tmp_path / "p.kv")
        with pytest.raises(SnapshotError, match="is of another model: model is '.*' there and '.*' here"):
            tiny_loop.load_prefix(tmp_path / "p.kv")

    @pytest.mark.parametrize(
        ("key", "said"),
        [
            ("recipe", "another export"),
            ("tokenizer", "another tokenizer"),
            ("template", "another chat layout"),
            ("rope", "another RoPE regime"),
            ("engine", "another OpenVINO release"),
        ],
    )
    def test_each_part_of_the_fingerprint(self, tiny_loop: Pipeline, tmp_path: Path, key: str, said: str) -> None:
        path = tmp_path / "p.kv"
        tiny_loop.prefill([5, 6, 7]).save(path)
        path.write_bytes(edited(path.read_bytes(), meta(**{key: "x"})))
        with pytest.raises(SnapshotError, match=said):
            tiny_loop.load_prefix(path)

    def test_a_chat_outlives_a_release(self, tiny_loop: Pipeline, tmp_path: Path) -> None:
        """Its keys are of no use to another OpenVINO release, but the conversation is."""
        path = tmp_path / "c.kv"
        chat = tiny_loop.chat()
        chat.send("Hi", max_new_tokens=3)
        chat.save(path)
        path.write_bytes(edited(path.read_bytes(), meta(engine="openvino 2030.1")))
        loaded = tiny_loop.load_chat(path)
        assert loaded._kv is None
        assert loaded.messages == chat.messages

    def test_on_the_other_backend(self, tiny_loop: Pipeline, tiny_pipe: Pipeline, tmp_path: Path) -> None:
        """Conversations go from one backend to the other, without their keys."""
        chat = tiny_pipe.chat(system="Be brief.")
        chat.send("Hi", max_new_tokens=3, ignore_eos=True)
        chat.save(tmp_path / "a.kv")
        loaded = tiny_loop.load_chat(tmp_path / "a.kv")
        assert loaded.token_ids.tolist() == chat.token_ids.tolist()
        wanted = chat.send("More", ignore_eos=True, **GREEDY).token_ids
        assert loaded.send("More", ignore_eos=True, **GREEDY).token_ids == wanted
        loaded.save(tmp_path / "b.kv")
        back = tiny_pipe.load_chat(tmp_path / "b.kv")
        assert back.messages == loaded.messages

    @pytest.mark.parametrize(
        "change",
        [
            lambda c: c.update(turns=5),
            lambda c: c["turns"][0].__setitem__(2, [10**9]),
            lambda c: c["turns"][0].__setitem__(2, []),
            lambda c: c["turns"][0].__setitem__(1, 5),
            lambda c: c["turns"][0].__setitem__(0, "Something else"),
            lambda c: c.update(overflow="explode"),
            lambda c: c.update(system=7),
            lambda c: c.pop("dropped"),
        ],
    )
    def test_forged_conversations(self, tiny_loop: Pipeline, tmp_path: Path, change: Any) -> None:
        chat = tiny_loop.chat()
        chat.send("Hi", max_new_tokens=3, ignore_eos=True)
        chat.save(tmp_path / "a.kv")
        found = snapshot.read(tmp_path / "a.kv")
        conversation = json.loads(json.dumps(found.conversation))
        change(conversation)
        forged = snapshot.Snapshot("chat", found.identity, found.ids, found.value, conversation)
        snapshot.write(tmp_path / "b.kv", forged)
        with pytest.raises(SnapshotError, match="damaged"):
            tiny_loop.load_chat(tmp_path / "b.kv")

    def test_ids_and_shapes_of_something_else(self, tiny_loop: Pipeline, tmp_path: Path) -> None:
        identity = tiny_loop._identity
        for name, forged in (
            ("shape", snapshot.Snapshot("prefix", identity, small().ids, small().value)),
            (
                "ids",
                snapshot.Snapshot("prefix", identity, np.array([10**7]), KVValue(np.arange(0), KVTensors("F16", ()))),
            ),
        ):
            snapshot.write(tmp_path / name, forged)
            with pytest.raises(SnapshotError, match="damaged"):
                tiny_loop.load_prefix(tmp_path / name)

    def test_no_room_in_the_window(self, tiny_loop: Pipeline, tiny_fp32: Path, device: str, tmp_path: Path) -> None:
        tiny_loop.prefill(list(range(300, 400))).save(tmp_path / "p.kv")
        with (
            ov_phi3.load(tiny_fp32, device=device, backend="infer_request", context_length=64) as pipe,
            pytest.raises(SnapshotError, match="100 tokens, which leaves no room.*longer context_length"),
        ):
            pipe.load_prefix(tmp_path / "p.kv")


@pytest.mark.parametrize("precision", ["f16", "u8", "f32"])
def test_precisions(demo_int4: Path, device: str, tmp_path: Path, precision: str) -> None:
    """What the engine holds is what is saved, at two bytes a value or four; integers are the one exception."""
    config = {"KV_CACHE_PRECISION": precision}
    with ov_phi3.load(demo_int4, device=device, backend="infer_request", ov_config=config) as pipe:
        prefix = pipe.prefill([{"role": "system", "content": SYSTEM}])
        size = prefix.save(tmp_path / "p.kv")
        loaded = pipe.load_prefix(tmp_path / "p.kv")
        assert loaded.exact == prefix.exact == (precision != "u8")
        exactly = 4 if prefix.dtype == "F32" else 2
        assert (prefix.dtype == "F32") == (precision == "f32")
        assert abs(size - len(prefix) * pipe.info.kv_bytes_per_token_for(8 * exactly)) < 32_000
        first = pipe.generate("Who are you?", prefix=loaded, **GREEDY).token_ids
        assert pipe.generate("Who are you?", prefix=prefix, **GREEDY).token_ids == first


def test_on_both_sides_of_the_longrope_boundary(longrope: tuple[Path, Path, int], device: str, tmp_path: Path) -> None:
    boundary = longrope[2]
    reference = Reference(longrope[1], boundary)
    ids = np.random.default_rng(3).integers(300, 31_000, 3 * boundary).tolist()
    options = {**GREEDY, "ignore_eos": True}
    with ov_phi3.load(longrope[0], device=device, backend="infer_request") as pipe:
        for length in (boundary - 10, boundary + 7):
            pipe.prefill(ids[:length]).save(tmp_path / f"{length}.kv")
        chat = pipe.chat()
        while len(chat.token_ids) < boundary:
            chat.send("More of it.", **options)
        chat.save(tmp_path / "chat.kv")
        wanted = chat.send("And on.", **options)
    with ov_phi3.load(longrope[0], device=device, backend="infer_request") as pipe:
        for length, more in ((boundary - 10, 5), (boundary + 7, 5), (boundary - 10, 30)):
            prefix = pipe.load_prefix(tmp_path / f"{length}.kv")
            assert prefix._value.past_boundary == (length > boundary)
            prompt = ids[: length + more]
            reply = pipe.generate(prompt, prefix=prefix, **options)
            assert reference.differences(prompt, reply.token_ids) == []
        loaded = pipe.load_chat(tmp_path / "chat.kv")
        reply = loaded.send("And on.", **options)
        assert reply.token_ids == wanted.token_ids
        assert reference.differences(reply.prompt_token_ids, reply.token_ids) == []
        assert reply.metrics.reused_tokens


CHILD = """
import json, sys
import ov_phi3
model, device, folder = sys.argv[1:4]
pipe = ov_phi3.load(model, device=device, backend="infer_request")
out = {}
for number in map(int, sys.argv[4:]):
    chat = pipe.load_chat(f"{folder}/{number}.kv")
    cached = chat.kv.cached_tokens
    reply = chat.send("And then?", do_sample=False, max_new_tokens=12)
    out[number] = [cached, reply.metrics.reused_tokens, reply.token_ids]
print(json.dumps(out))
"""


def conversations(pipe: Pipeline, draw: random.Random, count: int) -> Iterator[tuple[int, Any]]:
    """Chats of 1 to 1,500 tokens, some of them forked or rewound."""
    words = [
        "the sea",
        "a fox",
        "bread",
        "rain",
        "a long road",
        "seven stones",
        "my brother",
        "the moon",
        "old books",
        "green tea",
    ]
    for number in range(count):
        target = int(1500 ** draw.uniform(0, 1))
        chat = pipe.chat(
            system=None if number % 3 else " ".join(draw.choice(words) for _ in range(draw.randint(1, 30)))
        )
        while len(chat.token_ids) < target:
            room = target - len(chat.token_ids)
            text = " ".join(draw.choice(words) for _ in range(max(1, min(room // 3, draw.choice([3, 40, 200])))))
            chat.send(text, max_new_tokens=draw.randint(1, 10), temperature=1.0, ignore_eos=bool(number % 2))
        if number % 5 == 1 and len(chat.messages) > 3:
            chat.rewind()
        if number % 5 == 2:
            other = chat.fork()
            other.send("Something else.", max_new_tokens=3)
            chat = other if number % 2 else chat
        yield number, chat


def test_fifty_conversations_in_another_process(loop: Pipeline, demo_fp32: Path, device: str, tmp_path: Path) -> None:
    """Saved here, loaded there: the ids that come next are those of the conversation that was not interrupted."""
    wanted = {}
    lengths = []
    for number, chat in conversations(loop, random.Random(50), 50):
        chat.save(tmp_path / f"{number}.kv")
        lengths.append(len(chat.token_ids))
        reply = chat.send("And then?", do_sample=False, max_new_tokens=12)
        wanted[number] = [lengths[-1] - 1, reply.token_ids]
    assert min(lengths) < 40
    assert max(lengths) > 900
    command = [sys.executable, "-c", CHILD, str(demo_fp32), device, str(tmp_path), *map(str, wanted)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = {int(number): value for number, value in json.loads(done.stdout).items()}
    assert {number: [cached, ids] for number, (cached, _, ids) in found.items()} == wanted
    assert all(reused >= cached - 1 for cached, reused, _ in found.values())
