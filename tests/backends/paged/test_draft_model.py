"""Drafts by a draft model: the same replies as without, on the real models in float32."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import paged
import pytest

import ov_phi3
from ov_phi3 import ConfigError, Pipeline
from ov_phi3.backends.paged.draft_model import DraftModel, DraftSequence
from ov_phi3.backends.paged.model_runner import ModelRunner
from ov_phi3.backends.protocol import Request
from ov_phi3.draft_models import read_draft_model

PROMPT = "Tell me about the capital of France."


@pytest.fixture(scope="module")
def drafted(demo_fp32: Path, demo_int4: Path, device: str) -> Iterator[Pipeline]:
    with ov_phi3.load(demo_fp32, device, draft_model=demo_int4) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def own_draft(tiny_fp32: Path, device: str) -> Iterator[Pipeline]:
    """A model that drafts for itself: every draft is right."""
    with ov_phi3.load(tiny_fp32, device, draft_model=tiny_fp32, concurrency=3) as pipe:
        yield pipe


def draft_of(pipe: Pipeline) -> DraftModel:
    """The draft model of a pipeline, none of whose blocks are in use."""
    paged.blocks_of(pipe)
    backend: Any = pipe.engine.check_open()
    draft = backend._backend._draft
    assert isinstance(draft, DraftModel)
    draft.cache.blocks.check([])
    return draft


def request_of(ids: Any) -> Request:
    return Request(np.asarray(ids, dtype=np.int64), ov_phi3.GenerationConfig(), ())


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.05, "presence_penalty": 0.1},
        {"temperature": 1.0, "seed": 5},
        {"do_sample": False, "top_logprobs": 2},
        {"do_sample": False, "stop": ["city"]},
    ],
    ids=lambda options: ",".join(options),
)
@pytest.mark.parametrize("number", [{}, {"num_assistant_tokens": 3}], ids=["auto", "fixed"])
def test_the_reply_is_the_same(drafted: Pipeline, options: dict[str, Any], number: dict[str, int]) -> None:
    options = {"max_new_tokens": 40, "ignore_eos": True, **options}
    paged.evict_all(drafted)
    plain = drafted.generate(PROMPT, speculation="off", **options)
    paged.evict_all(drafted)
    reply = drafted.generate(PROMPT, **number, **options)
    draft_of(drafted)
    assert plain.metrics.drafted_tokens == 0
    assert (reply.token_ids, reply.text, reply.finish_reason) == (plain.token_ids, plain.text, plain.finish_reason)
    for mine, theirs in zip(reply.logprobs, plain.logprobs, strict=True):
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-3)
    if number:
        assert (reply.metrics.accepted_tokens or 0) > 0
    if number and options.get("do_sample") is False and "repetition_penalty" not in options:
        assert (reply.metrics.tokens_per_step or 0) > 1.5


def test_right_drafts_are_all_accepted(own_draft: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind drafts that were accepted as a whole, the draft model computes what the model does."""
    passes = paged.Passes(monkeypatch)
    reply = own_draft.generate(PROMPT, num_assistant_tokens=4, max_new_tokens=41, do_sample=False, ignore_eos=True)
    assert (reply.metrics.drafted_tokens, reply.metrics.accepted_tokens, reply.metrics.steps) == (32, 32, 9)
    assert len(passes.tokens) <= 9 + 32 + 8  # those of the model, of the drafts, and one behind each accepted whole
    draft_of(own_draft)


def test_wrong_drafts_are_undone(own_draft: Pipeline) -> None:
    """A processor makes every fourth token another one than the draft model expects."""
    count = 0

    def disturb(ids: Any, logits: Any) -> Any:
        nonlocal count
        count += 1
        if len(ids) % 4 == 0:
            logits[int(logits.argmax())] = -np.inf
        return logits

    options: dict[str, Any] = {"logits_processors": [disturb], "max_new_tokens": 48, "do_sample": False}
    plain = own_draft.generate(PROMPT, speculation="off", ignore_eos=True, **options)
    reply = own_draft.generate(PROMPT, num_assistant_tokens=6, ignore_eos=True, **options)
    draft_of(own_draft)
    assert reply.token_ids == plain.token_ids
    assert reply.metrics.steps == pytest.approx(13, abs=2)  # up to the next wrong draft, every time
    assert count == 2 * 48


