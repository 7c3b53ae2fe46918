"""`Pipeline.prefill`: a prefix as a value that requests reuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paged import evict_all
from reference import Reference

import ov_phi3
from ov_phi3 import ConfigError, ContextOverflowError, Pipeline, Prefix, PromptError, Raw, SnapshotError

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 40}
SYSTEM = "You are a helpful assistant who answers in one short sentence, politely, and never says more than was asked."


class TestPrefix:
    @pytest.mark.parametrize("pipes", ["loop", "tiny_loop"])
    def test_messages_may_follow_or_be_whole(self, pipes: str, request: pytest.FixtureRequest) -> None:
        pipe: Pipeline = request.getfixturevalue(pipes)
        system, user = {"role": "system", "content": SYSTEM}, {"role": "user", "content": "Who are you?"}
        whole = pipe.generate([system, user], **GREEDY)
        prefix = pipe.prefill([system])
        ids = whole.prompt_token_ids
        assert prefix.token_ids.tolist() == ids[: len(prefix)]
        raw = Raw(pipe.tokenizer.template.render([user]))
        for prompt in ("Who are you?", [user], [system, user], raw, ids, ids[len(prefix) :], np.array(ids)):
            reply = pipe.generate(prompt, prefix=prefix, **GREEDY)
            assert reply.prompt_token_ids == ids
            assert reply.token_ids == whole.token_ids

    def test_is_found_by_later_requests(self, loop: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        system = "You are a prefix that was never used before, and chats begin with it."
        prefix = loop.prefill([{"role": "system", "content": system}])
        evict_all(loop)
        first = loop.chat(system=system).send("Hello?", max_new_tokens=3)
        assert first.metrics.reused_tokens == len(prefix)
        assert prefix.exact
        del prefix

    def test_is_not_changed_by_replies(self, loop: Pipeline) -> None:
        prefix = loop.prefill(list(range(200, 260)))
        before = [array.copy() for array in prefix.entry.tensors.arrays]
        one = loop.generate([5], prefix=prefix, ignore_eos=True, **GREEDY).token_ids
        loop.generate([6], prefix=prefix, ignore_eos=True, **GREEDY)
        assert loop.generate([5], prefix=prefix, ignore_eos=True, **GREEDY).token_ids == one
        assert all((a == b).all() for a, b in zip(before, prefix.entry.tensors.arrays, strict=True))

    def test_all_of_a_prompt(self, loop: Pipeline) -> None:
        """The last token is computed again, because its logits were not kept."""
        ids = loop.encode("What is the capital of Japan?")
        reply = loop.generate(ids, prefix=loop.prefill(ids), **GREEDY)
        assert reply.token_ids == loop.generate(ids, **GREEDY).token_ids
        assert reply.metrics.reused_tokens == len(ids) - 1

    def test_progress(self, tiny_loop: Pipeline) -> None:
        progress: list[tuple[int, int]] = []
        tiny_loop.prefill(list(range(900, 930)), on_prefill=lambda *at: progress.append(at))
        assert progress[0] == (0, 30)
        assert progress[-1] == (30, 30)
        with pytest.raises(ZeroDivisionError):
            tiny_loop.prefill(list(range(930, 960)), on_prefill=lambda *_: 1 / 0)
        assert tiny_loop.generate([1000, 1001], max_new_tokens=2).token_ids

    def test_longrope_keeps_its_sides_apart(self, longrope: tuple[Path, Path, int], device: str) -> None:
        boundary = longrope[2]
        reference = Reference(longrope[1], boundary)
        ids = np.random.default_rng(8).integers(300, 31_000, 2 * boundary).tolist()
        with ov_phi3.load(longrope[0], device=device, backend="infer_request") as pipe:
            for begin, length, same_side in (
                (boundary - 20, boundary + 5, False),
                (boundary - 20, boundary - 10, True),
                (boundary + 20, boundary + 30, True),
            ):
                prefix = pipe.prefill(ids[:begin])
                reply = pipe.generate(ids[:length], prefix=prefix, ignore_eos=True, **GREEDY)
                assert reference.differences(ids[:length], reply.token_ids) == []
                assert bool(reply.metrics.reused_tokens) == same_side

    def test_refusals(self, loop: Pipeline, tiny_loop: Pipeline, pipe: Pipeline) -> None:
        prefix = tiny_loop.prefill(list(range(300, 320)))
        with pytest.raises(SnapshotError, match="this prefix is of another model"):
            loop.generate("x", prefix=prefix)
        with pytest.raises(TypeError, match="must be a Prefix"):
            loop.generate("x", prefix="sys.kv")  # type: ignore[arg-type]
        for refused in (
            lambda: pipe.prefill([1, 2]),
            lambda: pipe.load_prefix("x"),
            lambda: pipe.score("x", "y"),
            lambda: pipe.generate("x", logit_bias={1: 1.0}),
            lambda: pipe.generate("x", top_logprobs=1),
            lambda: pipe.generate("x", logits_processors=[lambda ids, logits: logits]),
        ):
            with pytest.raises(ConfigError, match="backend='infer_request'"):
                refused()
        with pytest.raises(ContextOverflowError):
            loop.prefill(np.full(loop.context_length, 100))
        with pytest.raises(PromptError):
            loop.prefill([])


def test_prefix_shows_itself(tiny_loop: Pipeline) -> None:
    prefix = tiny_loop.prefill(list(range(300, 310)))
    assert isinstance(prefix, Prefix)
    assert repr(prefix).startswith("<Prefix of 10 tokens, ")
    assert prefix.dtype == "f32"
    block_size = prefix.entry.tensors.block_size
    assert prefix.nbytes == block_size * tiny_loop.info.kv_bytes_per_token_for(32)  # one block
