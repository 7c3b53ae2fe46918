"""Small machines: reduced OpenVINO packages, read-only file systems, memory, and `scripts/edge.py`."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import run

ROOT = Path(__file__).resolve().parents[2]

ANSWER = """
import sys
import ov_phi3

with ov_phi3.load(sys.argv[1], device="CPU", backend=sys.argv[2]) as pipe:
    print(len(pipe.generate("Hello", max_new_tokens=3, ignore_eos=True).token_ids))
"""


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


@pytest.mark.skipif(sys.platform != "linux", reason="the files have these names on Linux")
@pytest.mark.parametrize("backend", ["llm_pipeline", "infer_request"])
def test_openvino_without_its_files_for_other_devices_and_formats(
    tiny_fp32: Path, tmp_path: Path, backend: str
) -> None:
    spec = importlib.util.find_spec("openvino")
    assert spec is not None
    assert spec.origin is not None
    copy = tmp_path / "openvino"
    shutil.copytree(Path(spec.origin).parent, copy, copy_function=_link)
    libraries = copy / "libs"
    unused = [libraries / name for name in ("libopenvino_intel_gpu_plugin.so", "cache.json")]
    unused.append(libraries / "libopenvino_intel_npu_plugin.so")
    unused += [p for p in libraries.glob("libopenvino_*_frontend.so.*") if "_ir_" not in p.name]
    assert sum(path.stat().st_size for path in unused) > 75e6
    for path in unused:
        path.unlink()
    command = [sys.executable, "-c", ANSWER, tiny_fp32, backend]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr


READ_ONLY = "mount --make-rprivate / && mount -o remount,bind,ro / && if touch {probe} 2>/dev/null; then exit 77; fi; "


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("unshare"), reason="needs mount namespaces")
@pytest.mark.parametrize("backend", ["llm_pipeline", "infer_request"])
def test_generation_on_a_read_only_file_system(tiny_fp32: Path, tmp_path: Path, backend: str) -> None:
    program = tmp_path / "answer.py"
    program.write_text(ANSWER)
    script = READ_ONLY.format(probe=tmp_path / "probe") + 'exec "$@"'
    inside = ["unshare", "--mount", "sh", "-c", script, "sh"]
    environment = {key: value for key, value in os.environ.items() if key not in ("HOME", "TMPDIR", "XDG_CACHE_HOME")}
    if subprocess.run([*inside, "true"], capture_output=True, check=False).returncode:
        pytest.skip("mount namespaces are not permitted here")
    command = [*inside, sys.executable, program, tiny_fp32, backend]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**environment, "HOME": "/nowhere"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")


KERNELS = """
import sys
import ov_phi3
from ov_phi3.system.memory import resident_memory_bytes

with ov_phi3.load(sys.argv[1], device="CPU", context_length=512) as pipe:
    options = {"do_sample": False, "ignore_eos": True, "max_new_tokens": 2}
    pipe.generate([1000] * 500, **options)
    before = resident_memory_bytes()
    for length in range(1, 121):
        pipe.generate([1000 + length] * length, **options)
    print(resident_memory_bytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_prompts_of_many_lengths_keep_little_memory(tiny_fp32: Path) -> None:
    left = int(run(KERNELS, tiny_fp32).stdout)
    # 70 MiB if all kernels are kept, 28 MiB with 32 kernels.
    assert left < 45 * 2**20


class TestScript:
    """`scripts/edge.py` without its environments, which take minutes to make."""

    def test_every_stack_replies(self, demo_int4: Path, device: str) -> None:
        for stack in ("ov_phi3", "own_loop", "openvino_genai"):
            command = [sys.executable, ROOT / "scripts" / "edge_stacks.py", stack, demo_int4, device]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            first, last = done.stdout.splitlines()
            report = json.loads(last)
            assert (first, report["tokens"]) == ("first", 64)
            if sys.platform == "linux":
                assert report["memory"]["steady"] <= report["memory"]["peak"]

    def test_sizes_and_exceeded_limits(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.syspath_prepend(str(ROOT / "scripts"))
        import edge

        sizes = edge.sizes(Path(sys.executable), ["openvino-genai"])
        assert {"openvino", "openvino-genai", "openvino-tokenizers", "numpy"} <= sizes.keys()
        assert "torch" not in sizes
        assert sizes["openvino"] > 100e6
        replies = [{"first_text_s": 1.0, "tokens": 64, "memory": {"steady": 50, "peak": peak}} for peak in (100, 104)]
        samples = {
            "import_s": {"python": [0.010], "ov_phi3": [0.016], "openvino_genai": [0.2]},
            "replies": {"ov_phi3": [replies[1]], "openvino_genai": [replies[0]]},
        }
        installed = {"ov_phi3": {"numpy": 320_000_001}, "openvino_genai": {"numpy": 5}}
        figures = edge.summary(samples, installed, Path(__file__))
        edge.show(figures)
        output = capsys.readouterr().out
        assert output.count("EXCEEDED") == 3  # import, packages and memory; the wheel is this small file
        assert figures["limited"]["memory_ratio"] == 1.04
