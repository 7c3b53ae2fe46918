"""A measurement report as text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ov_phi3.bench.report import ChatTurn, Measurement, Report, Summary

__all__ = ["report_text", "table"]


def table(rows: Iterable[Sequence[str]]) -> str:
    """Rows in columns, the first one as their heads; columns of numbers to the right."""
    lines = [list(row) for row in rows]
    widths = [max(len(row[i]) for row in lines) for i in range(len(lines[0]))]
    numeric = [len(lines) > 1 and all(_is_number(row[i]) for row in lines[1:]) for i in range(len(widths))]
    return "\n".join(
        "  ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)).rstrip()
        for row in lines
    )


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).replace("%", "", 1).isdigit() or text == "-"


def report_text(report: Report) -> str:
    """Everything but the samples."""
    parts = [_about(report)]
    if report.measurements:
        parts += [_latency(report), _between_tokens(report)]
    if report.chat:
        parts.append(_chat(report.chat))
    parts.append(_once(report))
    return "\n\n".join(parts)


def _about(report: Report) -> str:
    device, model = report.device, report.model
    driver = f", driver {device['driver']}" if device["driver"] else ""
    packages = ", ".join(f"{name} {version}" for name, version in report.machine.packages.items())
    settings = report.settings
    given = " ".join(f"{key}={value or repr('')}" for key, value in settings["ov_config"].items())
    cache = settings["kv_cache"]
    return "\n".join(
        [
            f"model    {model['path']} ({model['family']}, {model['quantization']}, "
            f"{model['weight_bytes'] / 2**20:.0f} MiB)",
            f"device   {device['name']} ({device['full_name']}{driver})",
            f"machine  {report.machine}",
            f"versions {packages}",
            f"settings {given}; keys {cache['key']}, values {cache['value']}, window {settings['context_length']}",
        ]
    )


def _latency(report: Report) -> str:
    heads = ("prompt", "new", "end", "TTFT ms", "quartiles", "engine ms", "text ms", "TPOT ms", "quartiles", "tokens/s")
    rows: list[tuple[str, ...]] = [(*heads, "total ms", "cached", "of limit")]
    rows += [_latency_row(found) for found in report.measurements]
    settings = report.settings
    forced = "a forced length" if settings["ends"] == "forced" else "up to their natural end"
    return (
        f"{table(rows)}\n"
        f"Medians of {settings['repeat']} replies of {forced} per prompt length, after one that is not counted. TTFT: "
        "request to first token\non the caller's side; engine: by the engine's own clock; text: to the first text; "
        "TPOT: (last token - first) / (tokens - 1)."
        f"{_limit(report)}"
    )


def _latency_row(found: Measurement) -> tuple[str, ...]:
    tpot = found.tpot
    reasons = set(found.finish_reasons)
    return (
        str(found.prompt_tokens),
        str(round(median(s.generated_tokens for s in found.samples))),
        reasons.pop() if len(reasons) == 1 else "mixed",
        _ms(found.ttft),
        _spread(found.ttft),
        _ms(found.engine_ttft),
        _ms(found.first_text),
        _ms(tpot, 2),
        _spread(tpot, 2),
        f"{1000 / tpot.p50:.1f}" if tpot else "-",
        _ms(found.total, 0),
        "-" if found.cached_tokens is None else str(found.cached_tokens),
        "-" if found.roofline_fraction is None else f"{found.roofline_fraction:.0%}",
    )


def _limit(report: Report) -> str:
    roofline = report.roofline
    if roofline is None:
        return ""
    return (
        f"\nLimit: a token reads {roofline.weight_bytes / 1e6:.0f} MB of weights and "
        f"{roofline.kv_bytes_per_token / 1e3:.1f} kB of KV cache per token before it;\nmemory gave "
        f"{roofline.bandwidth_bytes_per_s / 1e9:.1f} GB/s, so that no token can take less than "
        f"{roofline.limit_ms(0):.2f} ms."
    )


def _between_tokens(report: Report) -> str:
    rows = [("prompt", "gaps", "p50 ms", "p90 ms", "p99 ms", "max ms")]
    for found in report.measurements:
        gaps = found.inter_token
        if gaps is not None:
            values = (gaps.p50, gaps.p90, gaps.p99, gaps.maximum)
            shown = ["-" if value is None else f"{value:.2f}" for value in values]
            rows.append((str(found.prompt_tokens), str(gaps.count), shown[0], shown[1], shown[2], shown[3]))
    return f"Gaps between tokens, all replies together\n{table(rows)}" if len(rows) > 1 else "Replies of one token."


def _chat(turns: Sequence[ChatTurn]) -> str:
    rows = [("turn", "prompt", "prefilled", "TTFT ms", "quartiles", "TPOT ms")]
    rows += [
        (
            str(turn.turn),
            str(turn.prompt_tokens),
            "-" if turn.prefilled_tokens is None else str(turn.prefilled_tokens),
            _ms(turn.ttft),
            _spread(turn.ttft),
            _ms(turn.tpot, 2),
        )
        for turn in turns
    ]
    return f"Turns of a chat, medians of {len(turns[0].samples)} conversations\n{table(rows)}"


def _once(report: Report) -> str:
    load = report.load_ms
    parts = [
        f"load {load['total'] / 1000:.2f} s (model {load['model'] / 1000:.2f} s, tokenizer "
        f"{load['tokenizer'] / 1000:.2f} s; compile cache {report.settings['compile_cache']})"
    ]
    if report.first_inference_ms is not None:
        parts.append(f"first inference {report.first_inference_ms:.0f} ms, again {report.warm_inference_ms:.0f} ms")
    if report.peak_memory_bytes is not None and report.loaded_memory_bytes is not None:
        parts.append(
            f"memory {report.loaded_memory_bytes / 2**20:.0f} MiB when loaded, "
            f"{report.peak_memory_bytes / 2**20:.0f} MiB at most"
        )
    return "\n".join(parts)


def _ms(found: Summary | None, digits: int = 1) -> str:
    return "-" if found is None else f"{found.p50:.{digits}f}"


def _spread(found: Summary | None, digits: int = 1) -> str:
    return "-" if found is None else f"{found.p25:.{digits}f} to {found.p75:.{digits}f}"
