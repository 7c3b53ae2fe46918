"""Latency figures from timestamps."""

from typing import Any

import pytest

from ov_phi3 import Metrics


def metrics(**stamps: Any) -> Metrics:
    defaults: dict[str, Any] = {
        "requested": 10.0,
        "started": 10.5,
        "tokens": [11.0, 11.25, 11.5],
        "first_text": 11.25,
        "ended": 12.0,
        "prompt_tokens": 4,
    }
    return Metrics.from_stamps(**{**defaults, **stamps})


def test_times_count_from_the_request() -> None:
    figures = metrics()
    assert (figures.ttft_ms, figures.first_text_ms, figures.total_ms) == (1000.0, 1250.0, 2000.0)
    assert figures.token_times_ms == (1000.0, 1250.0, 1500.0)
    assert figures.inter_token_ms == (250.0, 250.0)
    assert (figures.tpot_ms, figures.tokens_per_second) == (250.0, 4.0)


@pytest.mark.parametrize(
    ("stamps", "queue_ms"),
    [
        ({}, 500.0),
        ({"queued": 10.25}, 250.0),
        ({"queued": 10.5}, 0.0),
        ({"queued": 10.25, "started": None, "tokens": [], "first_text": None}, 1750.0),
        ({"started": None, "tokens": [], "first_text": None}, 2000.0),
    ],
)
def test_queue_time_is_waiting_only(stamps: dict[str, Any], queue_ms: float) -> None:
    figures = metrics(**stamps)
    assert figures.queue_ms == queue_ms
    assert figures.ttft_ms == (None if stamps.get("tokens") == [] else 1000.0)


def test_a_reply_without_gaps_has_no_time_per_token() -> None:
    assert metrics(tokens=[11.0]).tpot_ms is None
    assert metrics(tokens=[11.0, 11.0]).tpot_ms is None
    assert metrics(tokens=[], first_text=None).ttft_ms is None
