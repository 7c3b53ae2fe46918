"""Tokens that a structure leaves no choice for: taken without a pass of their own, and the reply is the same."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import paged
import pytest
from structures import options_of_a_case

import ov_phi3
from ov_phi3 import Pipeline
from ov_phi3.backends.paged.constraint import Constraint

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "favourite colour": {"enum": ["dark red", "dark green", "light blue"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "favourite colour", "age"],
    "additionalProperties": False,
}
PROMPT = "Ada Martin is 34 and likes dark green. Write that as JSON."


def plain(pipe: Pipeline, prompt: Any, **options: Any) -> ov_phi3.GenerationResult:
    """The reply with a pass for every token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Constraint, "forced", lambda _: None)
        paged.evict_all(pipe)
        result = pipe.generate(prompt, **options)
    assert result.metrics.forced_tokens in (0, None)
    paged.evict_all(pipe)
    return result


@pytest.mark.parametrize("speculation", ["off", "auto"])
@pytest.mark.parametrize("name", ["tiny_loop", "loop"])
def test_random_structures(request: pytest.FixtureRequest, name: str, speculation: str) -> None:
    pipe: Pipeline = request.getfixturevalue(name)
    forced = 0
    for seed in range(30 if name == "tiny_loop" else 8):
        options = {**options_of_a_case(seed), "max_new_tokens": 60}
        expected = plain(pipe, PROMPT, **options)
        reply = pipe.generate(PROMPT, speculation=speculation, **options)
        assert reply.token_ids == expected.token_ids, seed
        assert reply.finish_reason == expected.finish_reason
        metrics = reply.metrics
        assert metrics.steps is not None
        assert metrics.accepted_tokens is not None
        assert metrics.forced_tokens is not None
        assert metrics.steps + metrics.accepted_tokens + metrics.forced_tokens == len(reply.token_ids)
        forced += metrics.forced_tokens
    paged.blocks_of(pipe)
    assert forced > 10


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False, "repetition_penalty": 1.2, "presence_penalty": 0.5},
        {"temperature": 1.5, "seed": 4, "top_p": 0.9},
        {"temperature": 1.5, "seed": 5, "xtc_probability": 0.5, "xtc_threshold": 0.05},
        {"do_sample": False, "top_logprobs": 2},
        {"do_sample": False, "stop": ["colour"]},
        {"do_sample": False, "min_new_tokens": 10},
        {"do_sample": False, "max_new_tokens": 7},
        {"do_sample": False, "logit_bias": {40: 3.0}},
        {"do_sample": False, "stop_on_loop": (20, 3)},
        {"temperature": 2.0, "seed": 3, "num_return_sequences": 3},
    ],
    ids=lambda options: ",".join(options),
)
def test_the_reply_is_the_same(loop: Pipeline, options: dict[str, Any]) -> None:
    options = {"max_new_tokens": 60, "json_schema": PERSON, **options}
    expected = plain(loop, PROMPT, **options)
    for speculation in ("off", "auto"):
        paged.evict_all(loop)
        reply = loop.generate(PROMPT, speculation=speculation, **options)
        assert (reply.token_ids, reply.text, reply.finish_reason) == (
            expected.token_ids,
            expected.text,
            expected.finish_reason,
        )
        assert [other.token_ids for other in reply.alternatives] == [other.token_ids for other in expected.alternatives]
        if "num_return_sequences" not in options:
            assert reply.metrics.forced_tokens > 0  # type: ignore[operator]
        for mine, theirs in zip(reply.logprobs, expected.logprobs, strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-3)
    paged.blocks_of(loop)


def test_a_forced_token_takes_no_pass(loop: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = paged.Passes(monkeypatch)
    options: dict[str, Any] = {"max_new_tokens": 60, "json_schema": PERSON, "do_sample": False}
    expected = plain(loop, PROMPT, **options)
    del passes.tokens[:], passes.rows[:]
    reply = loop.generate(PROMPT, **options)
    assert len(passes.tokens) == reply.metrics.steps < len(expected.token_ids)
    assert max(passes.rows) == 1  # no logits for forced tokens
    assert f"{reply.metrics.forced_tokens} forced" in str(reply.metrics)


def test_processors_see_every_token(loop: Pipeline) -> None:
    seen: list[int] = []
    prompt = loop.encode(PROMPT)

    def watch(ids: Any, logits: Any) -> Any:
        seen.append(len(ids) - len(prompt))
        return logits

    options: dict[str, Any] = {"max_new_tokens": 60, "json_schema": PERSON, "do_sample": False}
    reply = loop.generate(prompt, logits_processors=[watch], **options)
    assert reply.token_ids == plain(loop, prompt, **options).token_ids
    assert seen == list(range(len(reply.token_ids)))
    assert reply.metrics.forced_tokens > 0  # type: ignore[operator]


def test_callers_at_once(loop: Pipeline) -> None:
    prompts = [PROMPT, "Hi", "Who is Ada?", f"{PROMPT} {PROMPT}"]
    options: list[dict[str, Any]] = [
        {"max_new_tokens": 40, "do_sample": False, **extra}
        for extra in ({"json_schema": PERSON}, {}, {"regex": "(yes, indeed|no, never)"}, {"json_schema": PERSON})
    ]
    expected = [plain(loop, prompt, **extra).token_ids for prompt, extra in zip(prompts, options, strict=True)]
    replies: dict[int, list[int]] = {}

    def ask(index: int) -> None:
        replies[index] = loop.generate(prompts[index], **options[index]).token_ids

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    paged.blocks_of(loop)
    assert [replies[index] for index in range(len(prompts))] == expected


@pytest.mark.parametrize("speculation", ["off", "auto"])
def test_across_the_long_rope_boundary(longrope: tuple[Any, Any, int], device: str, speculation: str) -> None:
    model, _, boundary = longrope
    with ov_phi3.load(model, device=device, backend="infer_request") as pipe:
        for distance in range(1, 25, 4):
            ids = np.array([7, 8, 9, 10, 11] * (boundary // 5 + 1))[: boundary - distance]
            options: dict[str, Any] = {"json_schema": PERSON, "max_new_tokens": 40, "do_sample": False}
            expected = plain(pipe, ids, **options)
            reply = pipe.generate(ids, speculation=speculation, **options)
            assert reply.token_ids == expected.token_ids
            assert reply.metrics.forced_tokens > 0  # type: ignore[operator]
            assert (reply.metrics.recomputed_tokens > 0) == (expected.metrics.recomputed_tokens > 0)
        paged.blocks_of(pipe)


def test_a_chat_goes_on_from_forced_tokens(loop: Pipeline) -> None:
    """The next turn finds the reply in the cache and goes on as without forced tokens."""
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False}
    expected = plain(loop, PROMPT, json_schema=PERSON, **options)
    reply = loop.generate(PROMPT, json_schema=PERSON, **options)
    ids = [*reply.prompt_token_ids, *reply.token_ids, 17, 18]
    after = loop.generate(ids, **options)
    # The reply's last chosen token is not computed, nor what was forced behind it.
    assert len(reply.prompt_token_ids) < after.metrics.reused_tokens < len(ids) - 2  # type: ignore[operator]
    paged.evict_all(loop)
    assert after.token_ids == loop.generate(ids, **options).token_ids
    assert reply.token_ids == expected.token_ids
