"""The least number of steps with drafts of prompt lookup."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("prompt", "reply", "steps"),
    [
        ([5], [1, 2, 3], 3),  # nothing repeats
        ([1, 2, 3, 4], [1, 2, 3, 4], 2),  # 1 is not foreseen; then 2, 3 and 4 are
        ([1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 9, 5, 6], 3),  # 1; 2, 3 and the 9 in place of 4; 5 and 6
        ([1, 2, *range(10, 50)], [2, *range(10, 50)], 4),  # at most 15 drafts a step: 1 + 16 + 16 + 8 tokens
    ],
)
def test_steps(monkeypatch: pytest.MonkeyPatch, prompt: list[int], reply: list[int], steps: int) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    least = importlib.import_module("_speculation_bound").least_steps_per_token
    assert least(prompt, reply) == steps / len(reply)
