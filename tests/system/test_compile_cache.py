"""The compile cache: keys, canary records, and the three outcomes of a load."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from ov_phi3.errors import ConfigError
from ov_phi3.system.compile_cache import (
    CANARY_FILE,
    cache_key,
    check_canary,
    load_guarded,
    prepare,
    purge,
    store_canary,
)
from ov_phi3.system.devices import DeviceInfo

if TYPE_CHECKING:
    from pathlib import Path

GPU = DeviceInfo("GPU.0", "Intel(R) Arc(TM) A770 Graphics (dGPU)", "GPU", True, "32.0.101.6314", 16 << 30)
VERSIONS = {"openvino": "2026.4.1", "openvino-genai": "2026.4.1.0", "openvino-tokenizers": "2026.4.1.0"}
KEY = cache_key("abc", VERSIONS, GPU)


@dataclass
class FakeEngine:
    """Writes a blob when it compiles; a later load returns the ids in the blob."""

    directory: Path
    ids: list[int]
    compiled: int = 0
    discarded: list[list[int]] = field(default_factory=list)
    fail_on_blob: bool = False

    def compile(self) -> list[int]:
        self.compiled += 1
        blob = self.directory / "model.blob"
        if blob.exists():
            if self.fail_on_blob:
                raise RuntimeError("Exception from core.cpp:1:\nCannot import compiled blob")
            return list(json.loads(blob.read_text()))
        blob.write_text(json.dumps(self.ids))
        return list(self.ids)

    def load(self) -> tuple[list[int], str]:
        return load_guarded(self.directory, self.compile, lambda engine: engine, self.discarded.append)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return prepare(tmp_path / "cache", KEY)


def test_the_key_is_stable_and_depends_on_all_that_invalidates_a_blob() -> None:
    other_driver = dataclasses.replace(GPU, driver="32.0.101.9999")
    other_device = dataclasses.replace(GPU, full_name="Intel(R) UHD Graphics (iGPU)")
    other_name = dataclasses.replace(GPU, name="GPU.1")
    keys = [
        KEY,
        cache_key("abd", VERSIONS, GPU),
        cache_key("abc", VERSIONS | {"openvino": "2026.5.0"}, GPU),
        cache_key("abc", VERSIONS, other_driver),
        cache_key("abc", VERSIONS, other_device),
        cache_key("abc", VERSIONS, GPU, {"KV_CACHE_PRECISION": "u8"}),
    ]
    assert len(set(keys)) == len(keys)
    assert KEY.startswith("gpu-")
    # Another number of the same card, another order of versions, and the cache folder do not change the key.
    assert cache_key("abc", dict(reversed(VERSIONS.items())), GPU, {"CACHE_DIR": "/x"}) == KEY
    assert cache_key("abc", VERSIONS, other_name) == KEY


def test_prepare_creates_the_sub_folder_and_can_be_repeated(tmp_path: Path) -> None:
    first = prepare(tmp_path / "a" / "b", KEY)
    assert first.is_dir()
    assert first.name == KEY
    assert list(first.iterdir()) == []
    assert prepare(str(tmp_path / "a" / "b"), KEY) == first


def test_prepare_names_a_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"CACHE_DIR='.*file' cannot be written"):
        prepare(tmp_path / "file", KEY)


@pytest.mark.skipif(sys.platform == "win32" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_prepare_names_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot be written"):
        prepare(tmp_path / "x", KEY)


def test_prepare_names_a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ov_phi3.system.compile_cache.tempfile.TemporaryFile", refuse)
    with pytest.raises(ConfigError, match="Permission denied"):
        prepare(tmp_path, KEY)


def test_the_canary_is_recorded_and_compared(folder: Path) -> None:
    assert check_canary(folder, [1]) is None
    store_canary(folder, [1, 2, 3])
    assert check_canary(folder, [1, 2, 3]) is True
    assert check_canary(folder, [1, 2]) is False
    assert [path.name for path in folder.iterdir()] == [CANARY_FILE]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"format": 1}', '{"format": 9, "token_ids": [1]}', '{"format": 1, "token_ids": ["x"]}'],
)
def test_a_damaged_record_is_no_record(folder: Path, text: str) -> None:
    (folder / CANARY_FILE).write_text(text)
    assert check_canary(folder, [1]) is None


def test_store_canary_names_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        store_canary(tmp_path / "gone", [1])


def test_a_failed_store_leaves_the_old_record_unchanged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store_canary(folder, [1])

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(ConfigError, match="No space left"):
        store_canary(folder, [2])
    assert check_canary(folder, [1]) is True
    assert [path.name for path in folder.iterdir()] == [CANARY_FILE]


def test_purge_empties_only_compile_caches(folder: Path, tmp_path: Path) -> None:
    (folder / "a.blob").write_text("x")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "k.cl_cache").write_text("x")
    purge(folder)
    assert list(folder.iterdir()) == []
    purge(folder.with_name("cpu-" + "0" * 32))  # does not exist: nothing to do
    (tmp_path / "precious").write_text("x")
    with pytest.raises(ConfigError, match="not a compile cache"):
        purge(tmp_path)
    assert (tmp_path / "precious").exists()


def test_purge_names_a_file_that_cannot_be_deleted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "a.blob").write_text("x")

    def refuse(_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.unlink", refuse)
    with pytest.raises(ConfigError, match="delete it by hand"):
        purge(folder)


def test_the_first_load_is_fresh_and_the_second_verified(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(folder, [5, 6])
    assert engine.load() == ([5, 6], "fresh")
    assert engine.load() == ([5, 6], "verified")
    assert engine.compiled == 2
    assert engine.discarded == []
    assert caplog.records == []


def test_a_blob_that_generates_other_ids_is_purged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(folder, [5, 6])
    engine.load()
    (folder / "model.blob").write_text("[0, 0]")
    with caplog.at_level(logging.WARNING, "ov_phi3"):
        assert engine.load() == ([5, 6], "purged")
    assert engine.discarded == [[0, 0]]
    assert "generates the ids [0, 0], and [5, 6] were recorded" in caplog.text
    assert engine.load() == ([5, 6], "verified")


def test_blobs_without_a_record_are_purged_without_loading(folder: Path) -> None:
    engine = FakeEngine(folder, [5, 6])
    (folder / "model.blob").write_text("[0, 0]")  # a process that was killed before it could store its canary
    assert engine.load() == ([5, 6], "purged")
    assert engine.compiled == 1


def test_a_blob_that_does_not_load_is_purged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(folder, [5, 6])
    engine.load()
    engine.fail_on_blob = True
    assert engine.load() == ([5, 6], "purged")
    assert "Cannot import compiled blob" in caplog.text


def test_a_cached_engine_that_does_not_run_is_purged(folder: Path) -> None:
    engine = FakeEngine(folder, [5, 6])
    engine.load()
    results: list[RuntimeError | list[int]] = [[5, 6], RuntimeError("boom")]

    def canary(_: list[int]) -> list[int]:
        result = results.pop()
        if isinstance(result, Exception):
            raise result
        return result

    assert load_guarded(folder, engine.compile, canary, engine.discarded.append) == ([5, 6], "purged")
    assert engine.discarded == [[5, 6]]


def test_a_failure_without_a_cache_passes_through_and_closes_the_engine(folder: Path) -> None:
    engine = FakeEngine(folder, [5, 6])

    def broken(_: list[int]) -> list[int]:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        load_guarded(folder, engine.compile, broken, engine.discarded.append)
    assert engine.discarded == [[5, 6]]
    assert check_canary(folder, [5, 6]) is None


def test_ctrl_c_in_the_canary_closes_the_engine_and_keeps_the_cache(folder: Path) -> None:
    engine = FakeEngine(folder, [5, 6])
    engine.load()

    def interrupted(_: list[int]) -> list[int]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_guarded(folder, engine.compile, interrupted, engine.discarded.append)
    assert engine.discarded == [[5, 6]]
    assert engine.load() == ([5, 6], "verified")


def test_a_second_load_waits_until_the_first_has_recorded_its_canary(folder: Path) -> None:
    first, second = FakeEngine(folder, [5, 6]), FakeEngine(folder, [5, 6])
    compiled, go_on = threading.Event(), threading.Event()

    def slow_canary(ids: list[int]) -> list[int]:
        compiled.set()
        assert go_on.wait(30)
        return ids

    with ThreadPoolExecutor(2) as pool:
        fresh = pool.submit(load_guarded, folder, first.compile, slow_canary, first.discarded.append)
        assert compiled.wait(30)
        cached = pool.submit(second.load)
        with pytest.raises(FutureTimeout):
            cached.result(0.2)
        go_on.set()
        assert fresh.result(30) == ([5, 6], "fresh")
        assert cached.result(30) == ([5, 6], "verified")
    assert (folder / "model.blob").exists()


def test_a_cache_that_cannot_be_locked_is_used_without_a_lock(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("ov_phi3.system.compile_cache.lock_file", refuse)
    assert FakeEngine(folder, [5, 6]).load() == ([5, 6], "fresh")


def test_with_the_real_engine(folder: Path) -> None:
    """OpenVINO writes the blob for the CPU, and the second load reads it."""
    import numpy as np
    import openvino

    opset = openvino.opset13
    parameter = opset.parameter([-1, 4], openvino.Type.f32)
    weights = opset.constant([[float(i == j) for j in range(4)] for i in range(4)], openvino.Type.f32)
    model = openvino.Model([opset.matmul(parameter, weights, False, False)], [parameter], "identity")
    core = openvino.Core()

    def compile_model() -> Any:
        return core.compile_model(model, "CPU", {"CACHE_DIR": str(folder)})

    def canary(compiled: Any) -> list[int]:
        result = compiled([np.array([[1, 2, 3, 4]], np.float32)])
        return [int(value) for value in result[0].ravel()]

    discarded: list[Any] = []
    engine, status = load_guarded(folder, compile_model, canary, discarded.append)
    assert status == "fresh"
    assert list(folder.glob("*.blob"))
    del engine
    _, status = load_guarded(folder, compile_model, canary, discarded.append)
    assert status == "verified"
    store_canary(folder, [9, 9, 9, 9])
    _, status = load_guarded(folder, compile_model, canary, discarded.append)
    assert status == "purged"
    assert len(discarded) == 1
    assert check_canary(folder, [1, 2, 3, 4]) is True
