"""Counters of a server in Prometheus' text format.

The format: https://prometheus.io/docs/instrumenting/exposition_formats/, version 0.0.4.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ov_phi3.generation.results import GenerationResult

__all__ = ["CONTENT_TYPE", "ServerMetrics"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_HISTOGRAMS = {
    "ttft_seconds": "Time to first token, the wait in the queue included.",
    "tpot_seconds": "Time per output token, of replies with two tokens or more.",
    "queue_seconds": "Time in the request queue.",
    "reply_seconds": "Time from the request to the end of the reply.",
}
_COUNTERS = {
    "requests_total": "HTTP requests for replies, by endpoint and status.",
    "replies_total": "Replies, by the reason why they ended.",
    "prompt_tokens_total": "Tokens of all prompts.",
    "cached_tokens_total": "Tokens of prompts that were found in the KV cache.",
    "generated_tokens_total": "Tokens of all replies.",
}
_GAUGES = {"running": "Replies that are computed.", "waiting": "Replies that wait in the queue."}


class _Histogram:
    """Counts of observed values in cumulative buckets."""

    def __init__(self) -> None:
        self.counts = [0] * (len(_SECONDS) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(_SECONDS, value)] += 1
        self.sum += value

    def lines(self, name: str) -> list[str]:
        lines, total = [], 0
        for bound, count in zip([*map(str, _SECONDS), "+Inf"], self.counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_sum {self.sum}", f"{name}_count {total}"]


class ServerMetrics:
    """The counters of one server. Used in its event loop only."""

    def __init__(self) -> None:
        self._histograms = {name: _Histogram() for name in _HISTOGRAMS}
        self._counters: dict[str, defaultdict[str, int]] = {name: defaultdict(int) for name in _COUNTERS}
        for name in ("prompt_tokens_total", "cached_tokens_total", "generated_tokens_total"):
            self._counters[name][""] = 0

    def add_request(self, endpoint: str, status: int) -> None:
        """Count an HTTP request."""
        self._counters["requests_total"][f'{{endpoint="{endpoint}",status="{status}"}}'] += 1

    def add_reply(self, result: GenerationResult) -> None:
        """Count a reply that has ended."""
        metrics = result.metrics
        self._counters["replies_total"][f'{{finish_reason="{result.finish_reason}"}}'] += 1
        self._counters["prompt_tokens_total"][""] += metrics.prompt_tokens
        self._counters["cached_tokens_total"][""] += metrics.reused_tokens or 0
        self._counters["generated_tokens_total"][""] += metrics.generated_tokens
        seconds = {
            "ttft_seconds": metrics.ttft_ms,
            "tpot_seconds": metrics.tpot_ms,
            "queue_seconds": metrics.queue_ms,
            "reply_seconds": metrics.total_ms,
        }
        for name, value in seconds.items():
            if value is not None:
                self._histograms[name].observe(value / 1000.0)

    def text(self, *, running: int, waiting: int) -> str:
        """All values, in Prometheus' text format."""
        lines: list[str] = []
        for name, value in (("running", running), ("waiting", waiting)):
            lines += [*_head(name, _GAUGES[name], "gauge"), f"ov_phi3_{name} {value}"]
        for name, values in self._counters.items():
            lines += _head(name, _COUNTERS[name], "counter")
            lines += [f"ov_phi3_{name}{labels} {value}" for labels, value in sorted(values.items())]
        for name, histogram in self._histograms.items():
            lines += [*_head(name, _HISTOGRAMS[name], "histogram"), *histogram.lines(f"ov_phi3_{name}")]
        return "\n".join(lines) + "\n"


def _head(name: str, text: str, kind: str) -> list[str]:
    return [f"# HELP ov_phi3_{name} {text}", f"# TYPE ov_phi3_{name} {kind}"]
