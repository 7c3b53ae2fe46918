"""`ov_phi3.export`: a real export, and failures with optimum-cli replaced by a few lines of Python."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from exporter import needs_exporter
from hf_models import copying, nothing_left

from ov_phi3.errors import ConfigError, ExportError, ModelError
from ov_phi3.exporting import exporter, job
from ov_phi3.exporting.child import ProgressLine
from ov_phi3.exporting.exporter import export
from ov_phi3.model.info import MANIFEST, ModelInfo

# -- a real export -----------------------------------------------------------------------------------------------------


@needs_exporter
def test_a_real_export_with_its_manifest(exported: tuple[Path, list[ProgressLine]], tiny: Path) -> None:
    output, lines = exported
    info = ModelInfo.from_dir(output)
    assert info.quantization == "int4_sym, group size 128, ratio 0.6"
    assert (info.family, info.eos_token_ids, info.warnings) == ("phi3-compatible", (0, 2), ())
    assert [path.name for path in output.parent.iterdir()] == ["int4"]
    manifest = json.loads((output / MANIFEST).read_text(encoding="utf-8"))
    assert manifest == info.manifest
    assert (manifest["format"], manifest["source"], manifest["recipe"]) == (1, str(tiny), "int4")
    assert manifest["flags"]["group_size_fallback"] == "adjust"
    assert "hidden_size = 96" in manifest["group_size"]["reason"]
    assert manifest["verified"] == ["read_model", "tokenizer", "inference"]
    assert manifest["versions"].keys() >= {"ov_phi3", "optimum-intel", "nncf", "transformers", "openvino", "torch"}
    assert manifest["files"] == {p.name: p.stat().st_size for p in sorted(output.iterdir()) if p.name != MANIFEST}
    digest = hashlib.sha256((output / "openvino_tokenizer.xml").read_bytes()).hexdigest()
    assert manifest["sha256"]["openvino_tokenizer.xml"] == digest
    assert any(line.ours and "--task text-generation-with-past" in line for line in lines)
    assert any(not line.ours for line in lines)


@needs_exporter
def test_the_exporter_imports_no_heavy_package() -> None:
    code = (
        "import importlib, sys; importlib.import_module('ov_phi3.exporting.exporter')\n"
        "print({'torch', 'transformers', 'optimum', 'nncf', 'numpy', 'openvino'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_failure_gives_the_reason_the_fix_and_the_output(hf: Path, tmp_path: Path, played: Any) -> None:
    played("(OUT / 'openvino_model.xml').touch(); print('noise'); sys.exit('OSError: No space left on device')")
    with pytest.raises(ExportError) as caught:
        export(hf, tmp_path / "out")
    first, *rest = str(caught.value).splitlines()
    assert first == "optimum-cli failed (exit code 1): OSError: No space left on device. The disk is full."
    assert rest == ["  | noise", "  | OSError: No space left on device"]
    nothing_left(tmp_path, "hf")


def test_a_killed_subprocess_points_to_memory(hf: Path, tmp_path: Path, played: Any) -> None:
    played("os.kill(os.getpid(), 9)")
    with pytest.raises(ExportError, match="it was killed. Most likely memory ran out"):
        export(hf, tmp_path / "out")


def test_success_without_a_model_is_a_failure(hf: Path, tmp_path: Path, played: Any) -> None:
    played("print('all fine')")
    with pytest.raises(ExportError, match="wrote no model"):
        export(hf, tmp_path / "out")


@needs_exporter
def test_a_missing_tokenizer_is_converted(
    tiny: Path, exported: tuple[Path, list[ProgressLine]], tmp_path: Path, played: Any
) -> None:
    played(copying(exported[0], "*tokenizer.xml", "*tokenizer.bin"), verify=None)
    lines: list[ProgressLine] = []
    info = export(tiny, tmp_path / "out", progress=lines.append)
    assert info.manifest is not None
    assert "tokenizer" in info.manifest["verified"]
    assert any("convert_tokenizer" in line for line in lines)


def test_a_tokenizer_that_cannot_be_converted(
    hf: Path, tmp_path: Path, played: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    played("(OUT / 'openvino_model.xml').touch()")
    monkeypatch.setattr(job, "CONVERT_TOKENIZER", "sys.exit('no fast tokenizer')")
    with pytest.raises(ExportError, match=r"its tokenizer cannot be converted.*no fast tokenizer"):
        export(hf, tmp_path / "out")
    nothing_left(tmp_path, "hf")


def test_missing_files_are_named(hf: Path, tmp_path: Path, played: Any) -> None:
    names = ("openvino_model.xml", "openvino_tokenizer.xml", "openvino_detokenizer.xml", "config.json")
    played(f"[(OUT / name).write_text('x') for name in {names}]")
    with pytest.raises(ExportError, match=r"openvino_model.bin is missing"):
        export(hf, tmp_path / "out")


@needs_exporter
def test_a_result_that_does_not_load(
    exported: tuple[Path, list[ProgressLine]], hf: Path, tmp_path: Path, played: Any
) -> None:
    played(copying(exported[0]) + "\n(OUT / 'openvino_model.bin').write_bytes(b'x')", verify=None)
    with pytest.raises(ExportError, match="its result does not load"):
        export(hf, tmp_path / "out")
    nothing_left(tmp_path, "hf")


@needs_exporter
def test_temporary_files_stay_in_the_workspace(
    exported: tuple[Path, list[ProgressLine]], hf: Path, tmp_path: Path, played: Any
) -> None:
    played(
        copying(exported[0])
        + "\nimport tempfile; print('TMP', tempfile.mkdtemp())"
        + "\nprint('ENV', os.environ['HF_HUB_DISABLE_TELEMETRY'], sys.path.count(''), sys.argv[1:-1])"
    )
    lines: list[ProgressLine] = []
    export(hf, tmp_path / "out", "fp16", progress=lines.append, trust_remote_code=True)
    (scratch,) = [Path(line[4:]) for line in lines if line.startswith("TMP ")]
    assert scratch.is_relative_to(tmp_path)
    assert not scratch.exists()
    (line,) = [line for line in lines if line.startswith("ENV ")]
    expected = ["export", "openvino", "--model", str(hf), "--task", "text-generation-with-past"]
    assert line == f"ENV 1 0 {[*expected, '--trust-remote-code', '--weight-format', 'fp16']}"
    assert any(line.ours and "Phi-3 models need none" in line for line in lines)
    nothing_left(tmp_path, "hf", "out")


@needs_exporter
def test_overwrite_replaces_a_model_only_after_success(
    exported: tuple[Path, list[ProgressLine]], hf: Path, tmp_path: Path, played: Any
) -> None:
    played(copying(exported[0]))
    out = tmp_path / "out"
    out.mkdir()
    export(hf, out)  # an empty directory is accepted
    (out / "mine.txt").touch()
    with pytest.raises(ExportError, match="not empty; pass overwrite=True"):
        export(hf, out)
    played("sys.exit(3)")
    with pytest.raises(ExportError):
        export(hf, out, overwrite=True)
    assert ModelInfo.from_dir(out)
    assert (out / "mine.txt").exists()
    played(copying(exported[0]))
    export(hf, out, overwrite=True)
    assert not (out / "mine.txt").exists()
    nothing_left(tmp_path, "hf", "out")


def test_refused_outputs(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, played: Any) -> None:
    played("")
    (tmp_path / "file").touch()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "diary.txt").touch()
    for output, words in (
        ("file", "is a file"),
        ("home", "holds no model, but 'diary.txt'"),
        ("hf", "is, or contains, the source"),
        (".", "is, or contains, the source"),
        ("file/below", "cannot be"),
    ):
        with pytest.raises(ExportError, match=words):
            export(hf, tmp_path / output, overwrite=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ExportError, match="current directory"):
        export(hf, ".")


def test_an_exception_of_the_progress_callback_ends_the_export(hf: Path, tmp_path: Path, played: Any) -> None:
    played("print('one', flush=True); import threading; threading.Event().wait()")

    def progress(line: ProgressLine) -> None:
        if not line.ours:
            raise KeyError(line)

    with pytest.raises(KeyError, match="one"):
        export(hf, tmp_path / "out", progress=progress)
    nothing_left(tmp_path, "hf")


def test_missing_packages_are_named_with_the_command(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter.versions, "package_version", lambda name: None if name in ("nncf", "torch") else "1")
    with pytest.raises(ExportError, match=r'torch, nncf, not installed here. Fix: pip install "optimum-intel>='):
        export(hf, tmp_path / "out")
    with pytest.raises(ExportError, match="needs torch, not installed"):
        export(hf, tmp_path / "out", "fp16")


def test_wrong_arguments_are_refused_before_anything_starts(hf: Path, tmp_path: Path, played: Any) -> None:
    played("raise SystemExit('started')")
    with pytest.raises(ConfigError):
        export(hf, tmp_path / "out", group_sise=64)
    with pytest.raises(ConfigError, match="Nearest sizes that fit: 16, 32"):
        export(hf, tmp_path / "out", group_size=128)
    with pytest.raises(TypeError, match="trust_remote_code"):
        export(hf, tmp_path / "out", trust_remote_code="yes")
    nothing_left(tmp_path, "hf")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs tomllib")
def test_the_advised_packages_are_those_of_the_export_extra() -> None:
    import tomllib

    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    assert list(exporter.REQUIREMENTS) == pyproject["project"]["optional-dependencies"]["export"]


# -- killed exports ----------------------------------------------------------------------------------------------------

KILLABLE = """
import sys
from ov_phi3.exporting import exporter, job
exporter.check_installed = lambda *_, **__: None
job.OPTIMUM_CLI = '''
import threading
from pathlib import Path
out = Path(sys.argv[-1])
for name in ("openvino_model.xml", "config.json"):
    (out / name).write_text("half")
alive = open({fifo!r}, "w")
print("half written", flush=True)
threading.Event().wait()
'''
exporter.export(sys.argv[1], sys.argv[2], progress=lambda line: print(line, flush=True))
"""


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals and pipes")
@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_killed_export_leaves_nothing(hf: Path, tmp_path: Path, how: str) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    command = [sys.executable, "-c", KILLABLE.format(fifo=str(fifo)), str(hf), str(tmp_path / "out")]
    reading = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)  # a process that fails before it writes holds up nothing
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            with os.fdopen(reading) as alive:
                assert any(line == "half written\n" for line in process.stdout)
                os.set_blocking(reading, True)
                (half,) = tmp_path.glob(".out.*/model")
                with pytest.raises(ModelError, match="has not finished"):
                    ModelInfo.from_dir(half)
                process.send_signal(getattr(signal, how))
                assert alive.read() == ""  # returns when the child, which holds the other end, has ended
            process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode != 0
    nothing_left(tmp_path, "hf", "fifo")
