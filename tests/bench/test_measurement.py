"""What is measured is what is said: lengths, clocks, caches, summaries, limits; on the real engine."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ov_phi3
from ov_phi3 import ConfigError, ContextOverflowError, Machine, Measurement, Metrics, Pipeline, Roofline, Summary
from ov_phi3.bench.report import percentile
from ov_phi3.bench.roofline import bandwidth, weight_bytes_per_token
from ov_phi3.system.machine import _cpu_name, _physical_cores, peak_memory_bytes, resident_memory_bytes

TIMES = st.lists(st.floats(0, 1e6, allow_nan=False), min_size=1, max_size=200)


class TestSummary:
    """Against what NumPy and the standard library say."""

    @given(TIMES)
    def test_equals_numpy(self, values: list[float]) -> None:
        found = Summary.of(values)
        assert found is not None
        assert found.p50 == pytest.approx(np.percentile(values, 50))
        assert found.p25 == pytest.approx(np.percentile(values, 25))
        assert found.p75 == pytest.approx(np.percentile(values, 75))
        assert found.mean == pytest.approx(np.mean(values))
        assert (found.minimum, found.maximum, found.count) == (min(values), max(values), len(values))
        if len(values) > 1:
            assert found.std == pytest.approx(statistics.stdev(values), abs=1e-6)

    @given(TIMES, st.floats(0, 1))
    def test_percentile_equals_numpy(self, values: list[float], share: float) -> None:
        assert percentile(sorted(values), share) == pytest.approx(np.quantile(values, share), rel=1e-9, abs=1e-9)

    @pytest.mark.parametrize(
        ("count", "p90", "p99"), [(9, False, False), (10, True, False), (99, True, False), (100, True, True)]
    )
    def test_no_percentile_that_the_count_cannot_carry(self, count: int, p90: bool, p99: bool) -> None:
        found = Summary.of(range(count))
        assert found is not None
        assert (found.p90 is not None, found.p99 is not None) == (p90, p99)

    def test_missing_values_do_not_count(self) -> None:
        assert Summary.of([None, 3.0, None]) == Summary.of([3.0])
        assert Summary.of([None]) is None


class TestMachine:
    """Where it was measured."""

    def test_this_machine(self) -> None:
        here = Machine.here()
        assert here.logical_cpus >= 1
        assert here.packages["ov-phi3"] == ov_phi3.__version__
        assert here.packages["openvino"]
        assert json.loads(json.dumps(here.to_dict()))["cpu"] == here.cpu

    def test_cores_are_told_from_threads(self) -> None:
        described = "\n\n".join(
            f"processor : {n}\nmodel name : Some CPU\nphysical id : 0\ncore id : {n // 2}" for n in range(8)
        )
        assert _physical_cores(described.replace(" :", "\t:")) == 4
        assert _physical_cores("processor : 0\nmodel name : x") is None
        assert _cpu_name("model name\t: Some CPU @ 2 GHz\n") == "Some CPU @ 2 GHz"

    def test_the_peak_is_not_below_what_is_held_and_grows_with_it(self) -> None:
        before, held = peak_memory_bytes(), resident_memory_bytes()
        if before is None or held is None:
            pytest.skip("this system does not tell")
        block = np.ones(held // 8 + 2**25, np.float64)
        after = peak_memory_bytes()
        assert after is not None
        assert after >= block.nbytes
        assert after >= before


@pytest.fixture(scope="module")
def report(demo_int4: Path, device: str) -> ov_phi3.Report:
    with ov_phi3.load(demo_int4, device=device) as fresh:
        return ov_phi3.measure(fresh, prompt_tokens=[8, 40], new_tokens=12, repeat=2, chat_turns=3)


class TestReport:
    """One report of the real engine."""

    def test_lengths_are_exact_and_nothing_was_cached(self, report: ov_phi3.Report) -> None:
        assert [(m.prompt_tokens, len(m.samples)) for m in report] == [(8, 2), (40, 2)]
        for m in report:
            assert m.finish_reasons == ("length", "length")
            assert all((s.prompt_tokens, s.generated_tokens) == (m.prompt_tokens, 12) for s in m.samples)
            assert m.cached_tokens == 0

    def test_it_is_a_sequence_of_its_measurements(self, report: ov_phi3.Report) -> None:
        assert len(report) == 2
        assert [report[0], report[1]] == list(report) == list(report.measurements)
        assert report[:1] == report.measurements[:1]

    def test_both_clocks_are_there_and_ours_holds_the_engines(self, report: ov_phi3.Report) -> None:
        for m in report:
            assert m.engine_ttft is not None
            assert m.ttft is not None
            assert m.engine_ttft.p50 <= m.ttft.p50
            assert m.first_text is not None
            assert m.first_text.minimum >= m.ttft.minimum

    def test_gaps_are_those_between_the_tokens(self, report: ov_phi3.Report) -> None:
        for m in report:
            gaps = m.inter_token
            assert gaps is not None
            assert gaps.count == 2 * 11
            assert gaps.mean * 11 == pytest.approx(
                statistics.fmean(s.token_times_ms[-1] - s.token_times_ms[0] for s in m.samples)
            )

    def test_the_first_inference_of_a_fresh_pipeline_is_told(self, report: ov_phi3.Report, pipe: Pipeline) -> None:
        assert report.first_inference_ms is not None
        assert report.warm_inference_ms > 0
        pipe.warmup()
        used = ov_phi3.measure(pipe, prompt_tokens=4, new_tokens=1, repeat=1, roofline=False)
        assert used.first_inference_ms is None

    def test_chat_turns_prefill_only_what_is_new(self, report: ov_phi3.Report) -> None:
        assert [turn.turn for turn in report.chat] == [1, 2, 3]
        first, *others = report.chat
        assert first.prefilled_tokens == first.prompt_tokens
        for before, turn in zip(report.chat, others, strict=False):
            assert turn.prompt_tokens > before.prompt_tokens
            assert turn.prefilled_tokens is not None
            assert turn.prefilled_tokens < 40

    def test_memory_and_settings_are_told(self, report: ov_phi3.Report, demo_int4: Path) -> None:
        assert report.model["path"] == str(demo_int4)
        assert report.settings["ends"] == "forced"
        assert report.load_ms["total"] >= report.load_ms["model"]
        if report.peak_memory_bytes is not None and report.loaded_memory_bytes is not None:
            assert report.peak_memory_bytes >= report.loaded_memory_bytes > 2**26

    def test_everything_survives_json(self, report: ov_phi3.Report) -> None:
        found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        assert [len(m["samples"][0]["token_times_ms"]) for m in found["measurements"]] == [12, 12]
        assert found["measurements"][0]["summaries_ms"]["ttft"]["p50"] == report[0].ttft_ms
        assert found["roofline"]["weight_bytes"] > 0
        assert found["settings"]["seed"] == 0
        assert len(found["chat"]) == 3

    def test_as_text_it_says_what_a_person_needs(self, report: ov_phi3.Report) -> None:
        text = str(report)
        for part in ("TTFT", "TPOT", "of limit", "GB/s", "Turns of a chat", "first inference", "p99", "length"):
            assert part in text
        assert max(map(len, text.splitlines())) <= 150

    def test_replies_of_one_token_have_no_gaps_and_say_so(self, pipe: Pipeline) -> None:
        found = ov_phi3.measure(pipe, prompt_tokens=4, new_tokens=1, repeat=1)
        assert (found[0].tpot_ms, found[0].inter_token, found[0].roofline_fraction) == (None, None, None)
        assert "Replies of one token." in str(found)

    def test_natural_ends(self, pipe: Pipeline) -> None:
        found = ov_phi3.measure(pipe, prompt_tokens=6, new_tokens=300, repeat=2, ends="natural", roofline=False)
        assert all(s.generated_tokens <= 300 for s in found[0].samples)
        assert found[0].roofline_fraction is None
        assert found.roofline is None
        assert "natural" in str(found)

    def test_progress_is_told(self, pipe: Pipeline) -> None:
        said: list[str] = []
        ov_phi3.measure(pipe, prompt_tokens=4, new_tokens=1, repeat=1, roofline=False, progress=said.append)
        assert said[-1] == "4 prompt tokens, reply 1 of 1"

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

    def test_what_does_not_fit_is_refused_before_anything_is_measured(self, pipe: Pipeline) -> None:
        said: list[str] = []
        with pytest.raises(ContextOverflowError, match=str(pipe.context_length)):
            ov_phi3.measure(pipe, prompt_tokens=[8, pipe.context_length], new_tokens=1, progress=said.append)
        assert said == []


def test_a_drawn_prompt_is_exact_fresh_and_ordinary(pipe: Pipeline, tiny_pipe: Pipeline) -> None:
    for some in (pipe, tiny_pipe):
        one, two = (ov_phi3.random_prompt(some, 500, random.Random(seed)) for seed in (1, 2))
        assert len(one) == len(two) == 500
        assert one != two
        assert not set(one) & set(some.tokenizer.control_tokens.values())
        assert ov_phi3.random_prompt(some, 500, random.Random(1)) == one


def test_a_cached_prompt_is_seen(pipe: Pipeline) -> None:
    prompt = ov_phi3.random_prompt(pipe, 100, random.Random(5))
    samples = [pipe.generate(prompt, max_new_tokens=1, ignore_eos=True).metrics for _ in range(2)]
    assert Measurement(tuple(samples), 100, 1).cached_tokens == 99


class TestRoofline:
    """What a token reads."""

    def test_tied_embeddings_are_read_and_looked_up_ones_are_not(self, demo_int4: Path, tiny_fp32: Path) -> None:
        demo, tiny = (weight_bytes_per_token(path / "openvino_model.xml") for path in (demo_int4, tiny_fp32))
        size = (demo_int4 / "openvino_model.bin").stat().st_size
        assert size * 0.99 < demo <= size
        # tiny: 32064 rows of 64 numbers of the input embedding are there, and one row is read
        assert tiny == pytest.approx((tiny_fp32 / "openvino_model.bin").stat().st_size - 32063 * 64 * 4, abs=65536)

    def test_a_file_that_is_no_graph_is_a_model_error(self, tmp_path: Path) -> None:
        (tmp_path / "openvino_model.xml").write_text("<net")
        with pytest.raises(ov_phi3.ModelError, match="cannot be read"):
            weight_bytes_per_token(tmp_path / "openvino_model.xml")

    def test_the_arithmetic(self) -> None:
        limit = Roofline(bandwidth_bytes_per_s=1e9, weight_bytes=10**7, kv_bytes_per_token=1000.0)
        assert limit.bytes_at(0) == 1e7
        assert limit.limit_ms(0) == pytest.approx(10.0)
        assert limit.limit_ms(1000) == pytest.approx(11.0)
        assert limit.fraction(20.0, 0) == pytest.approx(0.5)

    def test_bandwidth_is_one_that_a_machine_can_have(self, device: str) -> None:
        assert 1e9 < bandwidth(device, repeat=3) < 1e13

    def test_the_fraction_is_the_limit_over_the_median(self, report: ov_phi3.Report) -> None:
        assert report.roofline is not None
        for m in report:
            assert m.roofline_fraction is not None
            assert m.tpot_ms is not None
            expected = report.roofline.limit_ms(m.prompt_tokens + 6) / m.tpot_ms
            assert m.roofline_fraction == pytest.approx(expected)


def test_medians_of_nothing_are_not_a_number() -> None:
    assert math.isnan(Measurement((), 1, 1).ttft_ms)


def test_cached_tokens_are_unknown_where_one_is() -> None:
    known: dict[str, Any] = {
        "prompt_tokens": 1,
        "generated_tokens": 1,
        "ttft_ms": 1.0,
        "first_text_ms": 1.0,
        "tpot_ms": None,
        "total_ms": 1.0,
        "queue_ms": 0.0,
        "token_times_ms": (1.0,),
    }
    samples = (Metrics(**known, reused_tokens=0), Metrics(**known, reused_tokens=None))
    assert Measurement(samples, 1, 1).cached_tokens is None
