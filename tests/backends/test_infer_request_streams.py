"""Replies of our own engine: cancelling within a pass, processors, log-probabilities, closing, and seeds."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from paged import blocks_of
from questions import GREEDY, QUESTIONS, SYSTEM

import ov_phi3
from ov_phi3 import ClosedError, Pipeline


@pytest.fixture(scope="module")
def loop_int4(demo_int4: Path, device: str) -> Iterator[Pipeline]:
    with ov_phi3.load(demo_int4, device=device, backend="infer_request") as pipe:
        yield pipe


class TestStreams:
    def test_cancel_and_continue(self, loop: Pipeline) -> None:
        expected = loop.generate("Tell me about the sea.", **GREEDY).token_ids
        stream = loop.stream("Tell me about the sea.", **GREEDY)
        for count, _ in enumerate(stream, 1):
            if count == 5:
                stream.cancel()
        assert stream.result.finish_reason == "cancelled"
        assert stream.result.token_ids == expected[: len(stream.result.token_ids)]
        assert loop.generate("Tell me about the sea.", **GREEDY).token_ids == expected

    def test_cancelled_between_two_chunks(self, demo_fp32: Path, device: str) -> None:
        with ov_phi3.load(demo_fp32, device=device, backend="infer_request", prefill_chunk=50) as pipe:
            ids = np.random.default_rng(0).integers(100, 40_000, 400)
            streams: list[Any] = []
            ready = threading.Event()

            def stop(done: int, total: int) -> None:
                ready.wait()
                if done == 100:
                    streams[0].cancel()

            streams.append(pipe.stream(ids, on_prefill=stop, **GREEDY))
            ready.set()
            assert streams[0].result.finish_reason == "cancelled"
            assert streams[0].result.token_ids == []
            assert pipe.generate(ids, max_new_tokens=1).metrics.reused_tokens == 100

    @pytest.mark.parametrize("how", ["cancel", "timeout", "close"])
    def test_ended_within_one_pass(self, demo_fp32: Path, device: str, how: str, monkeypatch: Any) -> None:
        """A prompt is prefilled in one pass, which is cancelled."""
        from ov_phi3.engine import worker

        with ov_phi3.load(demo_fp32, device=device, backend="infer_request") as pipe:
            pipe.warmup()
            ids = np.random.default_rng(0).integers(100, 40_000, 4000)
            started = threading.Event()
            late = [0.0]
            real = worker.now
            monkeypatch.setattr(worker, "now", lambda: real() + late[0])
            stream = pipe.stream(ids, on_prefill=lambda *_: started.set(), timeout=1000, max_new_tokens=5)
            started.wait()
            if how == "cancel":
                stream.cancel()
            elif how == "timeout":
                late[0] = 2000.0
            else:
                pipe.close()
            result = stream.result
            assert result.finish_reason == ("timeout" if how == "timeout" else "cancelled")
            assert result.token_ids == []
            monkeypatch.undo()
            if how != "close":
                assert pipe.engine.cached_tokens(ids) == 0  # the blocks of unknown contents match nothing
                blocks = blocks_of(pipe)
                assert blocks.num_available == blocks.num_blocks
                assert pipe.generate("What is the capital of Japan?", **GREEDY).token_ids

    def test_a_processor_that_raises(self, loop: Pipeline) -> None:
        def failing(ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
            if len(ids) > limit:
                raise LookupError("no more")
            return logits

        limit = len(loop.encode("Tell me about the sea.")) + 3
        stream = loop.stream("Tell me about the sea.", logits_processors=[failing], **GREEDY)
        seen = []
        with pytest.raises(LookupError, match="no more"):
            for chunk in stream:
                seen += chunk.token_ids
        assert seen == loop.generate("Tell me about the sea.", do_sample=False, max_new_tokens=4).token_ids

    def test_logprobs_come_with_the_chunks(self, loop: Pipeline) -> None:
        stream = loop.stream("Name a colour.", top_logprobs=20, do_sample=False, max_new_tokens=6)
        chunks = [chunk for chunk in stream if chunk.token_ids]
        assert [[entry.token_id for entry in chunk.logprobs] for chunk in chunks] == [c.token_ids for c in chunks]
        for chunk in chunks:
            best = chunk.logprobs[0].top
            assert len(best) == 20
            assert best[0] == (chunk.token_ids[0], chunk.logprobs[0].logprob)
        result = stream.result
        assert [entry.token_id for entry in result.logprobs] == result.token_ids
        score = loop.score("Name a colour.", result.token_ids)
        assert score.logprobs == pytest.approx([entry.logprob for entry in result.logprobs], abs=1e-3)
        assert result.to_dict()["logprobs"][0]["top"][0][0] == result.token_ids[0]

    def test_logprobs_have_the_text_and_bytes_of_their_tokens(self, tiny_loop: Pipeline) -> None:
        """With SentencePiece's spaces, and with the bytes of a character that several tokens make."""
        wanted = tiny_loop.tokenizer.encode("a \U0001f999").tolist()
        start = len(tiny_loop.encode("Hi"))

        def spell(ids: Any, logits: Any) -> Any:
            logits[wanted[len(ids) - start]] = 1000.0
            return logits

        result = tiny_loop.generate("Hi", top_logprobs=3, logits_processors=[spell], max_new_tokens=len(wanted))
        entries = result.logprobs
        assert b"".join(entry.bytes for entry in entries) == " a \U0001f999".encode()
        assert [entry.text for entry in entries] == [" a", " ", *["\ufffd"] * 4]
        for entry in entries:
            assert [(c.token_id, c.logprob) for c in entry.candidates] == list(entry.top)
            assert [c.bytes for c in entry.candidates] == [tiny_loop.tokenizer.token_bytes(i) for i, _ in entry.top]
        values = result.to_dict()["logprobs"][2]
        assert (values["text"], values["bytes"]) == ("\ufffd", [0xF0])
        assert [len(values[name]) for name in ("top", "top_text", "top_bytes")] == [3, 3, 3]

    def test_closing_ends_what_runs(self, tiny_fp32: Path, device: str) -> None:
        pipe = ov_phi3.load(tiny_fp32, device=device, backend="infer_request")
        stream = pipe.stream("x", ignore_eos=True)
        next(iter(stream))
        pipe.close()
        assert stream.result.finish_reason == "cancelled"
        for call in (lambda: pipe.prefill([1]), lambda: pipe.score("a", "b"), lambda: pipe.load_prefix("x")):
            with pytest.raises(ClosedError):
                call()

    def test_closing_ends_a_prefill_in_another_thread(self, demo_fp32: Path, device: str) -> None:
        pipe = ov_phi3.load(demo_fp32, device=device, backend="infer_request", prefill_chunk=20)
        started = threading.Event()
        errors: list[BaseException] = []

        def work() -> None:
            try:
                pipe.prefill(np.full(2000, 300), on_prefill=lambda *_: started.set())
            except ov_phi3.Error as exc:
                errors.append(exc)

        thread = threading.Thread(target=work)
        thread.start()
        started.wait()
        pipe.close()
        thread.join()
        assert isinstance(errors[0], ClosedError)