def test_a_structure_holds(drafted: Pipeline) -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 12}}, "required": ["city"]}
    options: dict[str, Any] = {"json_schema": schema, "do_sample": False, "max_new_tokens": 60}
    plain = drafted.generate(PROMPT, speculation="off", **options)
    reply = drafted.generate(PROMPT, num_assistant_tokens=3, **options)
    draft_of(drafted)
    assert reply.token_ids == plain.token_ids
    assert (reply.metrics.forced_tokens or 0) > 0
    assert (reply.metrics.drafted_tokens or 0) > 0


def test_several_at_once(own_draft: Pipeline) -> None:
    """Callers, samples and beams: equal replies, and no block of the draft model stays in use."""
    prompts = [PROMPT, "One, two, three", "Name a colour. " * 20]
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "ignore_eos": True}
    plain = [own_draft.generate(prompt, speculation="off", **options).token_ids for prompt in prompts]
    for number in ({}, {"num_assistant_tokens": 2}):
        replies: dict[int, list[int]] = {}

        def ask(index: int, number: dict[str, int] = number, replies: dict[int, list[int]] = replies) -> None:
            replies[index] = own_draft.generate(prompts[index], **number, **options).token_ids

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        draft_of(own_draft)
        assert [replies[index] for index in range(len(prompts))] == plain
    samples: dict[str, Any] = {"temperature": 0.8, "top_k": 20, "seed": 3, "num_return_sequences": 3}
    several = [
        own_draft.generate(PROMPT, max_new_tokens=16, **samples, **number)
        for number in ({"speculation": "off"}, {"num_assistant_tokens": 2})
    ]
    draft_of(own_draft)
    one, other = ([reply.token_ids for reply in (result, *result.alternatives)] for result in several)
    assert one == other
    beams = own_draft.generate(PROMPT, max_new_tokens=8, num_beams=2)
    assert len(beams.token_ids) > 0


def test_a_chat_finds_its_conversation_in_the_draft_model_too(
    own_draft: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "ignore_eos": True, "num_assistant_tokens": 3}
    chat = own_draft.chat()
    chat.send("Name a colour. " * 30, **options)
    passes = paged.Passes(monkeypatch)
    chat.send("And another one.", **options)
    assert max(passes.tokens) < 60  # the conversation has more than 100 tokens
    draft_of(own_draft)


def test_across_the_long_rope_boundary(longrope: tuple[Path, Path, int], device: str) -> None:
    """The boundary of the model, and that of the draft model."""
    model, _, boundary = longrope
    with ov_phi3.load(model, device, draft_model=model) as pipe:
        ids = np.arange(7, 7 + boundary - 12)
        options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "ignore_eos": True}
        plain = pipe.generate(ids, speculation="off", **options)
        for number in ({}, {"num_assistant_tokens": 4}):
            paged.evict_all(pipe)
            reply = pipe.generate(ids, **number, **options)
            draft_of(pipe)
            assert reply.token_ids == plain.token_ids
            assert reply.metrics.recomputed_tokens == boundary + 1
            if number:  # otherwise lookup may draft too, and what fills up a step
                assert reply.metrics.accepted_tokens == reply.metrics.drafted_tokens


def test_a_draft_model_that_is_always_wrong_stops(
    tiny_fp32: Path, longrope: tuple[Path, Path, int], device: str
) -> None:
    with ov_phi3.load(tiny_fp32, device, draft_model=longrope[0]) as pipe:
        options: dict[str, Any] = {"max_new_tokens": 60, "temperature": 2.0, "seed": 1, "ignore_eos": True}
        plain = pipe.generate(PROMPT, speculation="off", **options)
        paged.evict_all(pipe)
        reply = pipe.generate(PROMPT, **options)
        assert reply.token_ids == plain.token_ids
        assert (reply.metrics.drafted_tokens or 0) < 60
        draft_of(pipe)


def test_cancel_unload_and_failures_leave_it_usable(own_draft: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "ignore_eos": True, "num_assistant_tokens": 3}
    plain = own_draft.generate(PROMPT, **options)
    stream = own_draft.stream(PROMPT, **{**options, "max_new_tokens": 500})
    for _ in stream:
        stream.cancel()
    assert stream.result.finish_reason == "cancelled"
    draft = draft_of(own_draft)
    real, calls = ModelRunner.run, [0]

    def fail(runner: ModelRunner, *args: Any) -> Any:
        calls[0] += runner is draft.runner
        if runner is draft.runner and calls[0] == 4:
            raise RuntimeError("the device is gone")
        return real(runner, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "run", fail)
        with pytest.raises(ov_phi3.Error, match="the device is gone"):
            own_draft.generate(PROMPT, **options)
    draft_of(own_draft)
    assert own_draft.generate(PROMPT, **options).token_ids == plain.token_ids
    own_draft.unload()
    with pytest.raises(AttributeError):
        _ = draft.runner.pool  # its cache has left memory too
    again = own_draft.generate(PROMPT, **options)
    assert again.token_ids == plain.token_ids
    assert again.metrics.accepted_tokens == plain.metrics.accepted_tokens


