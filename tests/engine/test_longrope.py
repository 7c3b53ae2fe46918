"""LongRoPE: right below, at and past the boundary, in replies that cross it, and whatever was asked before."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from reference import Reference
from scripted import ScriptedBackend

import ov_phi3
from ov_phi3 import ConfigError, ModelWarning, Pipeline, TokenLogprob
from ov_phi3.backends.longrope_graph import UnknownGraph, mark_ids, with_marked_ids
from ov_phi3.engine.longrope import LongRope
from ov_phi3.engine.residency import ResidentBackend
from ov_phi3.engine.runner import Runner

Model = tuple[Path, Path, int]


@pytest.fixture(scope="module")
def reference(longrope: Model) -> Reference:
    return Reference(longrope[1], longrope[2])


@pytest.fixture(scope="module", params=["PA", "SDPA", "infer_request"])
def subject(request: pytest.FixtureRequest, longrope: Model, device: str) -> Iterator[Pipeline]:
    own = request.param == "infer_request"
    options: dict[str, Any] = {"backend": (own and "infer_request") or "llm_pipeline"}
    if not own:
        options["ov_config"] = {"ATTENTION_BACKEND": request.param}
    with ov_phi3.load(longrope[0], device=device, prefill_chunk=32, **options) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def paged(longrope: Model, device: str) -> Iterator[Pipeline]:
    with ov_phi3.load(longrope[0], device=device) as pipe:
        yield pipe


def drawn(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(300, 31_000, count).tolist()


def around(boundary: int) -> list[int]:
    """Lengths below, at and over the boundary, short ones before and after the long ones that begin with them."""
    return [
        boundary - 30,
        boundary - 1,
        boundary,
        boundary + 1,
        boundary + 9,
        3 * boundary,
        boundary // 2,
        2 * boundary + 5,
        boundary - 2,
    ]


def all_differences(pipe: Pipeline, reference: Reference, boundary: int, seed: int) -> dict[int, list[int]]:
    """Greedy replies of 40 tokens to prompts that are beginnings of each other, held against the reference."""
    ids = drawn(3 * boundary, seed)
    found = {}
    for length in around(boundary):
        reply = pipe.generate(ids[:length], max_new_tokens=40, ignore_eos=True, do_sample=False)
        assert len(reply.token_ids) == 40
        found[length] = reference.differences(ids[:length], reply.token_ids)
    return found


def test_every_side_of_the_boundary(subject: Pipeline, reference: Reference, longrope: Model) -> None:
    found = all_differences(subject, reference, longrope[2], seed=1)
    assert found == {length: [] for length in found}


@pytest.mark.parametrize("off", ["crossing", "marks"])
def test_the_check_fails_without_the_handling(
    longrope: Model, reference: Reference, device: str, monkeypatch: pytest.MonkeyPatch, off: str
) -> None:
    """What is shown above is not true by itself: neither of a reply that crosses, nor of a shared prefix."""
    if off == "marks":
        monkeypatch.setattr("ov_phi3.backends.llm_pipeline.mark_ids", lambda ids, _boundary: ids)
    else:
        monkeypatch.setattr("ov_phi3.loading.LongRope", lambda **_: LongRope())
    with ov_phi3.load(longrope[0], device=device) as pipe:
        found = all_differences(pipe, reference, longrope[2], seed=1)
    assert sum(map(len, found.values())) > 20


class TestCrossing:
    def test_costs_one_prefill_once(self, paged: Pipeline, longrope: Model) -> None:
        boundary = longrope[2]
        ids = drawn(boundary - 10, seed=2)
        first = paged.generate(ids, max_new_tokens=60, ignore_eos=True, do_sample=False)
        assert first.metrics.recomputed_tokens == boundary + 1
        assert first.metrics.generated_tokens == len(first.token_ids) == 60
        assert f"{boundary + 1} tokens computed again" in str(first.metrics)
        # What follows on from there finds the second side in the cache, and what begins anew the first.
        following = paged.generate([*ids, *first.token_ids, 5], max_new_tokens=5, ignore_eos=True, do_sample=False)
        assert following.metrics.recomputed_tokens == 0
        assert following.metrics.reused_tokens == len(ids) + 60 - 1
        again = paged.generate(ids, max_new_tokens=5, ignore_eos=True, do_sample=False)
        assert again.metrics.recomputed_tokens == 0
        assert (again.metrics.reused_tokens or 0) >= len(ids) - len(ids) % 32 - 32
        assert again.token_ids == first.token_ids[:5]

    def test_the_last_token_is_not_fed_back(self, paged: Pipeline, longrope: Model) -> None:
        boundary = longrope[2]
        ids = drawn(boundary - 10, seed=3)
        reply = paged.generate(ids, max_new_tokens=11, ignore_eos=True, do_sample=False)
        assert reply.metrics.recomputed_tokens == 0
        assert paged.generate(ids, max_new_tokens=12, ignore_eos=True).metrics.recomputed_tokens > 0

    def test_a_reply_that_ends_there(self, paged: Pipeline, longrope: Model) -> None:
        """An end token, a stop or a cancel just before the boundary ends the reply; nothing is computed again."""
        boundary = longrope[2]
        ids = drawn(boundary - 3, seed=4)
        reply = paged.generate(ids, max_new_tokens=30, ignore_eos=True, do_sample=False)
        at = reply.token_ids[3]  # the last one before the crossing
        if at in reply.token_ids[:3]:
            pytest.skip("the model repeats itself here")
        ended = paged.generate(ids, max_new_tokens=30, ignore_eos=True, stop_token_ids=[at], do_sample=False)
        assert (ended.finish_reason, ended.token_ids) == ("stop", reply.token_ids[:4])
        assert ended.metrics.recomputed_tokens == 0
        stream = paged.stream(ids, max_new_tokens=30, ignore_eos=True, do_sample=False)
        for count, _ in enumerate(stream, 1):
            if count == 2:
                stream.cancel()
        assert stream.result.finish_reason == "cancelled"
        assert stream.result.token_ids == reply.token_ids[: len(stream.result.token_ids)]

    def test_sampling_goes_on(self, paged: Pipeline, longrope: Model) -> None:
        ids = drawn(longrope[2] - 10, seed=5)
        options: dict[str, Any] = {"max_new_tokens": 40, "ignore_eos": True, "temperature": 1.0, "seed": 3}
        first, second = (paged.generate(ids, **options) for _ in range(2))
        assert first.token_ids == second.token_ids
        assert len(first.token_ids) == 40

    def test_streams_without_a_seam(self, paged: Pipeline, longrope: Model) -> None:
        ids = drawn(longrope[2] - 5, seed=6)
        stream = paged.stream(ids, max_new_tokens=20, ignore_eos=True, do_sample=False)
        chunks = list(stream)
        assert [i for c in chunks for i in c.token_ids] == stream.result.token_ids
        text = paged.tokenizer.decode(stream.result.token_ids, after=ids)
        assert "".join(c.text for c in chunks) == stream.result.text == text
        assert stream.result.finish_reason == "length"


def test_what_the_engine_is_asked_for() -> None:
    """Two requests that add up to one: no length, end or random number twice."""
    backend = ScriptedBackend([[5]] * 4)
    config = ov_phi3.GenerationConfig(max_new_tokens=9, min_new_tokens=6, temperature=1.0, seed=7).resolve(room=99)
    request = ov_phi3.Request(np.arange(7, dtype=np.int64), config, (2,))
    seen: list[int] = []

    def sink(ids: Sequence[int], logprobs: Sequence[TokenLogprob] = ()) -> bool:
        seen.extend(ids)
        return True

    report = Runner(ResidentBackend(backend, lambda: backend), LongRope(boundary=10)).generate(
        request, sink, lambda *_: True
    )
    first, second = backend.requests
    assert (first.ids.tolist(), first.long_rope) == (list(range(7)), False)
    assert (first.config.max_new_tokens, first.config.min_new_tokens, first.config.seed) == (4, 4, 7)
    assert (second.ids.tolist(), second.long_rope) == ([*range(7), 5, 5, 5, 5], True)
    assert (second.config.max_new_tokens, second.config.min_new_tokens) == (5, 2)
    assert second.config.seed not in (None, 7)
    assert (len(seen), report.recomputed_tokens) == (8, 11)


def test_a_chat_crosses_is_rewound_and_crosses_again(subject: Pipeline, reference: Reference, longrope: Model) -> None:
    boundary = longrope[2]
    chat = subject.chat(system="You are brief.")

    def turns(word: str) -> list[ov_phi3.GenerationResult]:
        done = []
        while len(chat.token_ids) < boundary + 90:
            text = f"Tell me something about {word} {len(chat.messages)}."
            result = chat.send(text, max_new_tokens=15, ignore_eos=True, do_sample=False)
            assert reference.differences(result.prompt_token_ids, result.token_ids) == []
            done.append(result)
        return done

    first = turns("rivers")
    back = sum(len(r.prompt_token_ids) + 30 > boundary for r in first) + 1
    chat.rewind(min(back, len(first)))
    assert len(chat.token_ids) < boundary
    second = turns("mountains")
    for results in (first, second):
        # From side to side once: by the reply that crosses, or by the prompt that is past it.
        recomputed = [r for r in results if r.metrics.recomputed_tokens]
        cold = [r for r in results if len(r.prompt_token_ids) > boundary and not r.metrics.reused_tokens]
        if subject.load_report.ov_config.get("ATTENTION_BACKEND") != "SDPA":
            assert len(recomputed) + len(cold) <= 1


class TestOptionsThatCannotCross:
    @pytest.mark.parametrize(
        "options",
        [{"presence_penalty": 0.5}, {"frequency_penalty": 0.5}, {"regex": "[a-z]+"}, {"num_beams": 2}],
        ids=lambda o: next(iter(o)),
    )
    def test_end_at_the_boundary_or_are_refused(
        self, paged: Pipeline, longrope: Model, options: dict[str, Any]
    ) -> None:
        boundary = longrope[2]
        ids = drawn(boundary - 10, seed=7)
        name = next(iter(options))
        with pytest.raises(ConfigError, match=rf"{name}.* {boundary} tokens.*at most 11 new"):
            paged.generate(ids, max_new_tokens=12, **options)
        assert len(paged.generate(ids, ignore_eos=name != "regex", **options).token_ids) <= 11
        assert paged.generate(ids, max_new_tokens=11, **options).token_ids
        assert paged.generate(drawn(boundary + 5), max_new_tokens=12, **options).token_ids

    def test_repetition_penalty_past_it(self, paged: Pipeline, longrope: Model, device: str) -> None:
        """It reads the prompt's ids, so it must see the real ones."""
        ids = drawn(longrope[2] + 20, seed=8)
        options: dict[str, Any] = {"max_new_tokens": 20, "ignore_eos": True, "repetition_penalty": 1.5}
        paged.generate(ids[: longrope[2] // 2], max_new_tokens=2)
        result = paged.generate(ids, **options)
        assert result.metrics.reused_tokens == 0
        with ov_phi3.load(longrope[0], device=device, ov_config={"ATTENTION_BACKEND": "SDPA"}) as fresh:
            assert fresh.generate(ids, **options).token_ids == result.token_ids

    def test_prompt_lookup(self, longrope: Model, reference: Reference, device: str) -> None:
        boundary = longrope[2]
        phrase = drawn(boundary // 4, seed=9)
        with pytest.warns(ModelWarning, match="without a prefix cache"):
            lookup = ov_phi3.load(longrope[0], device=device, ov_config={"prompt_lookup": True})
        with lookup:
            for ids in ((phrase * 4)[: boundary - 20], phrase * 6, (phrase * 4)[: boundary - 9]):
                reply = lookup.generate(ids, ignore_eos=True, max_new_tokens=None if len(ids) < boundary else 20)
                assert reply.token_ids
                assert reference.differences(ids, reply.token_ids) == []
            with pytest.raises(ConfigError, match="speculative decoding"):
                lookup.generate(phrase, max_new_tokens=boundary)


class TestTheGraph:
    def test_marks_are_undone(self) -> None:
        ids = np.array([0, 5, 32_000, 7, 9], dtype=np.int64)
        marked = mark_ids(ids, 3)
        assert marked.tolist() == [-1, -6, -32_001, 7, 9]
        assert np.maximum(marked, -1 - marked).tolist() == ids.tolist()

    def test_an_edited_model_is_the_model(self, longrope: Model) -> None:
        """Plain ids give the same logits as before the edit; marked ones give those of the long factors."""
        import openvino

        path, _, boundary = longrope
        core = openvino.Core()
        weights = openvino.Tensor(np.fromfile(path / "openvino_model.bin", dtype=np.uint8))
        models = (
            core.read_model(path / "openvino_model.xml"),
            core.read_model(with_marked_ids(path / "openvino_model.xml", boundary), weights),
        )
        before, after = (core.compile_model(m, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}) for m in models)

        def logits(compiled: Any, ids: Any) -> Any:
            ids = np.array([ids], dtype=np.int64)
            request = compiled.create_infer_request()
            inputs = {
                "input_ids": ids,
                "attention_mask": np.ones_like(ids),
                "position_ids": np.arange(ids.size, dtype=np.int64)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
            return request.infer(inputs)[compiled.output("logits")][0].copy()

        short, long = drawn(boundary - 4), drawn(boundary + 4)
        np.testing.assert_array_equal(logits(after, short), logits(before, short))
        np.testing.assert_array_equal(logits(after, long), logits(before, long))
        marked = mark_ids(np.array(long, dtype=np.int64), boundary)
        np.testing.assert_array_equal(logits(after, marked), logits(before, long))
        # A first piece of a long prompt: as the beginning of the whole, and not as a short prompt.
        np.testing.assert_allclose(logits(after, marked[:8]), logits(before, long)[:8], atol=1e-3)
        assert np.abs(logits(after, long[:8]) - logits(before, long)[:8]).max() > 0.1

    def test_a_graph_that_is_not_known(
        self, longrope: Model, reference: Reference, device: str, tmp_path: Path
    ) -> None:
        """Without the edit there is no prefix cache, and everything stays right."""
        path, _, boundary = longrope
        other = tmp_path / "model"
        shutil.copytree(path, other)
        xml = other / "openvino_model.xml"
        # The same choice in other words: boundary < length instead of length > boundary.
        tree = ET.parse(xml)
        greater = next(x for x in tree.iter("layer") if x.get("type") == "Greater" and "rotary" in x.get("name", ""))
        greater.set("type", "Less")
        for edge in tree.iter("edge"):
            if edge.get("to-layer") == greater.get("id"):
                edge.set("to-port", "1" if edge.get("to-port") == "0" else "0")
        tree.write(xml)
        with pytest.raises(UnknownGraph):
            with_marked_ids(xml, boundary)
        with pytest.warns(ModelWarning, match="without a prefix cache .*export it again"):
            pipe = ov_phi3.load(other, device=device)
        with pipe:
            found = all_differences(pipe, reference, boundary, seed=1)
            assert found == {length: [] for length in found}
            assert pipe.generate(drawn(50), max_new_tokens=2).metrics.reused_tokens == 0


def test_other_models_pay_nothing(tiny_pipe: Pipeline) -> None:
    assert tiny_pipe.engine._runner.long_rope == LongRope()
    backend: Any = tiny_pipe.engine.check_open()
    assert not backend._backend._marks_ids
