"""Snapshot files: the contents that are read equal those written, or a `SnapshotError` says why not."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import snapshots
from ov_phi3 import SnapshotError
from ov_phi3.kv import snapshot
from ov_phi3.kv.entry import KVEntry
from snapshots import DTYPES, edited, meta, same, small, version_1, version_2


class TestFile:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", ["prefix", "chat"])
    def test_round_trip(self, tmp_path: Path, dtype: str, kind: str) -> None:
        path = tmp_path / "ünï cödé.kv"
        written = small(dtype, kind)
        assert snapshot.write(path, written) == path.stat().st_size
        assert same(snapshot.read(path), written)
        assert [p.name for p in tmp_path.iterdir()] == [path.name]

    def test_a_chat_without_keys(self, tmp_path: Path) -> None:
        empty = snapshot.Snapshot("chat", {}, np.arange(3), KVEntry.empty(), {"system": None, "turns": []})
        snapshot.write(tmp_path / "a.kv", empty)
        assert same(snapshot.read(tmp_path / "a.kv"), empty)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_other_tools_read_it(self, tmp_path: Path, dtype: str) -> None:
        """The safetensors package itself, which is strict about its format."""
        safetensors = pytest.importorskip("safetensors")
        written = small(dtype)
        snapshot.write(tmp_path / "a.kv", written)
        with safetensors.safe_open(tmp_path / "a.kv", framework="pt") as file:
            assert file.metadata()["format"] == "ov_phi3-kv"
            assert file.get_tensor("token_ids").tolist() == written.ids.tolist()
            tensor = file.get_tensor("past_key_values.1.value")
            assert str(tensor.dtype) == "torch.uint8"
            assert (tensor.numpy() == written.entry.tensors.arrays[3]).all()

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
            snapshot.write(path, small("f32"))
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["a.kv"]

    def test_a_killed_save_leaves_the_old_file(self, tmp_path: Path) -> None:
        path = tmp_path / "a.kv"
        snapshot.write(path, small())
        before = path.read_bytes()
        code = (
            "import os, sys; sys.path.insert(0, sys.argv[2]); import snapshots\n"
            "from ov_phi3.kv import snapshot\n"
            "def die(*_): os._exit(9)\n"
            "snapshot.hashlib.sha256 = die\n"
            "snapshot.write(sys.argv[1], snapshots.small('f32'))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(path), str(Path(snapshots.__file__).parent)], check=False
        )
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


class TestDamage:
    @pytest.fixture
    def raw(self, tmp_path: Path) -> bytes:
        snapshot.write(tmp_path / "whole.kv", small("f16", "chat"))
        return (tmp_path / "whole.kv").read_bytes()

    def test_a_thousand_damaged_files(self, tmp_path: Path, raw: bytes) -> None:
        """Bits flipped, ends cut off, bytes put in or exchanged: each reads exactly, or is a SnapshotError."""
        draw = random.Random(5)
        path = tmp_path / "damaged.kv"
        expected = small("f16", "chat")
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
                loaded = snapshot.read(path)
            except SnapshotError:
                continue
            assert same(loaded, expected)
            exact += 1
        assert exact < 30  # a byte that was replaced by itself

    def test_a_changed_byte_and_exchanged_pages_of_a_long_tensor(self, tmp_path: Path) -> None:
        path = tmp_path / "long.kv"
        snapshot.write(path, small(tokens=4000))
        whole = path.read_bytes()
        assert same(snapshot.read(path), small(tokens=4000))
        begin = whole.index(small(tokens=4000).entry.tensors.arrays[1].tobytes())
        for at in range(begin, begin + 40_000, 997):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x80]) + whole[at + 1 :])
            with pytest.raises(SnapshotError, match=r"damaged: past_key_values\.0\.value"):
                snapshot.read(path)
        one, two, rest = begin, begin + 4096, begin + 8192
        path.write_bytes(whole[:one] + whole[two:rest] + whole[one:two] + whole[rest:])
        with pytest.raises(SnapshotError, match=r"damaged: past_key_values\.0\.value"):
            snapshot.read(path)

    def test_every_single_bit_counts(self, tmp_path: Path, raw: bytes) -> None:
        path = tmp_path / "flipped.kv"
        for at in range(0, len(raw), 7):
            data = bytearray(raw)
            data[at] ^= 0x10
            path.write_bytes(data)
            with pytest.raises(SnapshotError):
                snapshot.read(path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (meta(format="other"), "is not a saved KV cache"),
            (meta(version="4"), "newer format \\(4\\) than this ov_phi3 reads \\(3\\)"),
            (meta(version="-1"), "version is '-1'"),
            (meta(version="9" * 5000), "version is '9999"),
            (meta(tokens="10"), "damaged: its header"),
            (meta(tokens="99999999999"), "damaged: its header"),
            (meta(ids="1000000000"), "cut off"),
            (meta(layers="100000"), "damaged: its header"),
            (meta(layers="4000"), "cut off"),
            (meta(key_bytes="0", value_bytes="0"), "longer than"),
            (meta(key_bytes="1e9"), "key_bytes is '1e9'"),
            (meta(version="0"), "damaged: its header"),
            (meta(blocks="1"), "damaged: its header"),
            (meta(block_size="2"), "damaged: its header"),
            (meta(kind="program"), "made by something else"),
            (lambda h: h["token_ids"].update(dtype="I32"), "made by something else"),
            (lambda h: h["checksums"].update(data_offsets=[0, 8]), "made by something else"),
            (lambda h: h.update(extra={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}), "made by something else"),
            (lambda h: h.pop("conversation"), "made by something else"),
            (lambda h: h.pop("__metadata__"), "is not a saved KV cache"),
            (lambda h: h["__metadata__"].update(model=3), "is not a saved KV cache"),
            (lambda h: h.update(__metadata__=[]), "is not a saved KV cache"),
        ],
    )
    def test_forged_headers(self, tmp_path: Path, raw: bytes, change: Any, message: str) -> None:
        """With a matching digest, so that only the reader's own checks can refuse them."""
        path = tmp_path / "forged.kv"
        path.write_bytes(edited(raw, change))
        with pytest.raises(SnapshotError, match=message):
            snapshot.read(path)

    def test_an_edited_header_without_its_digest(self, tmp_path: Path, raw: bytes) -> None:
        path = tmp_path / "edited.kv"
        path.write_bytes(edited(raw, meta(model="other"), sign=False))
        with pytest.raises(SnapshotError, match="damaged: its header"):
            snapshot.read(path)
        path.write_bytes(edited(raw, lambda header: None))
        assert same(snapshot.read(path), small("f16", "chat"))

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
    def test_hostile_headers(self, tmp_path: Path, head: bytes) -> None:
        path = tmp_path / "trap.kv"
        path.write_bytes(len(head).to_bytes(8, "little") + head + bytes(100))
        with pytest.raises(SnapshotError, match="is not a saved KV cache"):
            snapshot.read(path)

    @pytest.mark.parametrize("length", [0, 1, 7, 41, 42, 100])
    def test_short_files(self, tmp_path: Path, length: int) -> None:
        (tmp_path / "short.kv").write_bytes(b"\xff" * length)
        with pytest.raises(SnapshotError, match="is not a saved KV cache"):
            snapshot.read(tmp_path / "short.kv")

    @pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits address space as Linux does")
    def test_lengths_are_not_trusted(self, tmp_path: Path, raw: bytes) -> None:
        """A file that claims terabytes is refused in a process that may not allocate another 64 MiB."""
        for number, change in enumerate((meta(ids=str(2**39)), meta(blocks=str(2**20), key_bytes=str(2**18)))):
            (tmp_path / f"{number}.kv").write_bytes(edited(raw, change))
        (tmp_path / "2.kv").write_bytes((2**62).to_bytes(8, "little") + raw[8:])
        code = (
            "import resource, sys; from ov_phi3 import SnapshotError; from ov_phi3.kv import snapshot; import numpy\n"
            "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
            "resource.setrlimit(resource.RLIMIT_AS, (size + 2**26,) * 2)\n"
            "for path in sys.argv[1:]:\n"
            "    try: snapshot.read(path)\n"
            "    except SnapshotError: print('refused')\n"
        )
        paths = [str(tmp_path / f"{n}.kv") for n in range(3)]
        done = subprocess.run([sys.executable, "-c", code, *paths], check=True, capture_output=True, text=True)
        assert done.stdout.split() == ["refused"] * 3


