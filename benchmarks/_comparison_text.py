"""A comparison as text for a terminal."""

from __future__ import annotations

from _comparison import OURS, Comparison, Figure, figure_order
from ov_phi3.bench.table import table

__all__ = ["comparison_text"]


def comparison_text(comparison: Comparison) -> str:
    """A table of medians, a table of ratios, the memory limit, and notes on each peer."""
    chat_turns = [figure_order(figure.key)[1] for figure in comparison.figures if figure.key.startswith("chat_")]
    chat_keys = ("chat_2", f"chat_{max(chat_turns, default=0)}")
    figures = [f for f in comparison.figures if not f.key.startswith("chat_") or f.key in chat_keys]
    peers, others = comparison.peers, [peer for peer in comparison.peers if peer != OURS]
    medians = [("median", *peers)] + [(_title(f), *(_median(f, peer) for peer in peers)) for f in figures]
    ratios = [("ov_phi3 over", *others)] + [(f.title, *(_ratio(f, peer) for peer in others)) for f in figures]
    model, settings = comparison.model, comparison.settings
    parts = [
        f"{comparison.machine}\n{model['path']} ({model['quantization']}) on {comparison.device}\n"
        f"{settings['threads']} threads, greedy, {settings['new_tokens']} new tokens, the same prompts by id",
        table(medians),
    ]
    if others:
        parts.append(f"{table(ratios)}\nMedian of the ratios (quartiles), pair by pair; below 1 ov_phi3 is faster.")
    parts.append(_limit(comparison))
    parts.append("\n".join(_notes(comparison)))
    return "\n\n".join(part for part in parts if part)


def _limit(comparison: Comparison) -> str:
    limit = comparison.roofline
    fractions = comparison.roofline_fractions(OURS)
    shares = ", ".join(f"{fraction:.0%} after {tokens} tokens" for tokens, fraction in fractions.items())
    return (
        f"Limit: a token of the exported model reads {limit.weight_bytes / 1e6:.0f} MB of weights; the memory "
        f"bandwidth is {limit.bandwidth_bytes_per_s / 1e9:.1f} GB/s,\nso a token takes at least "
        f"{limit.limit_ms(0):.2f} ms. ov_phi3 reached {shares} of the limit at that length."
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


def _ratio(figure: Figure, peer: str) -> str:
    ratio = figure.ratio(peer)
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
