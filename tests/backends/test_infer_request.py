"""Our own decode loop, on the real engine: the same ids as the other backend and as no cache at all, and what only it
can do.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import Reference

import ov_phi3
from ov_phi3 import (
    ClosedError,
    ConfigError,
    ContextOverflowError,
    GenerationConfig,
    ModelWarning,
    Pipeline,
    Prefix,
    PromptError,
    Raw,
    SnapshotError,
)

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 40}
QUESTIONS = (
    "What is the capital of Japan?",
    "Name three fruits.",
    "Tell me about the sea.",
    "Hi",
    "Why is the sky blue?",
)
SYSTEM = "You are a helpful assistant who answers in one short sentence, politely, and never says more than was asked."


@pytest.fixture(scope="module")
def reference(demo_hf: Path) -> Reference:
    return Reference(demo_hf)


@pytest.fixture(scope="module")
def other(demo_fp32: Path, device: str) -> Iterator[Pipeline]:
    with ov_phi3.load(demo_fp32, device=device) as pipe:
        yield pipe


def slots(pipe: Pipeline) -> list[Any]:
    return pipe._backend.slots._slots  # type: ignore[union-attr]


class Copies:
    """Counts the states that are read and written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from ov_phi3.backends.protocol import kv_slots

        self.read, self.written = 0, 0
        real_read, real_write = kv_slots.read_state, kv_slots.write_state

        def read(*args: Any) -> Any:
            self.read += 1
            return real_read(*args)

        def write(*args: Any) -> None:
            self.written += 1
            real_write(*args)

        monkeypatch.setattr(kv_slots, "read_state", read)
        monkeypatch.setattr(kv_slots, "write_state", write)


class TestSameIds:
    """Greedy ids in float32: the other backend's, and those of the model recomputed without a cache."""

    @pytest.mark.parametrize("question", QUESTIONS)
    def test_prompts(self, loop: Pipeline, other: Pipeline, reference: Reference, question: str) -> None:
        reply = loop.generate(question, **GREEDY)
        assert reply.token_ids == other.generate(question, **GREEDY).token_ids
        assert reference.differences(reply.prompt_token_ids, reply.token_ids) == []

    @pytest.mark.parametrize("length", [1, 2, 31, 33, 500, 1500])
    def test_any_ids(self, loop: Pipeline, other: Pipeline, length: int) -> None:
        ids = np.random.default_rng(length).integers(100, 40_000, length)
        options = {**GREEDY, "ignore_eos": True}
        assert loop.generate(ids, **options).token_ids == other.generate(ids, **options).token_ids

    def test_pieces(self, demo_fp32: Path, device: str, loop: Pipeline) -> None:
        """A prompt prefilled in pieces gives what one computed whole gives."""
        ids = np.random.default_rng(5).integers(100, 40_000, 700)
        whole = loop.generate(ids, ignore_eos=True, **GREEDY)
        told: list[tuple[int, int]] = []
        with ov_phi3.load(demo_fp32, device=device, backend="infer_request", prefill_chunk=100) as pipe:
            pieces = pipe.generate(ids, ignore_eos=True, on_prefill=lambda *at: told.append(at), **GREEDY)
        assert pieces.token_ids == whole.token_ids
        assert told == [(done, 700) for done in (0, 100, 200, 300, 400, 500, 600, 700)]

    def test_logits_of_the_last_token_only(self, loop: Pipeline) -> None:
        ids = np.random.default_rng(9).integers(100, 40_000, 300)
        loop.generate(ids, max_new_tokens=1)
        newest = max(slots(loop), key=lambda slot: slot.used)
        assert newest.length == 300
        assert list(newest.request.get_tensor("logits").shape) == [1, 1, loop.info.vocab_size]

    def test_chats_forks_and_rewinds(self, loop: Pipeline, other: Pipeline, reference: Reference) -> None:
        draw = random.Random(7)
        chats = [(loop.chat(system=SYSTEM), other.chat(system=SYSTEM))]
        for _ in range(14):
            mine, theirs = draw.choice(chats)
            act = draw.choice(["send", "send", "send", "fork", "rewind"])
            if act == "fork" and len(chats) < 4:
                chats.append((mine.fork(), theirs.fork()))
            elif act == "rewind" and mine.messages[1:]:
                mine.rewind()
                theirs.rewind()
            else:
                text = draw.choice(QUESTIONS)
                options = {**GREEDY, "max_new_tokens": draw.randint(1, 25)}
                reply = mine.send(text, **options)
                assert reply.token_ids == theirs.send(text, **options).token_ids
                assert reference.differences(reply.prompt_token_ids, reply.token_ids) == []
        assert [mine.token_ids.tolist() for mine, _ in chats] == [theirs.token_ids.tolist() for _, theirs in chats]

    def test_sliding_window(self, sliding: tuple[Path, Path], device: str) -> None:
        ids = np.random.default_rng(1).integers(300, 31_000, 2300)
        with (
            ov_phi3.load(sliding[0], device=device, backend="infer_request", prefill_chunk=512) as pipe,
            ov_phi3.load(sliding[0], device=device) as theirs,
        ):
            options = {**GREEDY, "ignore_eos": True}
            assert pipe.generate(ids, **options).token_ids == theirs.generate(ids, **options).token_ids


