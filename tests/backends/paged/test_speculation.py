"""Replies with drafts equal replies without, on the real models in float32, whatever options they have."""

from __future__ import annotations

import itertools
import random
import threading
from typing import Any

import numpy as np
import paged
import pytest

import ov_phi3
from ov_phi3 import ConfigError, Pipeline
from ov_phi3.backends.paged.model_runner import ModelRunner

COPY = "Repeat word for word: the red fox and the blue fox and the red fox and the blue fox met at the old mill."
AUTO = {"speculation": "auto"}
COUNT = " one two three four five six"
CODE = "def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n\n\ndef mul(a, b):\n    return a * b\n"


def both(pipe: Pipeline, prompt: Any, **options: Any) -> tuple[ov_phi3.GenerationResult, ov_phi3.GenerationResult]:
    """The reply without and with drafts, each from an empty prefix cache."""
    options = {"max_new_tokens": 40, "ignore_eos": True, **options}
    results = []
    for kind in ("off", "auto"):
        paged.evict_all(pipe)
        results.append(pipe.generate(prompt, speculation=kind, **options))
    paged.blocks_of(pipe)
    plain, drafted = results
    assert plain.metrics.drafted_tokens == 0
    assert plain.metrics.steps + plain.metrics.forced_tokens == len(plain.token_ids)
    return plain, drafted


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.05, "frequency_penalty": 0.1, "presence_penalty": 0.1},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0.4, "top_p": 0.9, "top_k": 20, "min_p": 0.01, "seed": 6},
        {"do_sample": False, "top_logprobs": 2},
        {"do_sample": False, "stop": ["blue"]},
        {"do_sample": False, "num_beams": 2, "max_new_tokens": 8},
        {"temperature": 0.8, "seed": 3, "num_return_sequences": 2, "max_new_tokens": 20},
    ],
    ids=lambda options: ",".join(options),
)
def test_the_reply_is_the_same(loop: Pipeline, options: dict[str, Any]) -> None:
    paged.evict_all(loop)
    plain_options = {"max_new_tokens": 40, "ignore_eos": True, **options}
    plain = loop.generate(COPY, **plain_options)
    paged.evict_all(loop)
    drafted = loop.generate(COPY, **AUTO, **plain_options)
    paged.blocks_of(loop)
    assert drafted.token_ids == plain.token_ids
    assert (drafted.text, drafted.finish_reason) == (plain.text, plain.finish_reason)
    assert [reply.token_ids for reply in drafted.alternatives] == [reply.token_ids for reply in plain.alternatives]
    for mine, theirs in zip(drafted.logprobs, plain.logprobs, strict=True):
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-3)


def test_drafts_save_steps(loop: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = paged.Passes(monkeypatch)
    plain, drafted = both(loop, COPY, do_sample=False)
    metrics = drafted.metrics
    assert drafted.token_ids == plain.token_ids
    assert metrics.accepted_tokens is not None
    assert metrics.drafted_tokens is not None
    assert metrics.steps is not None
    assert 0 < metrics.accepted_tokens <= metrics.drafted_tokens
    assert metrics.steps + metrics.accepted_tokens == 40
    assert len(passes.tokens) == 40 + metrics.steps
    assert metrics.tokens_per_step is not None
    assert metrics.tokens_per_step > 1.2
    assert f"of {metrics.drafted_tokens} drafts accepted" in str(metrics)
    assert metrics.to_dict()["tokens_per_step"] == metrics.tokens_per_step


def test_processors_see_the_right_history(loop: Pipeline) -> None:
    """A processor is called once for each token of the reply, with all tokens before it."""
    prompt = loop.encode(CODE)
    wanted = loop.tokenizer.encode_continuation(CODE).tolist()
    seen: list[list[int]] = []

    def force(ids: Any, logits: Any) -> Any:
        seen.append(ids[len(prompt) :].tolist())
        logits[:] = -np.inf
        logits[wanted[len(seen[-1])]] = 0.0
        return logits

    options = {"max_new_tokens": len(wanted), "logits_processors": [force], "ignore_eos": True}
    reply = loop.generate(prompt, **AUTO, **options)
    assert reply.token_ids == wanted
    assert seen == [wanted[:made] for made in range(len(wanted))]
    assert (reply.metrics.tokens_per_step or 0) > 2


def test_a_structure_holds(loop: Pipeline) -> None:
    schema = {"type": "array", "items": {"enum": ["red fox", "blue fox"]}, "minItems": 4, "maxItems": 4}
    plain, drafted = both(loop, COPY, json_schema=schema, do_sample=False, max_new_tokens=60)
    assert drafted.token_ids == plain.token_ids
    assert len(drafted.text) > 40
    assert (drafted.metrics.tokens_per_step or 0) >= (plain.metrics.tokens_per_step or 0) > 1


def test_callers_at_once(loop: Pipeline) -> None:
    prompts = [COPY, CODE, f"{COPY} {CODE}", "Hi"]
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "ignore_eos": True}
    plain = [loop.generate(prompt, **options).token_ids for prompt in prompts]
    replies: dict[int, list[int]] = {}

    def ask(index: int) -> None:
        replies[index] = loop.generate(prompts[index], **AUTO, **options).token_ids

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    paged.blocks_of(loop)
    assert [replies[index] for index in range(len(prompts))] == plain


