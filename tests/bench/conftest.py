"""Reports that the tests share: one of the real engine, and one made by hand for an emulated GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import ov_phi3
from ov_phi3 import DeviceInfo, Machine, Measurement, Metrics


@pytest.fixture(scope="session")
def report(demo_int4: Path, device: str) -> ov_phi3.Report:
    with ov_phi3.load(demo_int4, device=device) as fresh:
        return ov_phi3.measure(fresh, prompt_tokens=[8, 40], new_tokens=12, repeat=2, chat_turns=3)


@pytest.fixture
def emulated() -> DeviceInfo:
    return DeviceInfo("GPU.0", "Intel(R) UHD Graphics 630 (emulated) (iGPU)", "GPU", discrete=False)


def _measurement(prompt_tokens: int, ttft_ms: float, tpot_ms: float) -> Measurement:
    metrics = Metrics(
        prompt_tokens=prompt_tokens,
        generated_tokens=2,
        reused_tokens=0,
        ttft_ms=ttft_ms,
        first_text_ms=ttft_ms,
        tpot_ms=tpot_ms,
        total_ms=ttft_ms + tpot_ms,
        queue_ms=0.0,
        token_times_ms=(ttft_ms, ttft_ms + tpot_ms),
        engine_ttft_ms=ttft_ms - 1,
    )
    return Measurement((metrics,), prompt_tokens, 2, ("length",))


@pytest.fixture
def report_of(emulated: DeviceInfo) -> Callable[..., ov_phi3.Report]:
    """Make a report of Phi-3-mini in int4 on an emulated GPU, with other model facts if named; no engine runs."""

    def make(times: dict[int, tuple[float, float]] | None = None, **model: Any) -> ov_phi3.Report:
        facts = {"path": "/models/mini", "family": "phi-3", "quantization": "int4_sym, group size 128, ratio 0.6"}
        sizes = {"weight_bytes": 2**31, "num_layers": 32, "hidden_size": 3072}
        settings: dict[str, Any] = {"ov_config": {}, "kv_cache": {"key": "f16", "value": "f16"}, "ends": "forced"}
        return ov_phi3.Report(
            measured_at="2026-11-26T06:00:00+00:00",
            machine=Machine.here(),
            device=asdict(emulated),
            model={**facts, **sizes, **model},
            settings={**settings, "context_length": 4096, "repeat": 1, "compile_cache": "off"},
            load_ms={"total": 2.0, "model": 1.0, "tokenizer": 1.0},
            first_inference_ms=None,
            warm_inference_ms=1.0,
            measurements=tuple(_measurement(n, *pair) for n, pair in (times or {32: (50.0, 25.0)}).items()),
        )

    return make
