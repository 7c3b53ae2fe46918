"""The sliding window of Phi-3-mini-4k: past 2047 tokens each one attends to the last 2047 only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from reference import Reference

import ov_phi3
from ov_phi3 import ModelInfo, Pipeline

WINDOW = 2047


@pytest.fixture(scope="module")
def reference(sliding: tuple[Path, Path]) -> Reference:
    return Reference(sliding[1])


@pytest.fixture(scope="module", params=["PA", "SDPA"])
def subject(request: pytest.FixtureRequest, sliding: tuple[Path, Path], device: str) -> Iterator[Pipeline]:
    config = {"ATTENTION_BACKEND": request.param}
    with ov_phi3.load(sliding[0], device=device, ov_config=config, prefill_chunk=512) as pipe:
        yield pipe


def drawn(count: int) -> list[int]:
    return np.random.default_rng(4).integers(300, 31_000, count).tolist()


def test_the_model_has_the_window(sliding: tuple[Path, Path]) -> None:
    assert ModelInfo.from_dir(sliding[0]).sliding_window == WINDOW
    assert ModelInfo.from_dir(sliding[0]).rope_boundary is None


@pytest.mark.parametrize("length", [WINDOW - 20, WINDOW + 1, WINDOW + 1000])
def test_past_the_window(subject: Pipeline, reference: Reference, length: int) -> None:
    prompt = drawn(length)
    reply = subject.generate(prompt, max_new_tokens=40, ignore_eos=True, do_sample=False)
    assert reference.differences(prompt, reply.token_ids) == []


def test_a_chat_that_leaves_its_beginning_behind(subject: Pipeline, reference: Reference) -> None:
    """Blocks that have left the window are found again when the same beginning comes."""
    chat = subject.chat(system="word " * (WINDOW - 100))
    for number in range(4):
        result = chat.send(f"Tell me about {number}.", max_new_tokens=30, ignore_eos=True, do_sample=False)
        assert reference.differences(result.prompt_token_ids, result.token_ids) == []
    assert len(chat.token_ids) > WINDOW
    chat.rewind(3)
    result = chat.send("And now?", max_new_tokens=20, ignore_eos=True, do_sample=False)
    assert reference.differences(result.prompt_token_ids, result.token_ids) == []


def test_without_the_window_it_would_be_another_reply(sliding: tuple[Path, Path], tmp_path: Path) -> None:
    """The check can fail: the same weights without the window say something else."""
    path = tmp_path / "model"
    path.mkdir()
    for file in sliding[1].iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    (path / "config.json").write_text(json.dumps({**config, "sliding_window": None}), encoding="utf-8")
    prompt = drawn(WINDOW + 1000)
    with ov_phi3.load(sliding[0], device="CPU") as pipe:
        reply = pipe.generate(prompt, max_new_tokens=40, ignore_eos=True, do_sample=False)
    assert len(Reference(path).differences(prompt, reply.token_ids)) > 5
