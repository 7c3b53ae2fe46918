"""What a comparison found, as a dataclass, as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ov_phi3 import Machine, ModelInfo, Roofline, Summary
from ov_phi3.bench.table import table

if TYPE_CHECKING:
    from _peers import Peer
    from compare import Run

__all__ = ["Comparison", "Figure", "comparison_text"]

OURS = "ov_phi3"


@dataclass(frozen=True)
class Figure:
    """One thing that was measured.

    Attributes:
        key: its name in the JSON.
        title: its name for people.
        unit: "ms" or "bytes".
        samples: by peer, one value per repetition; None where that peer has none.
    """

    key: str
    title: str
    unit: str
    samples: dict[str, list[float | None]]

    def summary(self, peer: str) -> Summary | None:
        """The values of one peer."""
        return Summary.of(self.samples.get(peer, ()))

    def ratio(self, peer: str) -> Summary | None:
        """Ours over the peer's, pair by pair; below 1 ours is less."""
        pairs = zip(self.samples.get(OURS, ()), self.samples.get(peer, ()), strict=False)
        return Summary.of(ours / theirs if ours and theirs else None for ours, theirs in pairs)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        medians = {peer: found.p50 for peer in self.samples if (found := self.summary(peer))}
        ratios = {peer: found.to_dict() for peer in self.samples if peer != OURS and (found := self.ratio(peer))}
        return {"unit": self.unit, "medians": medians, "ov_phi3_over_peer": ratios, "samples": self.samples}