def test_the_prefix_cache_holds_what_was_accepted(loop: Pipeline) -> None:
    """The next turn finds the reply in the cache, as far as without drafts, and goes on alike."""
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False, "ignore_eos": True}
    reused, following = [], []
    for kind in ("off", "auto"):
        paged.evict_all(loop)
        reply = loop.generate(COPY, speculation=kind, **options)
        ids = [*reply.prompt_token_ids, *reply.token_ids, 17, 18]
        after = loop.generate(ids, **options)
        reused.append(after.metrics.reused_tokens)
        following.append(after.token_ids)
    assert reused[0] == reused[1]
    assert following[0] == following[1]


def test_across_the_long_rope_boundary(longrope: tuple[Any, Any, int], device: str) -> None:
    """Drafts end at the boundary; behind it they are made again."""
    model, _, boundary = longrope[0], longrope[1], longrope[2]
    with ov_phi3.load(model, device=device, backend="infer_request") as pipe:
        ids = np.array([7, 8, 9, 10, 11] * (boundary // 5))[: boundary - 12]
        plain, drafted = both(pipe, ids, do_sample=False)
        assert drafted.token_ids == plain.token_ids
        assert drafted.metrics.recomputed_tokens == plain.metrics.recomputed_tokens > 0


def test_a_fixed_number_of_drafts(loop: Pipeline, demo_fp32: Any, device: str) -> None:
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "ignore_eos": True}
    plain = loop.generate(COPY, **options)
    fixed = loop.generate(COPY, num_assistant_tokens=3, max_ngram_size=2, **options)
    assert fixed.token_ids == plain.token_ids
    assert (fixed.metrics.tokens_per_step or 0) > 1
    with ov_phi3.load(demo_fp32, device=device, backend="infer_request", ov_config={"prompt_lookup": True}) as lookup:
        reply = lookup.generate(COPY, **options)
        assert reply.token_ids == plain.token_ids
        assert (reply.metrics.drafted_tokens or 0) > 0


@pytest.mark.parametrize("options", [{"do_sample": False}, {"temperature": 1.0, "seed": 5}], ids=["greedy", "sampled"])
def test_the_same_ids_every_time(
    demo_int4: Any, device: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decisions follow from the prompt's own tokens and from costs that stay, so that also rounding is the same.

    The first reply measures the costs, on a clock that never says the same twice. A bias makes replies repeat their
    prompt, so that drafts come true.
    """
    monkeypatch.setattr(ModelRunner, "time_rows", lambda _, rows: (1.0 + 0.05 * rows) * random.uniform(0.01, 0.03))
    with ov_phi3.load(demo_int4, device=device, backend="infer_request") as own:
        prompt = own.encode(f"Count:{2 * COUNT}")
        words = own.tokenizer.encode_continuation(COUNT).tolist()
        following = dict(itertools.pairwise([*words, words[0]]))

        def lean(ids: Any, logits: Any) -> Any:
            logits[following.get(int(ids[-1]), words[0])] += 8.0
            return logits

        outcomes = set()
        for _ in range(10):
            paged.evict_all(own)
            reply = own.generate(
                prompt, max_new_tokens=32, ignore_eos=True, logits_processors=[lean], **AUTO, **options
            )
            counts = reply.metrics
            outcomes.add((tuple(reply.token_ids), counts.steps, counts.drafted_tokens, counts.accepted_tokens))
        assert len(outcomes) == 1
        assert (reply.metrics.accepted_tokens or 0) > 4


def test_only_our_own_engine_decides(pipe: Pipeline) -> None:
    with pytest.raises(ConfigError, match=r"speculation='auto'.*infer_request"):
        pipe.generate("Hi", **AUTO)


def test_after_a_warmup_nothing_is_measured(demo_int4: Any, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with ov_phi3.load(demo_int4, device=device, backend="infer_request") as own:
        own.warmup(**AUTO)
        monkeypatch.setattr(ModelRunner, "time_rows", None)
        reply = own.generate(COPY, max_new_tokens=16, do_sample=False, ignore_eos=True, **AUTO)
        assert len(reply.token_ids) == 16


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"speculation": "yes"}, "speculation='yes'; expected 'off' or 'auto'"),
        ({"speculation": True}, "speculation=True; expected 'off' or 'auto'"),
        ({"speculation": "auto", "num_assistant_tokens": 3}, "contradicts num_assistant_tokens=3"),
    ],
)
def test_wrong_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        ov_phi3.GenerationConfig(**options)
