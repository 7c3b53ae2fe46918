"""A step with fewer decodes than the one before is filled up for a while, where a CPU would prepare all nodes again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ov_phi3.backends.paged.model_runner import ModelRunner, ScheduledTokens
from ov_phi3.backends.paged.sequence import Sequence

PROMPTS = ([1, 400, 5000, 31, 7, 900], [1, 72, 3000], [1, 15, 16, 17, 18, 19, 20, 21], [1, 600])


class Replies:
    """Greedy replies of a runner, one block each.

    Args:
        model: an exported model.
        boundary: see `ModelInfo.rope_boundary`.

    Attributes:
        passed: number of tokens of each pass, padding included.
    """

    def __init__(self, model: Path, monkeypatch: pytest.MonkeyPatch, boundary: int | None = None) -> None:
        options = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        self.runner = ModelRunner(model, "CPU", options, num_blocks=lambda *_: 8, rope_boundary=boundary)
        self.sequences = [Sequence(np.array(ids), boundary) for ids in PROMPTS]
        self.passed: list[int] = []
        real = self.runner._inputs.fill

        def fill(*args: object) -> tuple[int, int, int]:
            shapes = real(*args)  # type: ignore[arg-type]
            self.passed.append(shapes[0])
            return shapes

        monkeypatch.setattr(self.runner._inputs, "fill", fill)
        for block, sequence in enumerate(self.sequences, 1):
            sequence.blocks = [block]
            self.step(sequence)
        self.passed.clear()

    def step(self, *sequences: Sequence) -> NDArray[np.float32]:
        """Compute all uncached tokens of some sequences, and give each its next one."""
        parts = [ScheduledTokens(each, each.num_uncached, (each.num_uncached - 1,)) for each in sequences]
        logits = self.runner.run(parts).copy()
        assert len(logits) == len(sequences)
        for sequence, row in zip(sequences, logits, strict=True):
            sequence.num_cached = len(sequence)
            sequence.append([int(row.argmax())])
        return logits


def test_fewer_decodes_keep_the_number_of_rows_until_padding_costs_more(
    tiny_fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies = Replies(tiny_fp32, monkeypatch)
    for _ in range(2):
        replies.step(*replies.sequences)
    for _ in range(8):
        replies.step(*replies.sequences[:3])
    replies.step(*replies.sequences)
    replies.step(*replies.sequences[:1])
    replies.step(*replies.sequences[:2])
    replies.step(*replies.sequences[:1])
    assert replies.passed == [4, 4, *[4] * 6, 3, 3, 4, 4, 4, 1]


def test_padding_changes_no_reply(tiny_fp32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(tiny_fp32, None, monkeypatch)


def test_padding_changes_no_reply_of_a_longrope_model(
    longrope: tuple[Path, Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(longrope[0], longrope[2], monkeypatch)


def compare(model: Path, boundary: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replies one after another, and in steps of which most are filled up."""
    alone, padded = (Replies(model, monkeypatch, boundary) for _ in range(2))
    for sequence in alone.sequences:
        for _ in range(12):
            alone.step(sequence)
    for number in range(12):
        for group in (padded.sequences[: 1 + number % 3], padded.sequences[1 + number % 3 :]):
            padded.step(*group)
    assert sum(padded.passed) > sum(alone.passed)  # there was padding
    assert [each.ids.tolist() for each in padded.sequences] == [each.ids.tolist() for each in alone.sequences]


def test_a_step_of_prefill_or_behind_one_is_not_filled_up(tiny_fp32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replies = Replies(tiny_fp32, monkeypatch)
    replies.step(*replies.sequences[:2])
    late = Sequence(np.array([1, 5, 6]))
    late.blocks = [5]
    replies.step(replies.sequences[0], late)
    replies.step(replies.sequences[0])
    assert replies.passed == [2, 4, 1]
