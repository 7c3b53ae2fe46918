"""The cache of our own engine: which request reuses what, what is copied, and what is evicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paged import Copies, Passes, blocks_of, evict_all
from questions import GREEDY, QUESTIONS, SYSTEM

import ov_phi3
from ov_phi3 import Pipeline
from ov_phi3.backends.paged.model_runner import ModelRunner


def test_logits_of_the_last_token_only(loop: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = Passes(monkeypatch)
    loop.generate(np.random.default_rng(9).integers(100, 40_000, 300), max_new_tokens=1)
    assert (passes.tokens, passes.rows) == ([300], [1])


def test_a_chat_continues_in_its_blocks(loop: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    evict_all(loop)  # the first turn would copy a block of another chat that begins with the same control token
    copies = Copies(monkeypatch)
    chat = loop.chat(system=f"This begins as no other conversation does. {SYSTEM}")
    for number, question in enumerate(QUESTIONS):
        before = len(chat.token_ids)
        reply = chat.send(question, max_new_tokens=8, do_sample=False)
        if number:
            assert (reply.metrics.reused_tokens or 0) >= before - 2
        assert chat.kv.cached_tokens == len(chat.token_ids) - 1
    assert copies.written == 0


def test_a_fork_copies_one_block_when_it_must(loop: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = loop.chat(system=SYSTEM)
    chat.send("I am Ada, from Rome.", max_new_tokens=8, do_sample=False)
    branch = chat.fork()
    copies = Copies(monkeypatch)
    branch.send("Who am I?", max_new_tokens=8, do_sample=False)
    assert copies.written == 0  # the first branch to continue takes the last block
    chat.send("And where am I from?", max_new_tokens=8, do_sample=False)
    assert copies.written <= 1  # the second copies the common part of the last block
    written = copies.written
    for one in (branch, chat, branch, chat):
        before = len(one.token_ids)
        assert (one.send("Go on.", max_new_tokens=4, do_sample=False).metrics.reused_tokens or 0) >= before - 2
    assert copies.written == written  # from then on each branch has its own last block


def test_rewind_keeps_any_length(loop: Pipeline) -> None:
    chat = loop.chat(system=SYSTEM)
    for question in QUESTIONS[:3]:
        chat.send(question, max_new_tokens=9, do_sample=False)
    cached = []
    for _ in range(3):
        cached.append((chat.kv.cached_tokens, len(chat.token_ids)))
        chat.rewind()
    assert all(tokens == total - 1 if i == 0 else tokens == total for i, (tokens, total) in enumerate(cached))


def test_one_shot_requests_share_their_beginning(loop: Pipeline) -> None:
    ids = loop.encode([{"role": "system", "content": SYSTEM}, {"role": "user", "content": "x"}])
    loop.generate(ids, max_new_tokens=2)
    before = len(blocks_of(loop)._cached)
    for token in range(200, 206):
        reply = loop.generate([*ids.tolist()[:-4], token, token], max_new_tokens=2)
        assert reply.metrics.reused_tokens == len(ids) - 4
    assert len(blocks_of(loop)._cached) <= before + 6  # each keeps at most its own last block


def test_many_prefixes_side_by_side(tiny_loop: Pipeline) -> None:
    """A switch between them prefills nothing."""
    draw = np.random.default_rng(3)
    texts = [draw.integers(300, 31_000, 60) for _ in range(20)]
    fresh = [tiny_loop.generate([*text, 5, 6], ignore_eos=True, **GREEDY).token_ids for text in texts]
    prefixes = [tiny_loop.prefill(text) for text in texts]
    for _ in range(2):
        for prefix, expected in zip(prefixes, fresh, strict=True):
            reply = tiny_loop.generate([5, 6], prefix=prefix, ignore_eos=True, **GREEDY)
            assert reply.token_ids == expected
            assert (reply.metrics.reused_tokens or 0) >= 60


def test_the_budget_holds(tiny_fp32: Path, device: str) -> None:
    with ov_phi3.load(tiny_fp32, device=device, backend="infer_request", context_length=300) as pipe:
        draw = np.random.default_rng(0)
        for _ in range(12):
            pipe.generate(draw.integers(300, 30_000, 100), max_new_tokens=150, ignore_eos=True)
            blocks = blocks_of(pipe)
            assert blocks.num_blocks * blocks.block_size <= 320 + 64
        prompt = draw.integers(300, 30_000, 100).tolist()
        one = pipe.generate(prompt, max_new_tokens=5, ignore_eos=True, do_sample=False).token_ids
        assert pipe.generate(prompt, max_new_tokens=5, ignore_eos=True, do_sample=False).token_ids == one


def test_a_failed_pass_frees_its_blocks(tiny_loop: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = list(range(400, 440))
    expected = tiny_loop.generate(ids, max_new_tokens=5, ignore_eos=True, do_sample=False).token_ids

    def failing(*_: Any) -> Any:
        raise RuntimeError("out of memory\nException from nowhere.cpp:1")

    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "run", failing)
        with pytest.raises(ov_phi3.GenerationError, match="out of memory"):
            tiny_loop.generate([*ids, 7], max_new_tokens=5)
    blocks = blocks_of(tiny_loop)
    assert blocks.num_available == blocks.num_blocks
    assert tiny_loop.generate(ids, max_new_tokens=5, ignore_eos=True, do_sample=False).token_ids == expected