class TestCache:
    def test_a_chat_goes_on_in_its_slot(self, loop: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        copies = Copies(monkeypatch)
        chat = loop.chat(system=f"This begins as no other conversation does. {SYSTEM}")
        for number, question in enumerate(QUESTIONS):
            before = len(chat.token_ids)
            reply = chat.send(question, max_new_tokens=8, do_sample=False)
            if number:
                assert (reply.metrics.reused_tokens or 0) >= before - 2
            assert chat.kv.cached_tokens == len(chat.token_ids) - 1
        assert (copies.read, copies.written) == (0, 0)

    def test_a_fork_copies_only_when_it_must(self, loop: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        chat = loop.chat(system=SYSTEM)
        chat.send("I am Ada, from Rome.", max_new_tokens=8, do_sample=False)
        branch = chat.fork()
        copies = Copies(monkeypatch)
        branch.send("Who am I?", max_new_tokens=8, do_sample=False)
        assert copies.written == 0  # the first to go on takes the slot
        chat.send("And where am I from?", max_new_tokens=8, do_sample=False)
        assert copies.written == 1  # the second must have the common part to itself
        for one in (branch, chat, branch, chat):
            before = len(one.token_ids)
            assert (one.send("Go on.", max_new_tokens=4, do_sample=False).metrics.reused_tokens or 0) >= before - 2
        assert copies.written == 1  # from then on each has its own

    def test_rewind_keeps_any_length(self, loop: Pipeline) -> None:
        chat = loop.chat(system=SYSTEM)
        for question in QUESTIONS[:3]:
            chat.send(question, max_new_tokens=9, do_sample=False)
        cached = []
        for _ in range(3):
            cached.append((chat.kv.cached_tokens, len(chat.token_ids)))
            chat.rewind()
        assert all(found == total - 1 if i == 0 else found == total for i, (found, total) in enumerate(cached))

    def test_one_shot_requests_do_not_pile_up(self, loop: Pipeline) -> None:
        ids = loop.encode([{"role": "system", "content": SYSTEM}, {"role": "user", "content": "x"}])
        loop.generate(ids, max_new_tokens=2)
        before = len(slots(loop))
        for token in range(200, 206):
            reply = loop.generate([*ids.tolist()[:-4], token, token], max_new_tokens=2)
            assert reply.metrics.reused_tokens == len(ids) - 4
        assert len(slots(loop)) == before

    def test_many_prefixes_side_by_side(self, loop: Pipeline) -> None:
        """More than there are slots for, switched between without prefilling."""
        draw = np.random.default_rng(3)
        texts = [draw.integers(100, 40_000, 60) for _ in range(20)]
        fresh = [loop.generate([*t, 5, 6], ignore_eos=True, **GREEDY).token_ids for t in texts]
        prefixes = [loop.prefill(t) for t in texts]
        for _ in range(2):
            for prefix, wanted in zip(prefixes, fresh, strict=True):
                reply = loop.generate([5, 6], prefix=prefix, ignore_eos=True, **GREEDY)
                assert reply.token_ids == wanted
                assert (reply.metrics.reused_tokens or 0) >= 60

    def test_the_budget_holds(self, tiny_fp32: Path, device: str) -> None:
        with ov_phi3.load(tiny_fp32, device=device, backend="infer_request", context_length=300) as pipe:
            draw = np.random.default_rng(0)
            for _ in range(12):
                pipe.generate(draw.integers(300, 30_000, 100), max_new_tokens=150, ignore_eos=True)
                assert sum(s.length for s in slots(pipe)) <= 320 + 64
            prompt = draw.integers(300, 30_000, 100).tolist()
            one = pipe.generate(prompt, max_new_tokens=5, ignore_eos=True, do_sample=False).token_ids
            assert pipe.generate(prompt, max_new_tokens=5, ignore_eos=True, do_sample=False).token_ids == one

    def test_a_failed_pass_gives_its_slot_up(self, tiny_loop: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        ids = list(range(400, 440))
        wanted = tiny_loop.generate(ids, max_new_tokens=5, ignore_eos=True, do_sample=False).token_ids
        backend: Any = tiny_loop._backend
        real = backend._infer

        def failing(slot: Any, *args: Any) -> Any:
            slot.busy = True
            raise RuntimeError("out of memory\nException from nowhere.cpp:1")

        monkeypatch.setattr(backend, "_infer", failing)
        with pytest.raises(ov_phi3.GenerationError, match="out of memory"):
            tiny_loop.generate([*ids, 7], max_new_tokens=5)
        monkeypatch.setattr(backend, "_infer", real)
        assert all(not slot.busy for slot in slots(tiny_loop))
        assert tiny_loop.generate(ids, max_new_tokens=5, ignore_eos=True, do_sample=False).token_ids == wanted


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

    def test_is_used_without_being_told(self, loop: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        system = "You are a prefix that nobody has used before, and chats begin with it."
        prefix = loop.prefill([{"role": "system", "content": system}])
        for slot in list(slots(loop)):
            slots(loop).remove(slot)
        first = loop.chat(system=system).send("Hello?", max_new_tokens=3)
        assert first.metrics.reused_tokens == len(prefix)
        assert prefix.exact
        del prefix

    def test_is_not_changed_by_what_follows(self, loop: Pipeline) -> None:
        prefix = loop.prefill(list(range(200, 260)))
        before = [array.copy() for array in prefix._value.tensors.arrays]
        one = loop.generate([5], prefix=prefix, ignore_eos=True, **GREEDY).token_ids
        loop.generate([6], prefix=prefix, ignore_eos=True, **GREEDY)
        assert loop.generate([5], prefix=prefix, ignore_eos=True, **GREEDY).token_ids == one
        assert all((a == b).all() for a, b in zip(before, prefix._value.tensors.arrays, strict=True))

    def test_all_of_a_prompt(self, loop: Pipeline) -> None:
        """The last token is computed again, as its logits were not kept."""
        ids = loop.encode("What is the capital of Japan?")
        reply = loop.generate(ids, prefix=loop.prefill(ids), **GREEDY)
        assert reply.token_ids == loop.generate(ids, **GREEDY).token_ids
        assert reply.metrics.reused_tokens == len(ids) - 1

    def test_progress(self, tiny_loop: Pipeline) -> None:
        told: list[tuple[int, int]] = []
        tiny_loop.prefill(list(range(900, 930)), on_prefill=lambda *at: told.append(at))
        assert told[0] == (0, 30)
        assert told[-1] == (30, 30)
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


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "what"),
        [
            ({"num_beams": 2}, "beam search"),
            ({"json_schema": {"type": "object"}}, "structured output"),
            ({"regex": "a+"}, "structured output"),
            ({"grammar": 'root ::= "a"'}, "structured output"),
            ({"num_assistant_tokens": 3}, "speculative decoding"),
        ],
    )
    def test_what_it_does_not_have(self, loop: Pipeline, options: dict[str, Any], what: str) -> None:
        with pytest.raises(ConfigError, match=f"{what}.*is not in backend='infer_request'"):
            loop.generate("x", **options)

    def test_properties_of_the_other_backend(self, tiny_fp32: Path, device: str) -> None:
        for config in ({"prompt_lookup": True}, {"ATTENTION_BACKEND": "PA"}):
            with pytest.raises(ConfigError, match="belongs to backend='llm_pipeline'"):
                ov_phi3.load(tiny_fp32, device=device, backend="infer_request", ov_config=config)
        with ov_phi3.load(
            tiny_fp32, device=device, backend="infer_request", ov_config={"ATTENTION_BACKEND": "SDPA"}
        ) as pipe:
            assert pipe.load_report.backend == "infer_request"

    def test_stops_and_ends(self, loop: Pipeline) -> None:
        whole = loop.generate("Name three fruits.", **GREEDY)
        assert whole.finish_reason in ("stop", "length")
        some = whole.text[5:9]
        stopped = loop.generate("Name three fruits.", stop=[some], **GREEDY)
        assert (stopped.finish_reason, stopped.stop_string) == ("stop", some)
        assert stopped.text == whole.text[: whole.text.index(some)]
        at = whole.token_ids[4]
        by_id = loop.generate("Name three fruits.", stop_token_ids=[at], **GREEDY)
        assert by_id.token_ids == whole.token_ids[: whole.token_ids.index(at) + 1]
        assert by_id.finish_reason == "stop"
        one = loop.generate("Name three fruits.", do_sample=False, max_new_tokens=1)
        assert (one.token_ids, one.finish_reason) == (whole.token_ids[:1], "length")

    def test_every_end_token_ends(self, loop: Pipeline) -> None:
        for end in loop.info.eos_token_ids:
            reply = loop.generate("Hi", logit_bias={end: 1e4}, **GREEDY)
            assert (reply.token_ids, reply.finish_reason) == ([end], "stop")
            kept = loop.generate("Hi", logit_bias={end: 1e4}, min_new_tokens=3, **GREEDY)
            assert len(kept.token_ids) == 4
            on = loop.generate("Hi", logit_bias={end: 1e4}, ignore_eos=True, do_sample=False, max_new_tokens=3)
            assert on.token_ids == [end] * 3

    @pytest.mark.parametrize(
        "options", [{"repetition_penalty": 1.3}, {"presence_penalty": 1.0}, {"frequency_penalty": 0.7}]
    )
    def test_penalties_are_the_other_backends(self, loop: Pipeline, other: Pipeline, options: dict[str, Any]) -> None:
        for question in QUESTIONS:
            mine = loop.generate(question, **GREEDY, **options)
            assert mine.token_ids == other.generate(question, **GREEDY, **options).token_ids

    def test_bias_out_of_the_vocabulary(self, loop: Pipeline) -> None:
        with pytest.raises(ConfigError, match="logit_bias holds 49152"):
            loop.generate("x", logit_bias={49152: 1.0})

    def test_openai(self) -> None:
        asked = {"logit_bias": {"50": -100}, "logprobs": True, "top_logprobs": 3}
        config = GenerationConfig.from_openai(asked)
        assert (config.logit_bias, config.top_logprobs) == (((50, -100.0),), 3)
        assert GenerationConfig.from_openai({"logprobs": True}).top_logprobs == 0
        assert GenerationConfig.from_openai({"logprobs": False, "top_logprobs": 0}).top_logprobs is None
        with pytest.raises(ConfigError, match="needs logprobs"):
            GenerationConfig.from_openai({"top_logprobs": 2})
        with pytest.raises(ConfigError, match="no counterpart in OpenVINO GenAI"):
            config.to_genai()

    @pytest.mark.parametrize(
        ("bias", "error"),
        [
            ({-1: 1.0}, ConfigError),
            ({1: math.nan}, ConfigError),
            ({1: "x"}, TypeError),
            ({"a": 1}, TypeError),
            (5, TypeError),
        ],
    )
    def test_wrong_biases(self, bias: Any, error: type[Exception]) -> None:
        with pytest.raises(error):
            GenerationConfig(logit_bias=bias)
        with pytest.raises(TypeError):
            GenerationConfig(logits_processors=[bias])

    def test_several_samples(self, loop: Pipeline) -> None:
        options: dict[str, Any] = {"num_return_sequences": 3, "temperature": 1.0, "seed": 3, "max_new_tokens": 8}
        reply = loop.generate("Name a colour.", **options)
        assert len(reply.alternatives) == 3
        assert [a.score for a in reply.alternatives] == sorted((a.score for a in reply.alternatives), reverse=True)
        for found in reply.alternatives:
            total = loop.score(reply.prompt_token_ids, found.token_ids).total
            assert found.score == pytest.approx(total, abs=1e-3)
        again = loop.generate("Name a colour.", **options)
        assert [a.token_ids for a in again.alternatives] == [a.token_ids for a in reply.alternatives]


class TestStreams:
    def test_cancel_and_go_on(self, loop: Pipeline) -> None:
        wanted = loop.generate("Tell me about the sea.", **GREEDY).token_ids
        stream = loop.stream("Tell me about the sea.", **GREEDY)
        for count, _ in enumerate(stream, 1):
            if count == 5:
                stream.cancel()
        assert stream.result.finish_reason == "cancelled"
        assert stream.result.token_ids == wanted[: len(stream.result.token_ids)]
        assert loop.generate("Tell me about the sea.", **GREEDY).token_ids == wanted

    def test_cancelled_between_pieces(self, demo_fp32: Path, device: str) -> None:
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
    def test_ended_within_one_piece(self, demo_fp32: Path, device: str, how: str, monkeypatch: Any) -> None:
        """A prompt is computed whole, and is given up in the middle of it."""
        from ov_phi3.engine import worker

        with ov_phi3.load(demo_fp32, device=device, backend="infer_request") as pipe:
            pipe.warmup()
            before = list(slots(pipe))
            ids = np.random.default_rng(0).integers(100, 40_000, 4000)
            begun = threading.Event()
            late = [0.0]
            real = worker.now
            monkeypatch.setattr(worker, "now", lambda: real() + late[0])
            stream = pipe.stream(ids, on_prefill=lambda *_: begun.set(), timeout=1000, max_new_tokens=5)
            begun.wait()
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
                assert slots(pipe) == before  # the slot whose state is not known is gone
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
        begun = threading.Event()
        errors: list[BaseException] = []

        def work() -> None:
            try:
                pipe.prefill(np.full(2000, 300), on_prefill=lambda *_: begun.set())
            except ov_phi3.Error as exc:
                errors.append(exc)

        thread = threading.Thread(target=work)
        thread.start()
        begun.wait()
        pipe.close()
        thread.join()
        assert isinstance(errors[0], ClosedError)


class TestSeeds:
    def test_the_same_whatever_else_runs(self, pipe_int4: Pipeline) -> None:
        """In int4, where the arithmetic of a cached prompt differs visibly from that of a whole one."""
        pipe = pipe_int4
        options: dict[str, Any] = {"temperature": 1.2, "seed": 9, "max_new_tokens": 40, "ignore_eos": True}
        prompts = [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": q}] for q in QUESTIONS]
        alone = [pipe.generate(p, **options).token_ids for p in prompts]
        assert [pipe.generate(p, **options).token_ids for p in prompts] == alone
        found: dict[int, list[int]] = {}

        def ask(number: int) -> None:
            if number % 2:
                pipe.generate(prompts[number % 5], max_new_tokens=20)
            else:
                found[number] = pipe.generate(prompts[number % 5], **options).token_ids

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {n: alone[n % 5] for n in range(0, 20, 2)}

    def test_a_seeded_chat(self, pipe_int4: Pipeline) -> None:
        options: dict[str, Any] = {"temperature": 1.0, "seed": 4, "max_new_tokens": 20}
        replies = []
        for _ in range(2):
            chat = pipe_int4.chat(system=SYSTEM)
            replies.append([chat.send(q, **options).token_ids for q in QUESTIONS[:3]])
            pipe_int4.generate([{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Else"}])
        assert replies[0] == replies[1]


@pytest.fixture(scope="module")
def pipe_int4(demo_int4: Path, device: str) -> Iterator[Pipeline]:
    with ov_phi3.load(demo_int4, device=device, backend="infer_request") as pipe:
        yield pipe


class TestScore:
    def test_is_the_references(self, loop: Pipeline, reference: Reference) -> None:
        import torch

        ids = loop.encode("What is the capital of Japan?").tolist()
        new = loop.tokenizer.encode("The capital of Japan is Tokyo, a city of many millions.").tolist()
        with torch.no_grad():
            logits = reference._model(torch.tensor([[*ids, *new]]), use_cache=False).logits[0].double()
        rows = torch.log_softmax(logits, -1)[len(ids) - 1 : -1]
        wanted = rows[torch.arange(len(new)), torch.tensor(new)].tolist()
        for prompt, continuation in ((ids, new), ("What is the capital of Japan?", new)):
            found = loop.score(prompt, continuation)
            assert found.logprobs == pytest.approx(wanted, abs=2e-3)
            assert found.total == pytest.approx(sum(wanted), abs=1e-2)
            assert found.perplexity == pytest.approx(math.exp(-sum(wanted) / len(wanted)), rel=1e-3)
        text = "The capital of Japan is Tokyo, a city of many millions."
        assert loop.score(ids, text).token_ids == new

    def test_in_pieces_and_after_a_prefix(self, demo_fp32: Path, device: str, loop: Pipeline) -> None:
        draw = np.random.default_rng(2)
        ids, new = draw.integers(100, 40_000, 150), draw.integers(100, 40_000, 130)
        wanted = loop.score(ids, new)
        with ov_phi3.load(demo_fp32, device=device, backend="infer_request", prefill_chunk=40) as pipe:
            assert pipe.score(ids, new).logprobs == pytest.approx(wanted.logprobs, abs=1e-3)
            prefix = pipe.prefill(ids[:100])
            assert pipe.score(ids[100:], new, prefix=prefix).logprobs == pytest.approx(wanted.logprobs, abs=1e-3)
        assert loop.score(ids, new[:1]).logprobs == pytest.approx(wanted.logprobs[:1], abs=1e-3)

    def test_across_the_longrope_boundary(self, longrope: tuple[Path, Path, int], device: str) -> None:
        import torch

        boundary = longrope[2]
        reference = Reference(longrope[1], boundary)
        ids = np.random.default_rng(4).integers(300, 31_000, boundary + 30).tolist()
        start = boundary - 20
        wanted = []
        with torch.no_grad():
            for at in range(start, len(ids)):
                row = reference._model(torch.tensor([ids[:at]]), use_cache=False).logits[0, -1].double()
                wanted.append(float(torch.log_softmax(row, -1)[ids[at]]))
        with ov_phi3.load(longrope[0], device=device, backend="infer_request", prefill_chunk=16) as pipe:
            assert pipe.score(ids[:start], ids[start:]).logprobs == pytest.approx(wanted, abs=2e-3)

    def test_refusals(self, loop: Pipeline) -> None:
        with pytest.raises(PromptError, match="continuation is empty"):
            loop.score("x", "")
        with pytest.raises(ContextOverflowError):
            loop.score("x", np.full(loop.context_length, 100))


def test_an_unknown_longrope_graph_is_computed_in_one_piece(
    longrope: tuple[Path, Path, int], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ov_phi3.backends.graph import UnknownGraph
    from ov_phi3.backends.protocol import graph

    def unknown(*_: object) -> str:
        raise UnknownGraph("its graph is new")

    monkeypatch.setattr(graph, "with_marked_ids", unknown)
    boundary = longrope[2]
    reference = Reference(longrope[1], boundary)
    ids = np.random.default_rng(6).integers(300, 31_000, 2 * boundary).tolist()
    with pytest.warns(ModelWarning, match="computed in one piece.*its graph is new"):
        pipe = ov_phi3.load(longrope[0], device=device, backend="infer_request", prefill_chunk=16)
    with pipe:
        for length in (boundary - 5, 2 * boundary, boundary + 3):
            reply = pipe.generate(ids[:length], ignore_eos=True, **GREEDY)
            assert reference.differences(ids[:length], reply.token_ids) == []


def test_prefix_shows_itself(tiny_loop: Pipeline) -> None:
    prefix = tiny_loop.prefill(list(range(300, 310)))
    assert isinstance(prefix, Prefix)
    assert repr(prefix).startswith("<Prefix of 10 tokens, ")
    assert prefix.dtype == "F32"
    assert prefix.nbytes == 10 * tiny_loop.info.kv_bytes_per_token_for(32)
