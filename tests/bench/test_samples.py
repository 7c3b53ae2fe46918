"""Medians and cache counts of measured replies."""

from __future__ import annotations

import math
import random
from typing import Any

import ov_phi3
from ov_phi3 import Measurement, Metrics, Pipeline


def test_cached_tokens_reports_a_reused_prompt(pipe: Pipeline) -> None:
    prompt = ov_phi3.random_prompt(pipe, 100, random.Random(5))
    samples = [pipe.generate(prompt, max_new_tokens=1, ignore_eos=True).metrics for _ in range(2)]
    assert Measurement(tuple(samples), 100, 1).cached_tokens == 99


def test_the_median_without_samples_is_nan() -> None:
    assert math.isnan(Measurement((), 1, 1).ttft_ms)


def test_cached_tokens_is_none_if_one_reply_does_not_report_it() -> None:
    fields: dict[str, Any] = {
        "prompt_tokens": 1,
        "generated_tokens": 1,
        "ttft_ms": 1.0,
        "first_text_ms": 1.0,
        "tpot_ms": None,
        "total_ms": 1.0,
        "queue_ms": 0.0,
        "token_times_ms": (1.0,),
    }
    samples = (Metrics(**fields, reused_tokens=0), Metrics(**fields, reused_tokens=None))
    assert Measurement(samples, 1, 1).cached_tokens is None
