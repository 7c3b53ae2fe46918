"""Plots of benchmark results; matplotlib is in the `bench` extra."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")  # draws to files; needs no display
from matplotlib import pyplot as plt
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, ScalarFormatter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

    import ov_phi3
    from _comparison import Comparison

__all__ = ["plot_comparison", "plot_recipes", "plot_report"]

# The palette of Okabe and Ito, which is safe for colour-blind readers.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
GREY = "#666666"
STYLE = {
    "figure.dpi": 120,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def plot_report(report: ov_phi3.Report, folder: Path) -> list[Path]:
    """Plot latency by prompt length, gaps between tokens, and chat turns, each to a PNG file in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with mpl.rc_context(STYLE):
        if report.measurements:
            paths += [_latency(report, folder / "latency.png"), _gaps(report, folder / "inter-token.png")]
        if report.chat:
            paths.append(_chat(report, folder / "chat.png"))
    return paths


def _save(figure: Any, path: Path, caption: str) -> Path:
    colour = COLOURS[5] if "(emulated)" in caption else GREY  # no figure of an emulated GPU is a GPU's
    figure.text(0.01, 0.005, caption, fontsize=7, color=colour, va="bottom")
    figure.tight_layout(rect=(0, 0.02 + 0.02 * len(caption.splitlines()), 1, 1))
    figure.savefig(path)
    plt.close(figure)
    return path


def _caption(report: ov_phi3.Report) -> str:
    return (
        f"{Path(report.model['path']).name} on {report.device['name']} ({report.device['full_name']}), "
        f"openvino-genai {report.machine.packages['openvino-genai']}, {report.measured_at}"
    )


def _points(axes: Axes, positions: Sequence[float], samples: Sequence[Sequence[float]], colour: str) -> None:
    """Plot every sample, so that outliers stay visible beside the median."""
    for position, values in zip(positions, samples, strict=True):
        axes.plot([position] * len(values), values, "o", color=colour, alpha=0.35, markersize=4, markeredgewidth=0)


def _plain_ticks(axis: Axis, digits: Sequence[float]) -> None:
    """Label a logarithmic axis with plain numbers that begin with these digits."""
    axis.set_major_locator(LogLocator(subs=digits))
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_locator(NullLocator())


def _latency(report: ov_phi3.Report, path: Path) -> Path:
    measurements = sorted(report.measurements, key=lambda m: m.prompt_tokens)
    lengths = [m.prompt_tokens for m in measurements]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2))
    _points(left, lengths, [[s.ttft_ms or 0 for s in m.samples] for m in measurements], COLOURS[0])
    left.plot(lengths, [m.ttft_ms for m in measurements], color=COLOURS[0], label="median")
    left.set(xscale="log", yscale="log", title="Time to first token", xlabel="prompt tokens", ylabel="milliseconds")
    left.xaxis.set_major_locator(FixedLocator(lengths))
    left.xaxis.set_minor_locator(NullLocator())
    left.xaxis.set_major_formatter(ScalarFormatter())
    left.margins(x=0.12)
    _plain_ticks(left.yaxis, (1, 2, 5))
    for length, m in zip(lengths, measurements, strict=True):
        left.annotate(f"{m.ttft_ms:.0f} ms", (length, m.ttft_ms), (5, -12), textcoords="offset points", fontsize=8)
    timed = [m for m in measurements if m.tpot_ms is not None]
    positions = list(range(len(timed)))
    _points(right, positions, [[s.tpot_ms for s in m.samples if s.tpot_ms is not None] for m in timed], COLOURS[0])
    right.plot(positions, [m.tpot_ms or 0.0 for m in timed], "_", color=COLOURS[0], markersize=22, label="median")
    if report.roofline is not None:
        limits = [report.roofline.limit_ms(m.prompt_tokens + m.new_tokens / 2) for m in timed]
        right.plot(positions, limits, "_", color=COLOURS[5], markersize=22, label="limit set by memory bandwidth")
    right.set_xticks(positions, [str(m.prompt_tokens) for m in timed])
    right.set(title="Time per output token", xlabel="prompt tokens", ylabel="milliseconds", ylim=(0, None))
    right.set_xlim(-0.5, len(timed) - 0.5)
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return _save(figure, path, _caption(report))


