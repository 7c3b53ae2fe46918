"""The sections of a measurement report as text for a terminal, each from the values that it shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from ov_phi3.bench.roofline import Roofline
from ov_phi3.bench.samples import ChatTurn, Measurement
from ov_phi3.bench.summary import Summary
from ov_phi3.bench.table import table
from ov_phi3.system.machine import Machine

__all__ = ["chat_section", "gaps_section", "header_section", "latency_section", "load_section"]


def header_section(
    machine: Machine, device: Mapping[str, Any], model: Mapping[str, Any], settings: Mapping[str, Any]
) -> str:
    """Model, device, machine, package versions and settings."""
    driver = f", driver {device['driver']}" if device["driver"] else ""
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    properties = " ".join(f"{key}={value or repr('')}" for key, value in settings["ov_config"].items())
    cache = settings["kv_cache"]
    return "\n".join(
        [
            f"model    {model['path']} ({model['family']}, {model['quantization']}, "
            f"{model['weight_bytes'] / 2**20:.0f} MiB)",
            f"device   {device['name']} ({device['full_name']}{driver})",
            f"machine  {machine}",
            f"versions {packages}",
            f"settings {properties}; keys {cache['key']}, values {cache['value']}, window {settings['context_length']}",
        ]
    )


def latency_section(measurements: Sequence[Measurement], settings: Mapping[str, Any], roofline: Roofline | None) -> str:
    """The latency table, one row per prompt length, with a legend."""
    columns = ("prompt", "new", "end", "TTFT ms", "quartiles", "engine ms", "text ms", "TPOT ms", "quartiles")
    rows: list[tuple[str, ...]] = [(*columns, "tokens/s", "total ms", "cached", "of limit")]
    rows += [_latency_row(measurement) for measurement in measurements]
    length = "of a forced length" if settings["ends"] == "forced" else "up to their natural end"
    return (
        f"{table(rows)}\n"
        f"Medians of {settings['repeat']} replies {length} per prompt length, after one warm-up reply. TTFT: time "
        "to first token,\nfrom the request until the caller has it; engine: by the engine's own clock; text: to the "
        "first text;\nTPOT: time per output token, (last token - first) / (tokens - 1)."
        f"{_roofline_note(roofline)}"
    )


def _latency_row(measurement: Measurement) -> tuple[str, ...]:
    tpot = measurement.tpot
    reasons = set(measurement.finish_reasons)
    return (
        str(measurement.prompt_tokens),
        str(round(median(s.generated_tokens for s in measurement.samples))),
        reasons.pop() if len(reasons) == 1 else "mixed",
        _median(measurement.ttft),
        _quartiles(measurement.ttft),
        _median(measurement.engine_ttft),
        _median(measurement.first_text),
        _median(tpot, 2),
        _quartiles(tpot, 2),
        f"{1000 / tpot.p50:.1f}" if tpot else "-",
        _median(measurement.total, 0),
        "-" if measurement.cached_tokens is None else str(measurement.cached_tokens),
        "-" if measurement.roofline_fraction is None else f"{measurement.roofline_fraction:.0%}",
    )


def _roofline_note(roofline: Roofline | None) -> str:
    if roofline is None:
        return ""
    return (
        f"\nLimit: a token reads {roofline.weight_bytes / 1e6:.0f} MB of weights and "
        f"{roofline.kv_bytes_per_token / 1e3:.1f} kB of KV cache per preceding token;\nthe memory bandwidth is "
        f"{roofline.bandwidth_bytes_per_s / 1e9:.1f} GB/s, so a token takes at least {roofline.limit_ms(0):.2f} ms."
    )


def gaps_section(measurements: Sequence[Measurement]) -> str:
    """Percentiles of the gaps between tokens, one row per prompt length."""
    rows = [("prompt", "gaps", "p50 ms", "p90 ms", "p99 ms", "max ms")]
    for measurement in measurements:
        gaps = measurement.inter_token
        if gaps is not None:
            values = (gaps.p50, gaps.p90, gaps.p99, gaps.maximum)
            p50, p90, p99, maximum = ("-" if value is None else f"{value:.2f}" for value in values)
            rows.append((str(measurement.prompt_tokens), str(gaps.count), p50, p90, p99, maximum))
    return f"Gaps between tokens, of all replies\n{table(rows)}" if len(rows) > 1 else "Replies of one token."


def chat_section(turns: Sequence[ChatTurn]) -> str:
    """The latency of each turn of a chat."""
    rows = [("turn", "prompt", "prefilled", "TTFT ms", "quartiles", "TPOT ms")]
    rows += [
        (
            str(turn.turn),
            str(turn.prompt_tokens),
            "-" if turn.prefilled_tokens is None else str(turn.prefilled_tokens),
            _median(turn.ttft),
            _quartiles(turn.ttft),
            _median(turn.tpot, 2),
        )
        for turn in turns
    ]
    return f"Turns of a chat, medians of {len(turns[0].samples)} conversations\n{table(rows)}"


def load_section(
    load_ms: Mapping[str, float],
    compile_cache: str,
    inference_ms: tuple[float | None, float],
    memory_bytes: tuple[int | None, int | None],
) -> str:
    """Load time, first inference and memory.

    Args:
        load_ms: "total", "model" and "tokenizer".
        compile_cache: `LoadReport.cache`.
        inference_ms: the first inference, None if the pipeline was in use before, and the same inference repeated.
        memory_bytes: resident after loading, and peak; None where the system does not report it.
    """
    lines = [
        f"load {load_ms['total'] / 1000:.2f} s (model {load_ms['model'] / 1000:.2f} s, tokenizer "
        f"{load_ms['tokenizer'] / 1000:.2f} s; compile cache {compile_cache})"
    ]
    first, repeated = inference_ms
    if first is not None:
        lines.append(f"first inference {first:.0f} ms, repeated {repeated:.0f} ms")
    loaded, peak = memory_bytes
    if loaded is not None and peak is not None:
        lines.append(f"memory {loaded / 2**20:.0f} MiB after loading, {peak / 2**20:.0f} MiB at most")
    return "\n".join(lines)


def _median(summary: Summary | None, digits: int = 1) -> str:
    return "-" if summary is None else f"{summary.p50:.{digits}f}"


def _quartiles(summary: Summary | None, digits: int = 1) -> str:
    return "-" if summary is None else f"{summary.p25:.{digits}f} to {summary.p75:.{digits}f}"