def test_ids_that_pad_the_vocabulary_may_differ(tiny_fp32: Path, tmp_path: Path, device: str) -> None:
    """A draft model without the last ids, which no text has: it drafts until one of them comes."""
    info = ov_phi3.ModelInfo.from_dir(tiny_fp32)
    with ov_phi3.load(tiny_fp32, device, draft_model=tiny_fp32) as pipe:
        draft = draft_of(pipe)
        draft.vocab_size = info.vocab_size - 8
        options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "ignore_eos": True}
        ids = [7, 8, info.vocab_size - 2, 9]
        reply = pipe.generate(ids, num_assistant_tokens=3, **options)
        assert reply.metrics.drafted_tokens == 0
        assert reply.token_ids == pipe.generate(ids, speculation="off", **options).token_ids
        plain = pipe.generate([7, 8, 9], num_assistant_tokens=3, **options)
        assert (plain.metrics.drafted_tokens or 0) > 0
        draft = draft_of(pipe)
        draft.vocab_size = max(plain.token_ids)  # as if this one only padded the model's vocabulary
        sequence = DraftSequence(draft, request_of([7, 8, 9]))
        assert max(sequence.draft(12)) < draft.vocab_size
        for token in plain.token_ids:
            sequence.add(token)
        assert sequence.draft(3) == []
        sequence.close()
        draft_of(pipe)


def test_past_its_context_length_it_drafts_nothing(tiny_fp32: Path, device: str) -> None:
    with ov_phi3.load(tiny_fp32, device, draft_model=tiny_fp32) as pipe:
        prompt = pipe.encode(PROMPT)
        draft_of(pipe).context_length = len(prompt) + 10
        options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "ignore_eos": True}
        reply = pipe.generate(prompt, num_assistant_tokens=4, **options)
        assert reply.token_ids == pipe.generate(prompt, speculation="off", **options).token_ids
        assert reply.metrics.drafted_tokens == reply.metrics.accepted_tokens == 8  # behind 1 and 6 tokens
        draft_of(pipe)


def test_the_probability_of_each_draft_decides_about_the_next(own_draft: Pipeline) -> None:
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "ignore_eos": True, "top_logprobs": 1}
    reply = own_draft.generate(PROMPT, speculation="off", **options)
    draft = draft_of(own_draft)
    seen: list[float] = []

    def proceed(probability: float) -> bool:
        seen.append(probability)
        return len(seen) != 3

    sequence = DraftSequence(draft, request_of(own_draft.encode(PROMPT)))
    assert sequence.draft(10, proceed) == reply.token_ids
    assert seen == pytest.approx([float(np.exp(token.logprob)) for token in reply.logprobs], rel=1e-3)
    sequence.close()
    draft_of(own_draft)


def test_behind_wrong_drafts_it_guesses_as_if_there_had_been_none(own_draft: Pipeline) -> None:
    """Also where the next tokens come without drafts: what is cached for the wrong ones is computed again."""
    draft, ids = draft_of(own_draft), own_draft.encode(PROMPT)
    sequence = DraftSequence(draft, request_of(ids))
    wrong = sequence.draft(8)
    others = [token + 1 for token in wrong[:5]]
    for token in others:
        sequence.add(token)
    seen: list[list[float]] = [[], []]
    drafts = sequence.draft(6, lambda probability: seen[0].append(probability) is None)
    sequence.close()
    draft.cache.blocks.forget(list(draft.cache.blocks._cached))
    fresh = DraftSequence(draft, request_of(np.concatenate([ids, others])))
    assert drafts == fresh.draft(6, lambda probability: seen[1].append(probability) is None)
    assert seen[0] == pytest.approx(seen[1], rel=1e-3)
    fresh.close()
    draft_of(own_draft)


def test_after_a_pass_that_failed_only_whole_blocks_before_it_count(
    own_draft: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = draft_of(own_draft)
    size = draft.runner.block_size
    sequence = DraftSequence(draft, request_of(np.arange(7, 7 + size + 5)))
    for token in sequence.draft(2):
        sequence.add(token + 1)

    def fail(*_: Any) -> Any:
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "run", fail)
        with pytest.raises(RuntimeError, match="the device is gone"):
            sequence.draft(2)
    assert sequence._sequence.num_cached == size  # what the last block holds is unknown
    assert len(sequence.draft(2)) == 2
    sequence.close()
    draft_of(own_draft)


