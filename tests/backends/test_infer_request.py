"""Our own engine: the ids of the other backend and of the recomputed model, and its options."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from questions import GREEDY, QUESTIONS, SYSTEM
from reference import Reference

import ov_phi3
from ov_phi3 import ConfigError, GenerationConfig, ModelError, Pipeline


@pytest.fixture(scope="module")
def reference(demo_hf: Path) -> Reference:
    return Reference(demo_hf)


@pytest.fixture(scope="module")
def other(demo_fp32: Path, device: str) -> Iterator[Pipeline]:
    with ov_phi3.load(demo_fp32, device=device) as pipe:
        yield pipe


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

    def test_chunks(self, demo_fp32: Path, device: str, loop: Pipeline) -> None:
        """A prompt prefilled in chunks gets the reply of a prompt prefilled whole."""
        ids = np.random.default_rng(5).integers(100, 40_000, 700)
        whole = loop.generate(ids, ignore_eos=True, **GREEDY)
        progress: list[tuple[int, int]] = []
        with ov_phi3.load(demo_fp32, device=device, backend="infer_request", prefill_chunk=100) as pipe:
            chunked = pipe.generate(ids, ignore_eos=True, on_prefill=lambda *at: progress.append(at), **GREEDY)
        assert chunked.token_ids == whole.token_ids
        assert progress == [(done, 700) for done in (0, 100, 200, 300, 400, 500, 600, 700)]

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


class TestOptions:
    def test_what_drafts_cannot_do(self, loop: Pipeline) -> None:
        with pytest.raises(ConfigError, match=r"assistant_confidence_threshold.*speculation='auto'"):
            loop.generate("x", assistant_confidence_threshold=0.5)
        with pytest.raises(ConfigError, match="num_assistant_tokens=3 contradicts num_beams=2"):
            loop.generate("x", num_beams=2, num_assistant_tokens=3)

    def test_beams_beside_options_that_change_logits(self, loop: Pipeline) -> None:
        with pytest.raises(ConfigError, match=r"logit_bias=.* contradicts num_beams=2"):
            loop.generate("x", num_beams=2, logit_bias={5: 1.0})
        assert len(loop.generate("Hi", num_beams=2, max_new_tokens=4).alternatives) == 1

    def test_properties_of_the_other_backend(self, tiny_fp32: Path, device: str) -> None:
        for config in ({"extensions": ["x"]}, {"ATTENTION_BACKEND": "SDPA"}):
            with pytest.raises(ConfigError, match="belongs to backend='llm_pipeline'"):
                ov_phi3.load(tiny_fp32, device=device, backend="infer_request", ov_config=config)
        with ov_phi3.load(
            tiny_fp32, device=device, backend="infer_request", ov_config={"ATTENTION_BACKEND": "PA"}
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
    def test_penalties_equal_the_other_backends(self, loop: Pipeline, other: Pipeline, options: dict[str, Any]) -> None:
        for question in QUESTIONS:
            mine = loop.generate(question, **GREEDY, **options)
            assert mine.token_ids == other.generate(question, **GREEDY, **options).token_ids

    def test_bias_out_of_the_vocabulary(self, loop: Pipeline) -> None:
        with pytest.raises(ConfigError, match="logit_bias holds 49152"):
            loop.generate("x", logit_bias={49152: 1.0})

    def test_openai(self) -> None:
        request = {"logit_bias": {"50": -100}, "logprobs": True, "top_logprobs": 3}
        config = GenerationConfig.from_openai(request)
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
        for sample in reply.alternatives:
            total = loop.score(reply.prompt_token_ids, sample.token_ids).total
            assert sample.score == pytest.approx(total, abs=1e-3)
        again = loop.generate("Name a colour.", **options)
        assert [a.token_ids for a in again.alternatives] == [a.token_ids for a in reply.alternatives]


def test_an_unknown_longrope_graph_is_refused(longrope: tuple[Path, Path, int], device: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(longrope[0], path)
    xml = path / "openvino_model.xml"
    text = xml.read_text(encoding="utf-8")
    xml.write_text(text.replace("rotary_emb/aten::where/Select", "rotary_emb/chosen"), encoding="utf-8")
    with pytest.raises(ModelError, match=r"LongRoPE factors .*load it with backend='llm_pipeline'"):
        ov_phi3.load(path, device=device, backend="infer_request")
