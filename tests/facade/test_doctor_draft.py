"""The doctor's checks of a draft model."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from doctors import INFO, machine, model, named, raising, root_of, sources

from ov_phi3.doctor import Sources, diagnose
from ov_phi3.draft_trial import DraftTrial
from ov_phi3.errors import ConfigError
from ov_phi3.system.gpu_stack import Probe


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "root"
    path.mkdir()
    return path


def draft_of(tmp_path: Path, size: int = 100) -> Path:
    folder = tmp_path / "draft"
    folder.mkdir()
    (folder / "openvino_model.bin").write_bytes(bytes(size))
    return folder


TRIAL = DraftTrial((1, 2, 3, 4), (1, 2, 3, 4), 9, 6, 2.5, 1.75, 0.6, exact=False)


def with_draft(probe: Probe, trial: Any = lambda *_: TRIAL, **changes: Any) -> Sources:
    return sources(probe, **{"read_draft": lambda *_: INFO, "draft_trial": trial, **changes})


@pytest.mark.parametrize(
    ("trial", "status", "words"),
    [
        (TRIAL, "ok", "first 4 of 4 greedy tokens are those without drafts; 6 of 9 drafts accepted"),
        (dataclasses.replace(TRIAL, drafted=(1, 2, 9, 4)), "ok", "first 2 of 4 .* usually rounding"),
        (dataclasses.replace(TRIAL, drafted=(1, 2, 9, 4), exact=True), "error", "first 2 of 4"),
        (dataclasses.replace(TRIAL, tokens_per_step=1.1), "warning", "1.10 tokens per step"),
    ],
    ids=["equal", "rounding", "float32", "never right"],
)
def test_replies_with_a_draft_model(root: Path, tmp_path: Path, trial: DraftTrial, status: str, words: str) -> None:
    calls: list[tuple[Any, ...]] = []

    def run(*arguments: Any) -> DraftTrial:
        calls.append(arguments)
        return trial

    directory, draft = model(tmp_path), draft_of(tmp_path)
    checks = diagnose(directory, "CPU", sources=with_draft(machine(root), run), draft_model=draft, draft_device="GPU.1")
    check = named(checks, "draft replies")
    assert check.status == status
    assert re.search(words, check.detail)
    assert bool(check.fix) == (status != "ok")
    assert calls == [(directory, "CPU", draft, "GPU.1")]
    assert named(checks, "draft model").status == "ok"
    assert "10% of the model's" in named(checks, "draft model").detail


def test_a_draft_model_that_cannot_be_used(root: Path, tmp_path: Path) -> None:
    """Another vocabulary, too large, too much for the memory, or without a model: nothing is loaded then."""
    unused = raising(AssertionError("must not run"))
    directory, draft = model(tmp_path), draft_of(tmp_path, 900)
    other = with_draft(machine(root), unused, read_draft=raising(ConfigError("another vocabulary than model")))
    checks = diagnose(directory, sources=other, draft_model=draft)
    assert "another vocabulary" in named(checks, "draft model").detail
    assert named(checks, "draft model").status == "error"
    assert named(checks, "draft replies").status == "skipped"
    checks = diagnose(directory, sources=with_draft(machine(root_of(root))), draft_model=draft)
    assert named(checks, "draft model").status == "warning"
    assert "90% of the model's" in named(checks, "draft model").detail
    checks = diagnose(sources=with_draft(Probe(root, "linux"), unused), draft_model=draft)
    assert named(checks, "draft model").status == named(checks, "draft replies").status == "skipped"
    checks = diagnose(directory, sources=with_draft(Probe(root, "linux"), unused), draft_device="CPU")
    assert "draft_device='CPU' is for one" in named(checks, "draft model").detail
    checks = diagnose(directory, canary=False, sources=with_draft(Probe(root, "linux"), unused), draft_model=draft)
    assert named(checks, "draft replies").status == "skipped"


def test_the_memory_has_to_hold_both_models(root: Path, tmp_path: Path) -> None:
    directory, draft = model(tmp_path, 1 << 30), draft_of(tmp_path)
    with (draft / "openvino_model.bin").open("wb") as file:
        file.truncate(1 << 30)
    probe = machine(root, gpu=False, memory_gib=3)
    assert named(diagnose(directory, sources=with_draft(probe)), "memory").status == "ok"
    check = named(diagnose(directory, sources=with_draft(probe), draft_model=draft), "memory")
    assert check.status == "warning"
    assert "weights 2.00 GiB" in check.detail


def test_the_draft_model_of_this_machine(demo_fp32: Path, demo_int4: Path, tiny_fp32: Path) -> None:
    """The real trial: in float32 the replies must be equal."""
    checks = diagnose(demo_fp32, "CPU", draft_model=demo_int4)
    assert named(checks, "draft replies").status in ("ok", "warning"), checks
    assert "the first 48 of 48 greedy tokens" in named(checks, "draft replies").detail
    assert "the same vocabulary" in named(checks, "draft model").detail
    check = named(diagnose(tiny_fp32, "CPU", draft_model=demo_int4), "draft model")
    assert check.status == "error"
    assert "another vocabulary" in check.detail
