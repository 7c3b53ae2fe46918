"""scripts/emulated_gpu.py and the stage `emulated`: what is fetched and built, and what happens where it cannot be."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import _lockfile
import _steps
import emulated_gpu

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
HERE = Path(sys.executable)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OV_PHI3_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/test.py; its name is also that of a package of the standard library."""
    spec = importlib.util.spec_from_file_location("stages", SCRIPTS / "test.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "stages", module)
    spec.loader.exec_module(module)
    return module


def test_every_package_is_pinned_by_version_and_hash():
    packages = _lockfile.read_lock(emulated_gpu.PACKAGES)
    assert [package.name for package in packages] == ["intel-cmplr-lib-rt", "intel-opencl-rt", "tbb"]


def test_no_file_of_the_layer_names_a_host_or_a_system_folder():
    for path in emulated_gpu.SOURCES.iterdir():
        assert not re.search(r"://|/etc/|/usr/|/home/", path.read_text(encoding="utf-8")), path


def test_another_machine_than_linux_on_x86_64_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(emulated_gpu.platform, "machine", lambda: "aarch64")
    with pytest.raises(emulated_gpu.UnavailableError, match=r"Linux on x86-64, .*aarch64"):
        emulated_gpu.ensure_emulated_gpu(HERE)
    assert not cache.exists()


def test_a_missing_compiler_is_named(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(emulated_gpu, "check_machine", lambda: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(emulated_gpu.UnavailableError, match="C compiler.*cc, gcc, clang"):
        emulated_gpu.ensure_emulated_gpu(HERE)
    assert not cache.exists()


@pytest.mark.parametrize("words", ["No matching distribution found", "THESE PACKAGES DO NOT MATCH THE HASHES"])
def test_packages_may_be_out_of_reach_but_not_other_ones(
    words: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def failing(title: str, command: list[str], log: Path) -> None:
        log.write_text(words)
        raise _steps.BootstrapError(words)

    monkeypatch.setattr(emulated_gpu, "run_step", failing)
    with pytest.raises(_steps.BootstrapError, match=words) as raised:
        emulated_gpu.ensure_part("runtime", "key", lambda out: emulated_gpu.fetch_runtime(HERE, out))
    assert isinstance(raised.value, emulated_gpu.UnavailableError) is ("HASHES" not in words)
    assert list((cache / "emulated-gpu").iterdir()) == []


def test_help_needs_no_package_and_makes_nothing(cache: Path, tmp_path: Path):
    # -S -E -s: the standard library and the checkout only.
    command = [sys.executable, "-S", "-E", "-s", str(SCRIPTS / "emulated_gpu.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "OV_PHI3_EMULATED_GPUS" in done.stdout
    assert not cache.exists()


def test_a_part_is_made_once(cache: Path):
    def make(out: Path) -> None:
        (out / "file").write_text("content")

    made = emulated_gpu.ensure_part("layer", "a" * 64, make)
    assert (made / "file").read_text() == "content"
    assert emulated_gpu.ensure_part("layer", "a" * 64, lambda _: pytest.fail("made again")) == made
    assert emulated_gpu.ensure_part("layer", "b" * 64, make) != made


def test_only_the_needed_files_are_unpacked(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as wheel:
        for name in ("lib/libintelocl.so", "lib/libOpenCL.so.1", "etc/OpenCL/vendors/intel-cpu.icd", "lib/cl.cfg"):
            wheel.writestr(f"a.data/data/{name}", name)
    emulated_gpu.unpack(tmp_path / "a.whl", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["cl.cfg", "libintelocl.so"]


def test_a_child_keeps_its_own_libraries(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", "/mine")
    monkeypatch.setenv("LD_PRELOAD", "mine.so")
    monkeypatch.delenv("OV_PHI3_EMULATED_GPUS", raising=False)
    assert emulated_gpu.child_variables(Path("/runtime"), Path("/layer"), Path("/kernels")) == {
        "LD_LIBRARY_PATH": "/layer:/runtime:/mine",
        "LD_PRELOAD": "libtbb.so.12:mine.so",
        "OV_PHI3_EMULATED_KERNELS": "/kernels",
        "OV_PHI3_EMULATED_GPUS": "integrated",
    }


def test_the_layer_compiles_without_warnings(tmp_path: Path):
    try:
        emulated_gpu.check_machine()
        compiler = emulated_gpu.find_compiler()
    except emulated_gpu.UnavailableError as error:
        pytest.skip(str(error))
    command = emulated_gpu.layer_command(compiler, "runtime", tmp_path / "libOpenCL.so.1")
    done = subprocess.run([*command, "-Werror"], cwd=emulated_gpu.SOURCES, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "libOpenCL.so.1").stat().st_size > 0


@pytest.mark.parametrize(
    ("error", "result", "passes"),
    [
        (emulated_gpu.UnavailableError("needs a C compiler"), "NOT RUN: needs a C compiler", True),
        (_steps.BootstrapError("it does not build"), "FAILED: it does not build", False),
    ],
)
def test_the_stage_fails_only_on_a_fault(
    error: Exception,
    result: str,
    passes: bool,
    stages: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def no_gpu(python: Path) -> dict[str, str]:
        raise error

    monkeypatch.setattr(stages, "ensure_emulated_gpu", no_gpu)
    monkeypatch.setattr(stages, "ensure_test_environment", lambda venv: HERE)
    monkeypatch.setattr(stages, "ensure_model", lambda name, python: None)
    monkeypatch.setattr(sys, "argv", ["test.py", "--stage", "emulated"])
    assert (stages.main() == 0) is passes
    assert result in capsys.readouterr().out
