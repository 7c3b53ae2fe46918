"""Models in the cache: names, keys, builds that are complete or absent."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import _models
import _steps

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
ROWS = SCRIPTS / "models" / "demo_rows.npy"


def test_a_mini_model_has_the_published_width_and_the_layers_of_its_name():
    model = _models.parse_model("mini4-int4")
    options = json.loads(model.options[1])
    assert (options["layers"], options["hidden_size"], options["intermediate_size"]) == (4, 3072, 8192)
    assert (options["heads"], options["sliding_window"], options["dtype"]) == (32, 2047, "float16")
    assert model.builder.name == "tiny_phi3.py"
    for wrong in ("mini-int4", "mini0-int4", "mini-1-int4", "mini4000-int4", "mini4-int5"):
        with pytest.raises(_steps.BootstrapError, match="unknown model"):
            _models.parse_model(wrong)


def test_full_size_refuses_0_layers():
    done = subprocess.run(
        [sys.executable, SCRIPTS / "full_size.py", "--layers", "0"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--layers 0: expected 1 to 999" in done.stderr


BUILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import _models, _paths, _process_lock
half = "import sys, time, pathlib; p = pathlib.Path(sys.argv[1]); p.mkdir(); (p / 'config.json').write_text('{}'); "
half += "print('held', flush=True); time.sleep(60)"
_models.run_step = lambda title, command, log, **_: __import__("subprocess").run(command)
with _process_lock.lock("model-demo-hf"):
    home = _paths.cache_dir() / "models"
    _models.build_whole("demo-hf", home / "key" / "demo-hf", lambda out: [sys.executable, "-c", half, out])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kills a process group")
def test_a_killed_build_leaves_no_model(cache: Path):
    import signal

    process = subprocess.Popen(
        [sys.executable, "-c", BUILD, str(SCRIPTS)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        os.killpg(process.pid, signal.SIGKILL)
    models = cache / "models"
    assert [path for path in models.glob("*/demo-hf") if not path.parent.name.startswith(".")] == []
    # The next build removes the leftovers, and succeeds.
    made = [sys.executable, "-c", "import sys, pathlib; pathlib.Path(sys.argv[1]).mkdir()"]
    _models.build_whole("demo-hf", models / "key" / "demo-hf", lambda out: [*made, out])
    assert [path.name for path in models.iterdir()] == ["key"]
    assert (models / "key" / "demo-hf").is_dir()


def test_a_build_that_fails_leaves_nothing(cache: Path):
    final = cache / "models" / "key" / "demo-hf"
    half = "import sys, pathlib; pathlib.Path(sys.argv[1]).mkdir(); sys.exit('no room')"
    with pytest.raises(_steps.BootstrapError, match="no room"):
        _models.build_whole("demo-hf", final, lambda out: [sys.executable, "-c", half, out])
    assert list((cache / "models").iterdir()) == []


def test_a_model_is_made_once_from_its_source(cache: Path, monkeypatch: pytest.MonkeyPatch):
    made = []

    def command(python: Path, model: _models.Model, source: Path | None, out: Path) -> list[Any]:
        made.append((model.base, model.recipe, source.name if source else None))
        return [sys.executable, "-c", "import sys, pathlib; pathlib.Path(sys.argv[1]).mkdir()", out]

    monkeypatch.setattr(_models, "model_command", command)
    first = _models.ensure_model("tiny-fp32")
    assert first.name == "tiny-fp32"
    assert made == [("tiny", None, None), ("tiny", "fp32", "tiny-hf")]
    assert _models.ensure_model("tiny-fp32") == first
    assert len(made) == 2


def test_the_key_of_a_model_follows_its_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    int4, hf = _models.parse_model("demo-int4"), _models.parse_model("demo-hf")
    keys = {_models.model_key(int4, "1"), _models.model_key(int4, "2"), _models.model_key(hf, "1")}
    assert len(keys) == 3
    assert _models.model_key(hf, "1") == _models.model_key(hf, "2")  # no exporter is involved
    assert ROWS in hf.inputs()
    assert "exporter.py" in {path.name for path in int4.inputs()} - {path.name for path in hf.inputs()}
    models = tmp_path / "models"
    shutil.copytree(SCRIPTS / "models", models, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(_models, "MODELS", models)
    assert _models.model_key(hf, "1") in keys
    with (models / "demo_rows.npy").open("ab") as file:
        file.write(b"more")
    assert _models.model_key(hf, "1") not in keys


def test_an_unknown_model_is_named():
    with pytest.raises(_steps.BootstrapError, match="demo-int3"):
        _models.parse_model("demo-int3")
