"""Subprocesses and the lines of their output."""

from __future__ import annotations

from pathlib import Path

import pytest

from ov_phi3.errors import ExportError
from ov_phi3.exporting import child
from ov_phi3.exporting.child import ProgressLine


def test_lines_and_the_tail_of_the_output(tmp_path: Path) -> None:
    code = (
        r"""sys.stdout.buffer.write("a\r\nbar 1\rbar 2\r\x1b[32mgr\u00fcn\x1b[0m\n\n\xe9 last".encode()); sys.exit(7)"""
    )
    lines: list[ProgressLine] = []
    code, output = child.run(child.bootstrap(code, tmp_path / "x"), child.child_environment(tmp_path), lines.append)
    assert code == 7
    assert [(str(line), line.transient) for line in lines] == [
        ("a", False),
        ("bar 1", True),
        ("bar 2", True),
        ("grün", False),
        ("é last", False),
    ]
    assert output == ["a", "grün", "é last"]


def test_a_command_that_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be started"):
        child.run([str(tmp_path / "nothing")], {}, print)