def test_at_its_own_long_rope_boundary(
    longrope: tuple[Path, Path, int], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is drafted past it, and behind it everything is computed again, as by the model itself."""
    model, _, boundary = longrope
    with ov_phi3.load(model, device, draft_model=model) as pipe:
        ids = np.arange(7, 7 + boundary - 3)
        draft = draft_of(pipe)
        sequence = DraftSequence(draft, request_of(ids))
        drafts = sequence.draft(10)
        assert len(drafts) == 3
        for token in drafts:
            sequence.add(token)
        assert sequence.draft(10) == []
        sequence.add(drafts[0])
        options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "ignore_eos": True, "speculation": "off"}
        behind = pipe.generate([*ids.tolist(), *drafts, drafts[0]], **options)
        assert sequence.draft(6) == behind.token_ids
        for token in behind.token_ids:
            sequence.add(token)
        passes = paged.Passes(monkeypatch)
        assert len(sequence.draft(2)) == 2
        assert max(passes.tokens) == 1  # computed again once
        sequence.close()
        draft_of(pipe)


def test_refused(
    tiny_fp32: Path, demo_int4: Path, demo_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"another vocabulary.*\(32064 and 49152 tokens\): token 0 is '<unk>'"):
        ov_phi3.load(demo_fp32, draft_model=tiny_fp32)
    info = ov_phi3.ModelInfo.from_dir(tiny_fp32)
    smaller = dataclasses.replace(info, vocab_size=31000)
    with monkeypatch.context() as patch:
        patch.setattr(ov_phi3.ModelInfo, "from_dir", lambda _: smaller)
        with pytest.raises(ConfigError, match="token 31000 is no text there and"):
            read_draft_model(tiny_fp32, info)
    with pytest.raises(ConfigError, match="draft_device='CPU' is for a draft model"):
        ov_phi3.load(tiny_fp32, draft_device="CPU")
    with pytest.raises(ov_phi3.ModelError, match="does not exist"):
        ov_phi3.load(tiny_fp32, draft_model=tmp_path / "none")
    with pytest.raises(TypeError):
        ov_phi3.load(tiny_fp32, draft_model=3)  # type: ignore[arg-type]
    with pytest.raises(ov_phi3.DeviceError):
        ov_phi3.load(tiny_fp32, "CPU", draft_model=tiny_fp32, draft_device="GPU.7")
    shutil.copytree(demo_int4, tmp_path / "cut")
    (tmp_path / "cut" / "openvino_model.bin").unlink()
    with pytest.raises(ov_phi3.ModelError, match=r"openvino_model\.bin"):
        ov_phi3.load(demo_fp32, draft_model=tmp_path / "cut")


def test_the_load_report_names_it(own_draft: Pipeline, tiny_fp32: Path, demo_fp32: Path, demo_int4: Path) -> None:
    report = own_draft.load_report
    assert report.draft is not None
    assert (report.draft.path, report.draft.device) == (tiny_fp32, own_draft.device.name)
    assert report.draft.weight_bytes == (tiny_fp32 / "openvino_model.bin").stat().st_size
    assert 0 < (report.draft.load_ms or 0) < report.model_ms
    assert str(tiny_fp32) in str(report)
    with ov_phi3.load(demo_fp32, "CPU", backend="llm_pipeline", draft_model=demo_int4, draft_device="CPU") as pipe:
        assert pipe.load_report.draft is not None
        assert (pipe.load_report.draft.path, pipe.load_report.draft.load_ms) == (demo_int4, None)
    with ov_phi3.load(tiny_fp32, "CPU") as pipe:
        assert pipe.load_report.draft is None


def test_on_llm_pipeline(demo_fp32: Path, demo_int4: Path, loop: Pipeline, device: str) -> None:
    """GenAI's own draft model, by the same name."""
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "ignore_eos": True}
    plain = loop.generate(PROMPT, speculation="off", **options)
    with ov_phi3.load(demo_fp32, device, backend="llm_pipeline", draft_model=demo_int4) as pipe:
        assert pipe.load_report.ov_config["draft_model"] == str(demo_int4)
        assert pipe.generate(PROMPT, num_assistant_tokens=3, **options).token_ids == plain.token_ids
        with pytest.raises(ConfigError, match="max_ngram_size contradicts the draft model"):
            pipe.generate(PROMPT, num_assistant_tokens=3, max_ngram_size=2)
