"""The limits of a request, without a model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from ov_phi3 import ConfigError, ContextOverflowError, GenerationConfig
from ov_phi3.engine.limits import Limits, seconds
from ov_phi3.engine.longrope import LongRope
from ov_phi3.kv.prefix_index import BlockLedger


def limits(window: int = 100, reason: str = "", boundary: int | None = None, **options: Any) -> Limits:
    return Limits(GenerationConfig(**options), window, reason, 1000, LongRope(boundary))


def test_every_option_is_filled_in() -> None:
    resolved = limits(temperature=0.5, do_sample=True).resolve(GenerationConfig(top_k=5), 40, streamed=True)
    assert (resolved.max_new_tokens, resolved.temperature, resolved.top_k, resolved.num_beams) == (60, 0.5, 5, 1)


@pytest.mark.parametrize(
    ("options", "prompt", "message"),
    [
        ({}, 100, "leaves no room for a reply"),
        ({"max_new_tokens": 61}, 40, "max_new_tokens is 61.*at most 60 new tokens"),
        ({"min_new_tokens": 61}, 40, "min_new_tokens is 61"),
        ({"max_length": 101}, 40, "max_length is 101"),
        ({"max_length": 40}, 40, "max_length is 40"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, int], prompt: int, message: str) -> None:
    with pytest.raises(ContextOverflowError, match=message) as caught:
        limits(reason=" (for a reason)").resolve(GenerationConfig(**options), prompt, streamed=True)
    assert "a context window of 100 tokens (for a reason)" in str(caught.value)
    assert (caught.value.prompt_tokens, caught.value.context_length) == (prompt, 100)


def test_ids_outside_of_the_vocabulary() -> None:
    for options in ({"stop_token_ids": [1000]}, {"logit_bias": {1000: 1.0}}):
        with pytest.raises(ConfigError, match="holds 1000; ids go from 0 to 999"):
            limits().resolve(GenerationConfig(**options), 4, streamed=True)


@pytest.mark.parametrize("name", ["num_beams", "num_return_sequences"])
def test_several_sequences_cannot_be_streamed(name: str) -> None:
    config = GenerationConfig(**{name: 2}, do_sample=name != "num_beams")
    with pytest.raises(ConfigError, match=f"{name}=2 cannot be streamed"):
        limits().resolve(config, 4, streamed=True)
    assert limits().resolve(config, 4, streamed=False).num_sequences == 2


def test_several_sequences_share_a_cache_of_fixed_size() -> None:
    """Without a requested length: as many whole blocks each as fit, less one that may be half full."""
    several = Limits(GenerationConfig(), 1000, "", 1000, LongRope(), BlockLedger(10, 20))
    config = GenerationConfig(num_return_sequences=3, do_sample=True)
    assert several.resolve(config, 45, streamed=False).max_new_tokens == ((20 - 5) // 3 - 1) * 10
    assert several.resolve(config.replace(max_new_tokens=500), 45, streamed=False).max_new_tokens == 500
    growing = Limits(GenerationConfig(), 1000, "", 1000, LongRope(), BlockLedger(10))
    assert growing.resolve(config, 45, streamed=False).max_new_tokens == 955


class TestLongRope:
    def test_sides(self) -> None:
        policy = LongRope(64)
        assert [policy.is_long(tokens) for tokens in (63, 64, 65)] == [False, False, True]
        assert policy.namespace(True) != policy.namespace(False) == b""
        assert not LongRope().is_long(10**6)

    def test_room_before_the_boundary(self) -> None:
        policy = LongRope(64)
        # The last token of a reply is never fed back.
        assert [policy.reply_room(prompt) for prompt in (1, 63, 64, 65)] == [64, 2, 1, None]
        assert LongRope().reply_room(5) is None

    def test_spans_of_a_score(self) -> None:
        policy = LongRope(64)
        assert policy.score_spans(10, 64) == [(10, 64)]
        assert policy.score_spans(10, 65) == [(10, 65)]
        assert policy.score_spans(10, 66) == [(10, 65), (65, 66)]
        assert policy.score_spans(64, 90) == [(64, 65), (65, 90)]
        assert policy.score_spans(65, 90) == [(65, 90)]

    def test_an_option_that_cannot_cross_ends_the_reply(self) -> None:
        here = limits(boundary=64, window=200)
        resolved = here.resolve(GenerationConfig(presence_penalty=0.5, min_new_tokens=90), 60, streamed=True)
        assert (resolved.max_new_tokens, resolved.min_new_tokens) == (5, 5)
        assert here.resolve(GenerationConfig(presence_penalty=0.5), 65, streamed=True).max_new_tokens == 135
        with pytest.raises(ConfigError, match=r"presence_penalty=0.5 .* 64 tokens.*at most 5 new tokens"):
            here.resolve(GenerationConfig(presence_penalty=0.5, max_new_tokens=6), 60, streamed=True)


@pytest.mark.parametrize(
    ("value", "error"),
    [(0, ConfigError), (-1.5, ConfigError), (math.nan, ConfigError), ("1", TypeError), (True, TypeError)],
)
def test_wrong_seconds(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="timeout"):
        seconds("timeout", value)


def test_seconds() -> None:
    assert seconds("timeout", 2) == 2.0
    assert seconds("timeout", 10**400) == math.inf
    assert seconds("timeout", np.float32(0.5)) == 0.5
    assert seconds("timeout", np.int64(2)) == 2.0