def _gaps(report: ov_phi3.Report, path: Path) -> Path:
    """The cumulative distribution of the gaps between tokens."""
    figure, axes = plt.subplots(figsize=(7, 4.2))
    longest, fewest = 0.0, None
    for colour, m in zip(COLOURS * 3, sorted(report.measurements, key=lambda m: m.prompt_tokens), strict=False):
        gaps = sorted(gap for s in m.samples for gap in s.inter_token_ms)
        if not gaps:
            continue
        shares = [(i + 1) / len(gaps) * 100 for i in range(len(gaps))]
        axes.step(gaps, shares, where="post", color=colour, label=f"{m.prompt_tokens} prompt tokens, {len(gaps)} gaps")
        fewest = len(gaps) if fewest is None else min(fewest, len(gaps))
        longest = max(longest, gaps[min(len(gaps) - 1, int(len(gaps) * 0.99))])
    for share in _shown_percentiles(fewest or 0):
        axes.axhline(share, color=GREY, linewidth=0.7, linestyle=":")
        axes.annotate(
            f"p{share}", (1, share), (-22, -10), xycoords=("axes fraction", "data"), textcoords="offset points"
        )
    axes.set(title="Gaps between tokens", xlabel="milliseconds", ylabel="% of gaps at most this long", ylim=(0, 101))
    axes.set_xlim(0, longest * 1.3 or 1)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    return _save(figure, path, _caption(report) + "\nThe longest hundredth of the gaps can be outside the plot.")


def _shown_percentiles(values: int) -> list[int]:
    """The percentiles that so many values carry, as in `Summary`: with fewer, they are the maximum by another name."""
    return [share for share, least in ((50, 1), (90, 10), (99, 100)) if values >= least]