class TestVersion2:
    """Files whose checksums are CRCs of whole tensors: read like new ones."""

    @pytest.mark.parametrize("kind", ["prefix", "chat"])
    def test_is_read(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "a.kv"
        snapshot.write(path, small("f16", kind, tokens=1000))
        path.write_bytes(version_2(path.read_bytes()))
        assert same(snapshot.read(path), small("f16", kind, tokens=1000))

    def test_every_single_bit_counts(self, tmp_path: Path) -> None:
        path = tmp_path / "a.kv"
        snapshot.write(path, small("f16", "chat"))
        raw = version_2(path.read_bytes())
        for at in range(0, len(raw), 7):
            path.write_bytes(raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1 :])
            with pytest.raises(SnapshotError):
                snapshot.read(path)


class TestVersion1:
    """Files of the format before that: ids and conversation are read; the keys and values have no use any more."""

    @pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
    @pytest.mark.parametrize("kind", ["prefix", "chat"])
    def test_is_read_without_keys_and_values(self, tmp_path: Path, dtype: str, kind: str) -> None:
        (tmp_path / "a.kv").write_bytes(version_1(kind, dtype))
        read = snapshot.read(tmp_path / "a.kv")
        assert (read.kind, read.ids.tolist(), dict(read.fingerprint)) == (kind, list(range(6)), {"model": "m"})
        assert read.entry.tensors.arrays == ()
        assert read.entry.tensors.layout == ""
        assert read.conversation == ({"system": None, "turns": []} if kind == "chat" else None)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (meta(dtype="F64"), "damaged: its header"),
            (meta(kv_heads="0", head_dim="0"), "longer than"),
            (meta(head_dim="1e9"), "head_dim is '1e9'"),
            (meta(kv_heads="3"), "cut off"),
        ],
    )
    def test_forged_headers(self, tmp_path: Path, change: Any, message: str) -> None:
        (tmp_path / "a.kv").write_bytes(edited(version_1(), change))
        with pytest.raises(SnapshotError, match=message):
            snapshot.read(tmp_path / "a.kv")

    def test_every_tensor_is_checked(self, tmp_path: Path) -> None:
        raw = bytearray(version_1())
        raw[-400] ^= 1
        (tmp_path / "a.kv").write_bytes(raw)
        with pytest.raises(SnapshotError, match="damaged"):
            snapshot.read(tmp_path / "a.kv")
