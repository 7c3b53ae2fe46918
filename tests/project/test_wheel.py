"""The wheel with its four run-time packages in a clean environment, as users have it."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUNTIME = ("openvino", "openvino-genai", "openvino-tokenizers", "numpy")


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, ROOT, cwd=out)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_only_the_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    info = f"ov_phi3-{metadata.version('ov-phi3')}.dist-info/"
    assert all(n.startswith(("ov_phi3/", info)) for n in names)
    assert {n for n in names if n.startswith("ov_phi3/") and not n.endswith(".py")} == {"ov_phi3/py.typed"}
    assert f"{info}licenses/LICENSE" in names
    assert wheel.stat().st_size < 1_000_000


def test_the_wheel_requires_exactly_four_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(next(n for n in archive.namelist() if n.endswith("METADATA"))).decode()
    requirements = [
        line.split(":")[1] for line in text.splitlines() if line.startswith("Requires-Dist") and "extra" not in line
    ]
    assert sorted(n.strip().split("<")[0].split(">")[0].split("=")[0] for n in requirements) == sorted(RUNTIME)


def test_the_wheel_streams_in_a_clean_environment(wheel: Path, tmp_path: Path, demo_int4: Path, device: str) -> None:
    home = tmp_path / "clean"
    venv.create(home, with_pip=False)
    python = home / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    # The tested versions, so that pip downloads nothing that is not in its cache.
    pins = [f"{name}=={metadata.version(name)}" for name in RUNTIME]
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", wheel, *pins, cwd=tmp_path)
    code = (
        "import sys, ov_phi3\n"
        f"with ov_phi3.load({str(demo_int4)!r}, device={device!r}) as pipe:\n"
        "    print(''.join(c.text for c in pipe.stream('What is the capital of France?')))\n"
        "print(sorted({'torch', 'transformers', 'optimum', 'nncf'} & set(sys.modules)))"
    )
    out = run(python, "-c", code, cwd=tmp_path)
    assert "Paris" in out
    assert out.splitlines()[-1] == "[]"
    command = python.with_name("ov-phi3.exe" if sys.platform == "win32" else "ov-phi3")
    assert "Paris" in run(command, "generate", demo_int4, "What is the capital of France?", cwd=tmp_path)