class TestSeeds:
    def test_the_same_whatever_else_runs(self, loop_int4: Pipeline) -> None:
        """In int4, where the arithmetic of a cached prompt differs visibly from that of a whole one."""
        pipe = loop_int4
        options: dict[str, Any] = {"temperature": 1.2, "seed": 9, "max_new_tokens": 40, "ignore_eos": True}
        prompts = [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": q}] for q in QUESTIONS]
        alone = [pipe.generate(p, **options).token_ids for p in prompts]
        assert [pipe.generate(p, **options).token_ids for p in prompts] == alone
        replies: dict[int, list[int]] = {}

        def ask(number: int) -> None:
            if number % 2:
                pipe.generate(prompts[number % 5], max_new_tokens=20)
            else:
                replies[number] = pipe.generate(prompts[number % 5], **options).token_ids

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert replies == {n: alone[n % 5] for n in range(0, 20, 2)}

    def test_a_seeded_chat(self, loop_int4: Pipeline) -> None:
        options: dict[str, Any] = {"temperature": 1.0, "seed": 4, "max_new_tokens": 20}
        replies = []
        for _ in range(2):
            chat = loop_int4.chat(system=SYSTEM)
            replies.append([chat.send(q, **options).token_ids for q in QUESTIONS[:3]])
            loop_int4.generate([{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Else"}])
        assert replies[0] == replies[1]
