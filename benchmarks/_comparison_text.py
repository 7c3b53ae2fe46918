"""A comparison as text: for a terminal, or as Markdown for a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING

from _comparison import OURS, Comparison, Figure
from ov_phi3.bench.table import table

if TYPE_CHECKING:
    from ov_phi3 import Summary

__all__ = ["comparison_markdown", "comparison_text"]

Rows = list[tuple[str, ...]]


def comparison_text(comparison: Comparison) -> str:
    """Tables of medians, ratios and memory traffic, the memory limit, and notes on each peer."""
    return _text(comparison, table)


def comparison_markdown(comparison: Comparison) -> str:
    """The same with its tables in Markdown."""
    return _text(comparison, _markdown_table)


def _text(comparison: Comparison, to_table: Callable[[Rows], str]) -> str:
    last = max((f.number for f in comparison.figures if f.key.startswith("chat_")), default=0)
    shown = [f for f in comparison.figures if not f.key.startswith("chat_") or f.number in (2, last)]
    model, settings = comparison.model, comparison.settings
    parts = [
        f"{comparison.machine}\n{model['path']} ({model['quantization']}) on {comparison.device}\n"
        f"{settings['threads']} threads, greedy, {settings['new_tokens']} new tokens, the same prompts by id",
        to_table(_medians(comparison, shown)),
    ]
    others = [peer for peer in comparison.peers if peer not in comparison.ours]
    if others:
        ratios = [to_table(_ratios(shown, ours, others)) for ours in comparison.ours]
        parts += [*ratios, "Median of the ratios (quartiles), pair by pair; below 1 ov_phi3 is faster."]
    parts += [to_table(_traffic(comparison)), _limit(comparison)]
    if equal := _equal_bytes(comparison, others):
        parts += [
            to_table(equal),
            "The same ratios of TPOT per byte that a token reads: how well the bandwidth is used.",
        ]
    parts.append("\n".join(_notes(comparison)))
    return "\n\n".join(part for part in parts if part)


def _markdown_table(rows: Rows) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "| " + " | ".join("---" for _ in rows[0]) + " |", *lines[1:]])


def _medians(comparison: Comparison, figures: Sequence[Figure]) -> Rows:
    """One row per figure; with more peers than a line holds, one row per peer."""
    rows: Rows = [("median", *comparison.peers)]
    rows += [(_title(f), *(_median(f, peer) for peer in comparison.peers)) for f in figures]
    return rows if len(comparison.peers) <= 5 else list(zip(*rows, strict=True))


def _ratios(figures: Sequence[Figure], ours: str, others: Sequence[str]) -> Rows:
    rows: Rows = [(f"{ours} over", *others)]
    return rows + [(f.title, *(_summary(f.ratio(peer, ours)) for peer in others)) for f in figures]


def _traffic(comparison: Comparison) -> Rows:
    """What a token reads, and how fast: per peer with known files, for every prompt length."""
    rows: Rows = [("memory", "after tokens", "MB a token", "GB/s", "of limit")]
    for peer in comparison.peers:
        fractions = comparison.roofline_fractions(peer)
        for figure in comparison.tpot_figures:
            size, time = comparison.bytes_per_token(peer, figure), figure.summary(peer)
            if size and time:
                speed = f"{size / time.p50 / 1e6:.1f} ({size / time.p75 / 1e6:.1f} to {size / time.p25 / 1e6:.1f})"
                share = f"{fractions[figure.number]:.0%}"
                rows.append((peer, str(figure.number), f"{size / 1e6:.0f}", speed, share))
    return rows


def _equal_bytes(comparison: Comparison, others: Sequence[str]) -> Rows:
    """Ratios at equal bytes for the peers whose files are known and are not ours; empty without any."""
    exported = {limit.weight_bytes for peer, limit in comparison.rooflines.items() if peer in comparison.ours}
    known = [p for p in others if p in comparison.rooflines and comparison.rooflines[p].weight_bytes not in exported]
    if not known:
        return []
    rows: Rows = [("TPOT at equal bytes, after", *known)]
    for ours in comparison.ours:
        for figure in comparison.tpot_figures:
            ratios = (_summary(comparison.at_equal_bytes(figure, ours, peer)) for peer in known)
            rows.append((f"{figure.number} tokens, {ours}", *ratios))
    return rows


def _limit(comparison: Comparison) -> str:
    limit, speeds = comparison.rooflines.get(OURS), comparison.bandwidths
    if limit is None:
        return ""
    return (
        f"Limit: the memory bandwidth is {median(speeds) / 1e9:.1f} GB/s ({min(speeds) / 1e9:.1f} to "
        f"{max(speeds) / 1e9:.1f} in {len(speeds)} measurements), so a token of the exported model takes at least "
        f"{limit.limit_ms(0):.2f} ms."
    )


def _title(figure: Figure) -> str:
    return f"{figure.title}, {'MiB' if figure.unit == 'bytes' else 'ms'}"


def _median(figure: Figure, peer: str) -> str:
    summary = figure.summary(peer)
    if summary is None:
        return "-"
    if figure.unit == "bytes":
        return f"{summary.p50 / 2**20:.0f}"
    return f"{summary.p50:.2f}" if summary.p50 < 100 else f"{summary.p50:.0f}"


def _summary(ratio: Summary | None) -> str:
    return "-" if ratio is None else f"{ratio.p50:.3f} ({ratio.p25:.3f} to {ratio.p75:.3f})"


def _notes(comparison: Comparison) -> list[str]:
    lines = []
    for peer in comparison.peers:
        versions = ", ".join(f"{name} {version}" for name, version in comparison.versions.get(peer, {}).items())
        line = f"{peer}: {versions}."
        if peer in comparison.equal_ids:
            equal, of = comparison.equal_ids[peer]
            line += f" Replies with the same ids as ov_phi3: {equal} of {of}."
        if peer in comparison.unequal:
            line += f" Not equal: {comparison.unequal[peer]}."
        lines.append(line)
    lines += [f"{peer}: not measured: {reason}" for peer, reason in comparison.dropped.items()]
    return lines
