"""The README leads a newcomer to programs that run as they stand, with commands and packages that exist."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from pages import ALL_PAGES, ROOT, blocks, name_of, python_blocks

import quickstart

README = ROOT / "README.md"
SOURCES = sorted(path for folder in ("src", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py"))


def test_the_first_program_is_the_one_that_the_command_runs() -> None:
    first, *_ = python_blocks(README)
    program = (ROOT / "docs" / "examples" / "ask.py").read_text(encoding="utf-8")
    assert program.endswith(first.text)
    commands = [block.text for block in blocks(README) if block.language in ("bash", "powershell")]
    assert "python scripts/quickstart.py\n.venv/bin/python docs/examples/ask.py\n" in commands[0]
    assert "docs\\examples\\ask.py" in commands[1]


def test_the_programs_load_the_model_where_quickstart_puts_it(tmp_path: Path) -> None:
    model, link = tmp_path / "cache" / "demo", tmp_path / "model" / "demo"
    model.mkdir(parents=True)
    assert quickstart.link_model(model, link) == link
    assert link.resolve() == model
    assert quickstart.link_model(model, link) == link  # a second run
    newer = tmp_path / "cache" / "newer"
    model.rename(newer)
    assert quickstart.link_model(newer, link) == link  # the old build is gone
    assert link.resolve() == newer
    own = tmp_path / "own"
    own.mkdir()
    assert quickstart.link_model(newer, own) == newer  # a folder of the reader's is left alone
    source = (ROOT / "scripts" / "quickstart.py").read_text(encoding="utf-8")
    assert 'ROOT / "model" / "demo"' in source
    assert all("GPU" not in block.text for block in python_blocks(README)[:2])


@pytest.mark.skipif(sys.platform == "win32", reason="the path of the environment differs there")
def test_the_interpreter_of_the_first_command_is_the_one_that_quickstart_makes() -> None:
    default = re.search(r'"--venv", type=Path, default=ROOT / "(.+?)"', Path(quickstart.__file__).read_text("utf-8"))
    assert default is not None
    assert f"{default[1]}/bin/python docs/examples/ask.py" in README.read_text(encoding="utf-8")


def test_it_says_where_its_figures_come_from_and_none_is_of_a_gpu() -> None:
    text = README.read_text(encoding="utf-8")
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 1
    assert len(re.findall(r"!\[", text)) == 1
    before = text[: text.index(tables[0])]
    assert "benchmarks/compare.py" in before.rsplit("##", 1)[1]
    assert "two cores\nof a server CPU" in before
    benchmarks = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for row in tables[0].splitlines()[2:]:
        for figure in re.findall(r"\d+\.\d+", row):
            assert figure in benchmarks, row


@pytest.mark.parametrize("path", [*ALL_PAGES, *SOURCES], ids=name_of)
def test_nothing_advises_a_package_that_is_not_on_the_index(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(pip|uv|pipx) +(install|add|run) (?!--no-index)[^\n]*\bov[-_]phi3(?![-_.\w/])", text)
    assert not re.search(r"[\"' ]ov-phi3\[", text)
