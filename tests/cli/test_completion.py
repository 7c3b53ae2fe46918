"""`ov-phi3 completion`: what the scripts offer, and that shells run them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ov_phi3.cli import build_parser, main
from ov_phi3.cli.completion import SCRIPTS, complete
from ov_phi3.cli.model_list import remember
from ov_phi3.model.info import ModelInfo


@pytest.fixture(autouse=True)
def models(demo_int4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list with one model."""
    monkeypatch.setenv("OV_PHI3_STATE", str(tmp_path / "state"))
    remember(ModelInfo.from_dir(demo_int4))


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["ge"], ["generate"]),
        (["cache", ""], ["build", "info", "verify"]),
        (["cache", "b"], ["build"]),
        (["generate", "demo"], ["demo-hf-int4"]),
        (["doctor", "demo"], ["demo-hf-int4"]),
        (["generate", "m", "--temp"], ["--temperature"]),
        (["generate", "m", "--no-do"], ["--no-do-sample"]),
        (["generate", "m", "--backend", ""], ["infer_request", "llm_pipeline"]),
        (["generate", "--backend", "llm"], ["llm_pipeline"]),
        (["chat", "m", "--overflow", "d"], ["drop_oldest"]),
        (["generate", "m", "--stop-criteria", ""], ["early", "heuristic", "never"]),
        (["generate", "--backend", "llm_pipeline", "demo"], ["demo-hf-int4"]),
        (["generate", "--json", "demo"], ["demo-hf-int4"]),
        (["generate", "--stop-on-loop", "8", "demo"], []),
        (["generate", "--stop-on-loop", "8", "4", "demo"], ["demo-hf-int4"]),
        (["generate", "m", ""], []),
        (["generate", "m", "--file", ""], []),
        (["completion", ""], ["bash", "fish", "powershell", "zsh"]),
        (["nonsense", ""], []),
        (["generate", "m", "--nonsense", ""], []),
    ],
)
def test_what_is_offered(words: list[str], offered: list[str]) -> None:
    assert complete(build_parser(), words) == offered


def test_every_command_is_offered() -> None:
    assert complete(build_parser(), [""]) == complete(build_parser(), ['""']) == sorted(build_parser().subcommands)


@pytest.mark.parametrize("shell", SCRIPTS)
def test_scripts_ask_the_program(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert "ov-phi3 __complete" in capsys.readouterr().out


def test_nothing_is_printed_where_a_file_name_comes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["__complete", "generate", "m", "--file", ""]) == 0
    assert capsys.readouterr().out == ""
    assert main(["__complete", "cache", "v"]) == 0
    assert capsys.readouterr().out == "verify\n"


def run_in(shell: str, code: str, folder: Path) -> list[str]:
    """The lines that a shell prints, with `ov-phi3` on its path."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed here")
    (folder / "ov-phi3").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ov_phi3 "$@"\n')
    (folder / "ov-phi3").chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    script = f"{SCRIPTS[shell]}\n{code}"
    done = subprocess.run([shell, "-c", script], capture_output=True, text=True, check=False, env=environment)
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes(tmp_path: Path) -> None:
    code = 'COMP_WORDS=(ov-phi3 generate m --back); COMP_CWORD=3; _ov_phi3; printf "%s\\n" "${COMPREPLY[@]}"'
    assert run_in("bash", code, tmp_path) == ["--backend"]
    code = 'COMP_WORDS=(ov-phi3 generate ""); COMP_CWORD=2; _ov_phi3; printf "%s\\n" "${COMPREPLY[@]}"'
    assert "demo-hf-int4" in run_in("bash", code, tmp_path)


def test_fish_completes(tmp_path: Path) -> None:
    assert "--backend" in run_in("fish", 'complete -C "ov-phi3 generate m --back"', tmp_path)
