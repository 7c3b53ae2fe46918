"""Drafts by a draft model: the same replies as without, on the real models in float32, and how many are made."""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import paged
import pytest
from drafting import time_with_drafts

import ov_phi3
from ov_phi3 import ConfigError, Pipeline
from ov_phi3.backends.paged.draft_model import DraftModel, DraftSequence, ModelDrafter
from ov_phi3.backends.paged.drafter import LookupDrafter
from ov_phi3.backends.paged.model_runner import ModelRunner
from ov_phi3.backends.paged.step_costs import StepCosts

PROMPT = "Tell me about the capital of France."
LARGE = StepCosts({1: 1.0, 2: 1.35, 3: 1.5, 4: 1.64, 6: 1.71, 8: 2.05, 12: 2.65, 16: 3.25}, seconds=0.1)
SMALL = StepCosts({rows: 0.95 + 0.05 * rows for rows in LARGE.rows}, change=0.5, seconds=0.004)


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
        assert (pipe.generate([7, 8, 9], num_assistant_tokens=3, **options).metrics.drafted_tokens or 0) > 0


def test_refused(tiny_fp32: Path, demo_int4: Path, demo_fp32: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"another vocabulary.*\(32064 and 49152 tokens\): token 0 is '<unk>'"):
        ov_phi3.load(demo_fp32, draft_model=tiny_fp32)
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


def test_on_llm_pipeline(demo_fp32: Path, demo_int4: Path, loop: Pipeline, device: str) -> None:
    """GenAI's own draft model, by the same name."""
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "ignore_eos": True}
    plain = loop.generate(PROMPT, speculation="off", **options)
    with ov_phi3.load(demo_fp32, device, backend="llm_pipeline", draft_model=demo_int4) as pipe:
        assert pipe.load_report.ov_config["draft_model"] == str(demo_int4)
        assert pipe.generate(PROMPT, num_assistant_tokens=3, **options).token_ids == plain.token_ids
        with pytest.raises(ConfigError, match="max_ngram_size contradicts the draft model"):
            pipe.generate(PROMPT, num_assistant_tokens=3, max_ngram_size=2)
    with pytest.raises(ConfigError, match="concurrency=2 needs a pipeline without draft_model"):
        ov_phi3.load(demo_fp32, device, backend="llm_pipeline", draft_model=demo_int4, concurrency=2)


# -- how many ----------------------------------------------------------------------------------------------------------


class Scripted:
    """A sequence of a draft model that is right with some probability, and a model whose passes cost something."""

    def __init__(self, reply: list[int], right: float, each: float, confident: bool) -> None:
        self.reply, self.right, self.each, self.confident = reply, right, each, confident
        self.at, self.passes = 0, 0
        self.draw = random.Random(1)
        self.lag = 1
        self.costs = StepCosts({1: 1.0, 16: 2.0})

    def pass_cost(self, _: StepCosts) -> float:
        return self.each

    def room(self, most: int) -> int:
        return most

    def add(self, _: int) -> None:
        self.at += 1

    def draft(self, count: int, proceed: Callable[[float], bool] = lambda _: True) -> list[int]:
        drafts: list[int] = []
        while len(drafts) < count:
            is_right = self.draw.random() < self.right
            at = self.at + len(drafts)
            drafts.append(self.reply[at] if is_right and at < len(self.reply) else -1)
            self.passes += 1
            if not proceed((0.97 if is_right else 0.4) if self.confident else 0.8):
                break
        return drafts


def time_of(
    right: float, each: float, costs: StepCosts = LARGE, *, confident: bool = False, alone: bool = True
) -> float:
    """Time of a reply of 200 tokens, in steps of one token per token."""
    reply = random.Random(2).sample(range(100, 5000), 200)
    stub = Scripted(reply, right, each, confident)
    drafter = ModelDrafter(
        cast("DraftSequence", stub), LookupDrafter([], lambda: costs), cast("DraftModel", stub), lambda: costs,
        lambda: alone,
    )  # fmt: skip
    drafter.add(reply[:1])
    time = time_with_drafts(drafter, reply, costs)
    return (time + stub.passes * each) / (len(reply) - 1)


class TestNumber:
    def test_follows_from_chances_and_costs(self) -> None:
        assert time_of(0.95, 0.05) < 0.5
        assert time_of(0.7, 0.05) < 0.75
        assert time_of(0.95, 0.05, SMALL) < 0.45
        assert time_of(0.95, 0.9) < 1.06  # a pass costs as much as a step

    @pytest.mark.parametrize("costs", [LARGE, SMALL], ids=["large", "small"])
    def test_wrong_drafts_cost_little(self, costs: StepCosts) -> None:
        for right in (0.0, 0.1, 0.3):
            assert time_of(right, 0.1, costs) < 1.05

    def test_unlikely_drafts_end_the_passes(self) -> None:
        assert time_of(0.7, 0.1, confident=True) < time_of(0.7, 0.1)

    def test_none_where_others_run(self) -> None:
        assert time_of(0.95, 0.05, alone=False) == 1.0