@dataclass(frozen=True)
class Comparison:
    """All figures, with what they depend on.

    Attributes:
        figures: in the order in which they are shown.
        peers: names, ours first; those that were measured.
        dropped: the others, each with its reason.
        unequal: by peer, what could not be made equal.
        equal_ids: by peer, how many replies had the same ids as ours, of how many.
        settings: the command's arguments.
        versions: by peer, its packages.
        machine: where.
        model: which.
        roofline: the limit that memory sets to those that read the exported files.
    """

    figures: tuple[Figure, ...]
    peers: tuple[str, ...]
    dropped: dict[str, str]
    unequal: dict[str, str]
    equal_ids: dict[str, tuple[int, int]]
    settings: dict[str, Any]
    versions: dict[str, dict[str, str]]
    machine: Machine
    model: dict[str, Any]
    roofline: Roofline

    @classmethod
    def of(
        cls,
        run: Run,
        peers: Sequence[Peer],
        settings: dict[str, Any],
        machine: Machine,
        info: ModelInfo,
        roofline: Roofline,
    ) -> Comparison:
        """Of the samples of a run."""
        measured = tuple(peer.name for peer in peers if peer.name not in run.dropped)
        figures = (Figure(key, *_described(key), samples) for key, samples in run.samples.items())
        return cls(
            figures=tuple(sorted(figures, key=lambda figure: _order(figure.key))),
            peers=measured,
            dropped=run.dropped,
            unequal={peer.name: peer.unequal for peer in peers if peer.name in measured and peer.unequal},
            equal_ids={
                name: (sum(a == b for a, b in zip(run.ids[OURS], run.ids[name], strict=False)), len(run.ids[name]))
                for name in measured
                if name != OURS and name in run.ids and OURS in run.ids
            },
            settings={key: value if isinstance(value, (int, list)) else str(value) for key, value in settings.items()},
            versions=run.about,
            machine=machine,
            model={"path": str(info.path), "quantization": info.quantization, "weight_bytes": info.weight_bytes},
            roofline=roofline,
        )

    def of_limit(self, peer: str) -> dict[int, float]:
        """How much of the speed that memory allows a peer's median TPOT reaches, by prompt length."""
        found = {}
        for figure in self.figures:
            summary = figure.summary(peer)
            if figure.key.startswith("tpot_") and summary:
                tokens = int(figure.key[5:])
                found[tokens] = self.roofline.fraction(summary.p50, tokens + self.settings["new_tokens"] / 2)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything, every sample included, as JSON-ready values."""
        return {
            "machine": self.machine.to_dict(),
            "roofline": {**asdict(self.roofline), "ov_phi3_of_limit": self.of_limit(OURS)},
            "model": self.model,
            "settings": self.settings,
            "versions": self.versions,
            "peers": list(self.peers),
            "not_measured": self.dropped,
            "not_equal": self.unequal,
            "replies_with_equal_ids": {name: {"equal": a, "of": b} for name, (a, b) in self.equal_ids.items()},
            "figures": {figure.key: figure.to_dict() for figure in self.figures},
        }


_KINDS = {"start": 0, "ttft": 1, "tpot": 2, "chat": 3, "memory": 4}


def _order(key: str) -> tuple[int, int]:
    kind, _, number = key.partition("_")
    return _KINDS[kind], int(number or 0)


def _described(key: str) -> tuple[str, str]:
    """Title and unit of a figure."""
    kind, _, number = key.partition("_")
    titles = {
        "start": "import and load",
        "ttft": f"TTFT, {number} tokens",
        "tpot": f"TPOT after {number} tokens",
        "chat": f"TTFT of chat turn {number}",
        "memory": "peak memory",
    }
    return titles[kind], "bytes" if kind == "memory" else "ms"


def comparison_text(found: Comparison) -> str:
    """Two tables, and what is to be known beside them."""
    last = max((_order(f.key)[1] for f in found.figures if f.key.startswith("chat_")), default=0)
    shown = [f for f in found.figures if not f.key.startswith("chat_") or f.key in ("chat_2", f"chat_{last}")]
    others = [peer for peer in found.peers if peer != OURS]
    medians = [("median", *found.peers)] + [(_title(f), *(_value(f, peer) for peer in found.peers)) for f in shown]
    ratios = [("ov_phi3 over", *others)] + [(f.title, *(_ratio(f, peer) for peer in others)) for f in shown]
    parts = [
        f"{found.machine}\n{found.model['path']} ({found.model['quantization']}), {found.settings['threads']} threads, "
        f"greedy, {found.settings['new_tokens']} new tokens, the same prompts by id",
        table(medians),
    ]
    if others:
        parts.append(f"{table(ratios)}\nMedian of the ratios (quartiles), pair by pair; below 1 ov_phi3 is faster.")
    parts.append(_limit(found))
    parts.append("\n".join(_notes(found)))
    return "\n\n".join(part for part in parts if part)


def _limit(found: Comparison) -> str:
    limit = found.roofline
    shares = ", ".join(f"{share:.0%} after {tokens} tokens" for tokens, share in found.of_limit(OURS).items())
    return (
        f"Limit: a token of the exported model reads {limit.weight_bytes / 1e6:.0f} MB of weights, and memory gave "
        f"{limit.bandwidth_bytes_per_s / 1e9:.1f} GB/s, so that none can\ntake less than {limit.limit_ms(0):.2f} ms. "
        f"ov_phi3 reached {shares} of the limit at that length."
    )


def _title(figure: Figure) -> str:
    return f"{figure.title}, {'MiB' if figure.unit == 'bytes' else 'ms'}"


def _value(figure: Figure, peer: str) -> str:
    found = figure.summary(peer)
    if found is None:
        return "-"
    if figure.unit == "bytes":
        return f"{found.p50 / 2**20:.0f}"
    return f"{found.p50:.2f}" if found.p50 < 100 else f"{found.p50:.0f}"


def _ratio(figure: Figure, peer: str) -> str:
    found = figure.ratio(peer)
    return "-" if found is None else f"{found.p50:.3f} ({found.p25:.3f} to {found.p75:.3f})"


def _notes(found: Comparison) -> list[str]:
    lines = []
    for peer in found.peers:
        versions = ", ".join(f"{name} {version}" for name, version in found.versions.get(peer, {}).items())
        line = f"{peer}: {versions}."
        if peer in found.equal_ids:
            equal, of = found.equal_ids[peer]
            line += f" Replies with the same ids as ov_phi3: {equal} of {of}."
        if peer in found.unequal:
            line += f" Not equal: {found.unequal[peer]}."
        lines.append(line)
    lines += [f"{peer}: not measured: {reason}" for peer, reason in found.dropped.items()]
    return lines
