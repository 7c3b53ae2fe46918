"""`measure` on the real engine: exact lengths, both clocks, caches, settings, refused arguments."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

import ov_phi3
from ov_phi3 import ConfigError, ContextOverflowError, Pipeline


class TestReport:
    """A report of the real engine."""

    def test_lengths_are_exact_and_no_prompt_was_cached(self, report: ov_phi3.Report) -> None:
        assert [(m.prompt_tokens, len(m.samples)) for m in report] == [(8, 2), (40, 2)]
        for m in report:
            assert m.finish_reasons == ("length", "length")
            assert all((s.prompt_tokens, s.generated_tokens) == (m.prompt_tokens, 12) for s in m.samples)
            assert m.cached_tokens == 0

    def test_a_report_is_a_sequence_of_its_measurements(self, report: ov_phi3.Report) -> None:
        assert len(report) == 2
        assert [report[0], report[1]] == list(report) == list(report.measurements)
        assert report[:1] == report.measurements[:1]

    def test_the_callers_ttft_includes_the_engines(self, report: ov_phi3.Report) -> None:
        for m in report:
            assert m.engine_ttft is not None
            assert m.ttft is not None
            assert m.engine_ttft.p50 <= m.ttft.p50
            assert m.first_text is not None
            assert m.first_text.minimum >= m.ttft.minimum

    def test_inter_token_gaps_follow_from_the_token_times(self, report: ov_phi3.Report) -> None:
        for m in report:
            gaps = m.inter_token
            assert gaps is not None
            assert gaps.count == 2 * 11
            assert gaps.mean * 11 == pytest.approx(
                statistics.fmean(s.token_times_ms[-1] - s.token_times_ms[0] for s in m.samples)
            )

    def test_first_inference_is_reported_for_an_unused_pipeline_only(
        self, report: ov_phi3.Report, pipe: Pipeline
    ) -> None:
        assert report.first_inference_ms is not None
        assert report.warm_inference_ms > 0
        pipe.warmup()
        used = ov_phi3.measure(pipe, prompt_tokens=4, new_tokens=1, repeat=1, roofline=False)
        assert used.first_inference_ms is None

    def test_chat_turns_prefill_only_the_new_tokens(self, report: ov_phi3.Report) -> None:
        assert [turn.turn for turn in report.chat] == [1, 2, 3]
        first, *others = report.chat
        assert first.prefilled_tokens == first.prompt_tokens
        for before, turn in zip(report.chat, others, strict=False):
            assert turn.prompt_tokens > before.prompt_tokens
            assert turn.prefilled_tokens is not None
            assert turn.prefilled_tokens < 40

    def test_memory_and_settings_are_reported(self, report: ov_phi3.Report, demo_int4: Path) -> None:
        assert report.model["path"] == str(demo_int4)
        assert report.settings["ends"] == "forced"
        assert report.load_ms["total"] >= report.load_ms["model"]
        if report.peak_memory_bytes is not None and report.loaded_memory_bytes is not None:
            assert report.peak_memory_bytes >= report.loaded_memory_bytes > 2**26

    def test_to_dict_is_valid_json_with_every_sample(self, report: ov_phi3.Report) -> None:
        data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        assert [len(m["samples"][0]["token_times_ms"]) for m in data["measurements"]] == [12, 12]
        assert data["measurements"][0]["summaries_ms"]["ttft"]["p50"] == report[0].ttft_ms
        assert data["roofline"]["weight_bytes"] > 0
        assert data["settings"]["seed"] == 0
        assert len(data["chat"]) == 3

    def test_the_text_has_every_section_in_at_most_150_columns(self, report: ov_phi3.Report) -> None:
        text = str(report)
        for part in ("TTFT", "TPOT", "of limit", "GB/s", "Turns of a chat", "first inference", "p99", "length"):
            assert part in text
        assert max(map(len, text.splitlines())) <= 150

    def test_replies_of_one_token_have_no_gaps(self, pipe: Pipeline) -> None:
        measured = ov_phi3.measure(pipe, prompt_tokens=4, new_tokens=1, repeat=1)
        assert (measured[0].tpot_ms, measured[0].inter_token, measured[0].roofline_fraction) == (None, None, None)
        assert "Replies of one token." in str(measured)

    def test_replies_can_end_naturally(self, pipe: Pipeline) -> None:
        measured = ov_phi3.measure(pipe, prompt_tokens=6, new_tokens=300, repeat=2, ends="natural", roofline=False)
        assert all(s.generated_tokens <= 300 for s in measured[0].samples)
        assert measured[0].roofline_fraction is None
        assert measured.roofline is None
        assert "natural" in str(measured)

    def test_progress_is_called_before_each_step(self, pipe: Pipeline) -> None:
        messages: list[str] = []
        ov_phi3.measure(pipe, prompt_tokens=4, new_tokens=1, repeat=1, roofline=False, progress=messages.append)
        assert messages[-1] == "4 prompt tokens, reply 1 of 1"

    @pytest.mark.parametrize(
        ("wrong", "named"),
        [
            ({"repeat": 0}, "repeat=0"),
            ({"new_tokens": 0}, "new_tokens=0"),
            ({"prompt_tokens": [4, 0]}, "prompt_tokens=0"),
            ({"chat_turns": -1}, "chat_turns=-1"),
            ({"ends": "never"}, "ends='never'"),
        ],
    )
    def test_wrong_arguments_are_named(self, pipe: Pipeline, wrong: dict[str, Any], named: str) -> None:
        with pytest.raises(ConfigError, match=named):
            ov_phi3.measure(pipe, **wrong)

    @pytest.mark.parametrize("wrong", [{"repeat": 1.5}, {"new_tokens": True}, {"prompt_tokens": "32"}])
    def test_wrong_types_are_named(self, pipe: Pipeline, wrong: dict[str, Any]) -> None:
        with pytest.raises(TypeError, match=next(iter(wrong))):
            ov_phi3.measure(pipe, **wrong)

    def test_lengths_past_the_context_window_are_refused_before_any_inference(self, pipe: Pipeline) -> None:
        messages: list[str] = []
        with pytest.raises(ContextOverflowError, match=str(pipe.context_length)):
            ov_phi3.measure(pipe, prompt_tokens=[8, pipe.context_length], new_tokens=1, progress=messages.append)
        assert messages == []