def _chat(report: ov_phi3.Report, path: Path) -> Path:
    turns = [t.turn for t in report.chat]
    figure, axes = plt.subplots(figsize=(7, 4.2))
    _points(axes, turns, [[s.ttft_ms or 0 for s in t.samples] for t in report.chat], COLOURS[0])
    axes.plot(turns, [t.ttft_ms for t in report.chat], color=COLOURS[0], label="TTFT, median")
    axes.set(title="Turns of a chat", xlabel="turn", ylabel="TTFT, milliseconds", ylim=(0, None))
    axes.set_xticks(turns)
    tokens = axes.twinx()
    tokens.grid(visible=False)
    tokens.plot(turns, [t.prompt_tokens for t in report.chat], color=GREY, linestyle="--", label="prompt")
    prefilled = [t.prefilled_tokens for t in report.chat]
    if all(value is not None for value in prefilled):
        tokens.plot(turns, [value or 0 for value in prefilled], color=COLOURS[1], label="prefilled")
    tokens.set(ylabel="tokens", ylim=(0, None))
    handles = [*axes.get_legend_handles_labels()[0], *tokens.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
    return _save(figure, path, _caption(report))


def plot_comparison(comparison: Comparison, path: Path) -> Path:
    """Plot ratios to every peer with quartiles, and TTFT by prompt length and by chat turn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure = plt.figure(figsize=(13, 7))
        grid = figure.add_gridspec(2, 2, width_ratios=(1.25, 1))
        _ratios(figure.add_subplot(grid[:, 0]), comparison)
        _lines(figure.add_subplot(grid[0, 1]), comparison, "ttft", "Time to first token", "prompt tokens")
        _lines(figure.add_subplot(grid[1, 1]), comparison, "chat", "Time to first token in a chat", "turn")
        return _save(figure, path, _comparison_caption(comparison))


def _comparison_caption(comparison: Comparison) -> str:
    return (
        f"{Path(comparison.model['path']).name} on {comparison.device}, {comparison.settings['threads']} threads, "
        f"{comparison.machine.cpu}"
    )


def _ratios(axes: Axes, comparison: Comparison) -> None:
    last = max((int(f.key[5:]) for f in comparison.figures if f.key.startswith("chat_")), default=0)
    shown = [f for f in comparison.figures if not f.key.startswith("chat_") or f.key == f"chat_{last}"][::-1]
    others = [peer for peer in comparison.peers if peer != "ov_phi3"]
    for number, peer in enumerate(others):
        for row, figure in enumerate(shown):
            ratio = figure.ratio(peer)
            if ratio is None:
                continue
            height = row + (len(others) / 2 - number - 0.5) * 0.16
            colour = COLOURS[(number + 1) % len(COLOURS)]
            axes.plot([ratio.p25, ratio.p75], [height, height], color=colour, linewidth=2.5, alpha=0.5)
            label = f"over {peer}" if row == 0 else None
            axes.plot([ratio.p50], [height], "o", color=colour, markersize=5, label=label)
    axes.axvline(1, color=GREY, linewidth=1)
    axes.set_yticks(range(len(shown)), [figure.title for figure in shown])
    axes.set(xscale="log", title="ov_phi3 / peer; below 1 ov_phi3 takes less")
    ticks = [0.05, 0.1, 0.2, 0.5, 1, 2, 5]
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    if others:
        axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.06), ncols=2)


def _lines(axes: Axes, comparison: Comparison, kind: str, title: str, label: str) -> None:
    figures = [f for f in comparison.figures if f.key.startswith(f"{kind}_")]
    positions = [int(f.key.partition("_")[2]) for f in figures]
    for number, peer in enumerate(comparison.peers):
        values = [summary.p50 if (summary := f.summary(peer)) else None for f in figures]
        if any(value is not None for value in values):
            heights = [float("nan") if value is None else value for value in values]
            colour = COLOURS[number % len(COLOURS)]
            axes.plot(positions, heights, "o-", color=colour, markersize=3.5, label=peer)
    axes.set(title=title, xlabel=label, ylabel="milliseconds", yscale="log")
    _plain_ticks(axes.yaxis, (1, 2, 5))
    if positions:
        axes.set_xticks(positions)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def plot_recipes(report: dict[str, Any], path: Path) -> Path:
    """Plot the perplexity of every recipe against its bytes and its time per token, with the fronts as lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    recipes = [one for one in report["recipes"] if not one["failed"]]
    sides = [("bytes", "MB of weights a token reads", [one["bytes_per_token"] / 1e6 for one in recipes])]
    if all(one["tpot_over_int4"] for one in recipes):
        times = [statistics.median(one["tpot_over_int4"]) for one in recipes]
        sides.append(("TPOT", "time per output token over that of int4", times))
    with mpl.rc_context(STYLE):
        figure, panels = plt.subplots(1, len(sides), figsize=(5.5 * len(sides) + 2.5, 5), sharey=True, squeeze=False)
        for axes, (kind, label, places) in zip(panels[0], sides, strict=True):
            _front(axes, recipes, kind, places)
            axes.set(xlabel=label)
        panels[0][0].set(ylabel="perplexity, lower is better")
        panels[0][-1].legend(loc="upper left", bbox_to_anchor=(1.02, 1), handlelength=1)
        caption = (
            f"{Path(report['source']).name} on {report['device']['name']} ({report['device']['full_name']}); "
            f"text: {report['text']['file']}, {report['text']['tokens']} tokens; "
            "filled: no other recipe is better in both respects"
        )
        return _save(figure, path, caption)


def _front(axes: Axes, recipes: list[dict[str, Any]], kind: str, places: list[float]) -> None:
    """One point for each recipe with its number in the legend, and the front as steps through the best ones."""
    best = sorted((x, one["perplexity"]) for x, one in zip(places, recipes, strict=True) if kind in one["fronts"])
    axes.step([x for x, _ in best], [y for _, y in best], where="post", color=GREY, linewidth=1, zorder=1)
    for number, (x, one) in enumerate(zip(places, recipes, strict=True), 1):
        colour = COLOURS[(number - 1) % len(COLOURS)]
        face = colour if kind in one["fronts"] else "white"
        label = f"{number}  {one['recipe'].replace(',', ', ')}"
        axes.plot([x], [one["perplexity"]], "o", markeredgecolor=colour, color=face, markersize=9, label=label)
        axes.annotate(str(number), (x, one["perplexity"]), (7, 5), textcoords="offset points", fontsize=9)
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis, (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9))
    axes.margins(0.1)
