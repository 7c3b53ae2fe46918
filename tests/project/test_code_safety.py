"""No module of the library runs code that it reads; no script names a host."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import _paths
import ov_phi3

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SOURCE = SCRIPTS.parent / "src" / "ov_phi3"

UNSAFE_MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "code"}
CALLS = {"eval", "exec", "__import__"}
ATTRIBUTES = {("torch", "load"), ("os", "system"), ("os", "popen"), ("yaml", "load"), ("yaml", "unsafe_load")}


def hazards(source: str) -> list[str]:
    """Return the names in a module that can run foreign code."""
    hits = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            hits += [a.name for a in node.names if (node.module, a.name) in ATTRIBUTES or a.name in CALLS]
        elif isinstance(node, ast.Name) and node.id in CALLS:
            hits.append(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            pair = (node.value.id, node.attr)
            hits += [".".join(pair)] if pair in ATTRIBUTES or (pair[0] == "builtins" and pair[1] in CALLS) else []
        elif isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "shell", "trust_remote_code"):
            harmless = isinstance(node.value, ast.Constant) and node.value.value is False
            passed_on = node.arg == "trust_remote_code" and not isinstance(node.value, ast.Constant)
            hits += [] if harmless or passed_on else [f"{node.arg}={ast.unparse(node.value)}"]
        hits += [name for name in names if name.partition(".")[0] in UNSAFE_MODULES]
    return hits


MODULES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_no_module_runs_code_that_it_reads(module: Path):
    assert hazards(module.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    import pickle",
        "from marshal import loads",
        "import concurrent, shelve",
        "x = eval('1')",
        "run = exec",
        "import builtins\nbuiltins.exec('1')",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "import numpy\nnumpy.load('x', allow_pickle=True)",
        "import subprocess\nsubprocess.run('x', shell=True)",
        "f(trust_remote_code=True)",
    ],
)
def test_unsafe_code_is_detected(source: str):
    assert hazards(source) != []
    assert hazards("import re, numpy\nre.compile('x')\nnumpy.load('x', allow_pickle=False)\nf(shell=False)") == []


def test_only_the_export_can_trust_code_of_a_model():
    users = {path.relative_to(SOURCE).as_posix() for path in MODULES if "trust_remote_code" in path.read_text("utf-8")}
    assert {name for name in users if not name.startswith("exporting/")} == {"cli/tools.py"}
    assert "exporting/exporter.py" in users
    assert inspect.signature(ov_phi3.export).parameters["trust_remote_code"].default is False


def test_no_file_of_scripts_names_a_host():
    paths = [path for path in SCRIPTS.rglob("*") if path.suffix in (".py", ".txt", ".json", ".lock", ".in", ".toml")]
    assert _paths.LOCK in paths
    assert [path for path in paths if re.search(r"://|pypi\.org|pythonhosted", path.read_text(encoding="utf-8"))] == []
