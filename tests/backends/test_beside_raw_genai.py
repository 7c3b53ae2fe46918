"""Faults of raw `openvino_genai.LLMPipeline`, and the behaviour of `ov_phi3` in the same situations.

Each half of a row runs in a process of its own, so that an abort is an exit status. Every process of `ov_phi3` must
answer a known question afterwards like a fresh one.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from exporter import needs_exporter
from processes import run
from raw_genai_rows import (
    ASK,
    CONTROL_TOKENS,
    GROUP_SIZE,
    NO_LENGTH,
    NO_OPENCL,
    ODD_TOKENIZER,
    OURS,
    OUTSIDE,
    RAW,
    STREAMER,
    SURROGATE,
    THREADS,
    TOO_LONG,
    UNKNOWN_OPTION,
    Row,
)


def has_opencl() -> bool:
    with contextlib.suppress(OSError):
        return bool(ctypes.CDLL("libOpenCL.so.1"))
    return False


needs_no_opencl = pytest.mark.skipif(
    sys.platform != "linux" or has_opencl(), reason="only Linux without the OpenCL loader"
)

ROWS = pytest.mark.parametrize(
    "row",
    [
        pytest.param(STREAMER, id="exception in a streamer"),
        pytest.param(THREADS, id="two threads"),
        pytest.param(UNKNOWN_OPTION, id="unknown option"),
        pytest.param(NO_LENGTH, id="no max_new_tokens"),
        pytest.param(TOO_LONG, id="prompt longer than the window"),
        pytest.param(OUTSIDE, id="token id outside the vocabulary"),
        pytest.param(CONTROL_TOKENS, id="control tokens in user text"),
        pytest.param(SURROGATE, id="lone surrogate"),
        pytest.param(NO_OPENCL, id="GPU.0 without OpenCL", marks=needs_no_opencl),
    ],
)


EXPORTS = pytest.mark.parametrize(
    ("row", "source"),
    [
        pytest.param(ODD_TOKENIZER, "odd_hf", id="tokenizer that cannot be converted"),
        pytest.param(GROUP_SIZE, "tiny_hf", id="group size that does not divide"),
    ],
)


def check(done: subprocess.CompletedProcess[str], expected: Sequence[str], status: int = 0, why: str = "{}") -> None:
    lines = done.stdout.splitlines()
    as_expected = (done.returncode, len(lines)) == (status, len(expected)) and all(map(re.match, expected, lines))
    assert as_expected, why.format(f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}")


@dataclass(frozen=True)
class Place:
    """Where a row is tried: the arguments of its programs."""

    model: Path
    device: str
    backend: str = "llm_pipeline"

    def run(self, program: str, source: Path | str = "", output: Path | str = "") -> subprocess.CompletedProcess[str]:
        return run(program, self.model, self.device, self.backend, source, output)


def check_raw(place: Place, row: Row, *paths: Path) -> None:
    done = place.run(RAW + row.raw, *paths)
    check(done, row.raw_says, row.raw_status, "raw GenAI changed: {}; see whether our guard is still needed")


@functools.cache
def fresh_answer(place: Place) -> str:
    done = place.run(OURS + ASK)
    assert len(json.loads(done.stdout)) == 8, done.stderr
    return re.escape(done.stdout.strip()) + "$"


def check_ours(place: Place, row: Row, *paths: Path) -> None:
    done = place.run(OURS + row.ours + ASK, *paths)
    check(done, [*row.ours_says, fresh_answer(place)])
    assert done.stderr == ""


@pytest.fixture
def place(tiny_fp32: Path, device: str) -> Place:
    return Place(tiny_fp32, device)


@pytest.fixture(scope="module")
def odd_hf(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer transformers loads, and OpenVINO Tokenizers has no operation for."""
    source = tmp_path_factory.mktemp("odd") / "hf"
    shutil.copytree(tiny_hf, source)
    file = source / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**tokenizer, "pre_tokenizer": {"type": "UnicodeScripts"}}), encoding="utf-8")
    return source


@ROWS
def test_raw(row: Row, place: Place) -> None:
    if row.raw_status < 0 and os.name == "nt":
        pytest.skip("an exit status tells the signal on POSIX only")
    check_raw(place, row)


@ROWS
@pytest.mark.parametrize("backend", ["llm_pipeline", "infer_request"])
def test_ours(row: Row, place: Place, backend: str) -> None:
    check_ours(replace(place, backend=backend), row)


@needs_exporter
@EXPORTS
def test_raw_export(row: Row, source: str, place: Place, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    check_raw(place, row, request.getfixturevalue(source), tmp_path / "out")


@needs_exporter
@EXPORTS
def test_our_export(row: Row, source: str, place: Place, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    check_ours(place, row, request.getfixturevalue(source), tmp_path / "out")
