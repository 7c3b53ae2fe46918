"""The samples of a comparison, and the figures that follow from them, as values and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from ov_phi3 import DeviceInfo, Machine, ModelInfo, Roofline, Summary

if TYPE_CHECKING:
    from _peers import Peer

__all__ = ["OURS", "Comparison", "Figure", "Run", "figure_order"]

OURS = "ov_phi3"

_KINDS = {"start": 0, "ttft": 1, "tpot": 2, "chat": 3, "memory": 4}
_TITLES = {
    "start": "import and load",
    "ttft": "TTFT, {} tokens",
    "tpot": "TPOT after {} tokens",
    "chat": "TTFT of chat turn {}",
    "memory": "peak memory",
}


@dataclass
class Run:
    """The samples of a run, collected while it goes on.

    Attributes:
        peers: names of all peers.
        values: by figure, by repetition, by peer: the measured values.
        bandwidths: memory bandwidth, measured between the peers, bytes per second.
        traffic: by peer, the bytes of weights that a token reads, and of KV cache for each token before it.
        dropped: peers that were not measured, each with the reason.
        ids: by peer, the ids of every reply, to compare them with ours.
        versions: by peer, its package versions.
    """

    peers: tuple[str, ...]
    values: dict[str, dict[tuple[int, int], dict[str, float | None]]] = field(default_factory=dict)
    bandwidths: list[float] = field(default_factory=list)
    traffic: dict[str, tuple[int, float]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    ids: dict[str, list[list[int]]] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, figure: str, values: Mapping[str, float | None], at: tuple[int, int]) -> None:
        """Add values of a figure, by peer, at a round and repetition; peers may come one after another."""
        self.values.setdefault(figure, {}).setdefault(at, {}).update(values)

    @property
    def samples(self) -> dict[str, dict[str, list[float | None]]]:
        """By figure, by peer: one value per repetition, None where a peer has none."""
        return {
            figure: {peer: [row.get(peer) for row in rows.values()] for peer in self.peers}
            for figure, rows in self.values.items()
        }

    def rooflines(self) -> dict[str, Roofline]:
        """By peer, the limit that memory bandwidth (the median of the run) sets to its files."""
        return {peer: Roofline(median(self.bandwidths), *traffic) for peer, traffic in self.traffic.items()}


@dataclass(frozen=True)
class Figure:
    """The samples of one measured quantity.

    Attributes:
        key: name in the JSON: "start", "memory", or "ttft_N", "tpot_N" (N prompt tokens) and "chat_N" (turn N).
        title: name for people.
        unit: "ms" or "bytes".
        samples: by peer, one value per repetition; None where that peer has none.
    """

    key: str
    title: str
    unit: str
    samples: dict[str, list[float | None]]

    @classmethod
    def of(cls, key: str, samples: dict[str, list[float | None]]) -> Figure:
        """The figure of a key, with its title and unit."""
        kind, _, number = key.partition("_")
        return cls(key, _TITLES[kind].format(number), "bytes" if kind == "memory" else "ms", samples)

    def summary(self, peer: str) -> Summary | None:
        """The summary of one peer's values."""
        return Summary.of(self.samples.get(peer, ()))

    @property
    def number(self) -> int:
        """Prompt tokens or turn of the key; 0 if it has none."""
        return figure_order(self.key)[1]

    def ratio(self, peer: str, ours: str = OURS, scale: float = 1.0) -> Summary | None:
        """Our value divided by the peer's, pair by pair, times `scale`; below 1 ours is smaller."""
        pairs = zip(self.samples.get(ours, ()), self.samples.get(peer, ()), strict=False)
        return Summary.of(a / b * scale if a and b else None for a, b in pairs)

    def to_dict(self) -> dict[str, Any]:
        """Medians, ratios and samples as JSON-ready values."""
        medians = {peer: summary.p50 for peer in self.samples if (summary := self.summary(peer))}
        ratios = {peer: ratio.to_dict() for peer in self.samples if peer != OURS and (ratio := self.ratio(peer))}
        return {"unit": self.unit, "medians": medians, "ov_phi3_over_peer": ratios, "samples": self.samples}


def figure_order(key: str) -> tuple[int, int]:
    """Sort key of a figure's key: by kind, then by prompt tokens or turn."""
    kind, _, number = key.partition("_")
    return _KINDS[kind], int(number or 0)


@dataclass(frozen=True)
class Comparison:
    """All figures of a run, with all that they depend on.

    Attributes:
        figures: in the order in which they are shown.
        peers: names of the measured peers, ours first.
        dropped: the other peers, each with its reason.
        unequal: by peer, the conditions that could not be made equal.
        equal_ids: by peer, the number of replies with the same ids as ours, and the number of replies.
        settings: the command's arguments.
        versions: by peer, its package versions.
        machine: the machine.
        device: the device.
        model: the model.
        rooflines: by peer, the limit that memory bandwidth sets to its files.
        bandwidths: the measurements of memory bandwidth, bytes per second.
    """

    figures: tuple[Figure, ...]
    peers: tuple[str, ...]
    dropped: dict[str, str]
    unequal: dict[str, str]
    equal_ids: dict[str, tuple[int, int]]
    settings: dict[str, Any]
    versions: dict[str, dict[str, str]]
    machine: Machine
    device: DeviceInfo
    model: dict[str, Any]
    rooflines: dict[str, Roofline]
    bandwidths: list[float]

    @classmethod
    def of(
        cls,
        run: Run,
        peers: Sequence[Peer],
        settings: dict[str, Any],
        machine: Machine,
        device: DeviceInfo,
        info: ModelInfo,
    ) -> Comparison:
        """The comparison of a run's samples."""
        measured = tuple(peer.name for peer in peers if peer.name not in run.dropped)
        figures = (Figure.of(key, samples) for key, samples in run.samples.items())
        return cls(
            figures=tuple(sorted(figures, key=lambda figure: figure_order(figure.key))),
            peers=measured,
            dropped=run.dropped,
            unequal={peer.name: peer.unequal for peer in peers if peer.name in measured and peer.unequal},
            equal_ids={
                name: (sum(a == b for a, b in zip(run.ids[OURS], run.ids[name], strict=False)), len(run.ids[name]))
                for name in measured
                if name != OURS and name in run.ids and OURS in run.ids
            },
            settings={key: value if isinstance(value, (int, list)) else str(value) for key, value in settings.items()},
            versions=run.versions,
            machine=machine,
            device=device,
            model={"path": str(info.path), "quantization": info.quantization, "weight_bytes": info.weight_bytes},
            rooflines=run.rooflines(),
            bandwidths=run.bandwidths,
        )

    @property
    def ours(self) -> tuple[str, ...]:
        """Names of the peers that are this library, with other files or another backend."""
        return tuple(peer for peer in self.peers if peer.startswith(OURS))

    @property
    def tpot_figures(self) -> tuple[Figure, ...]:
        """The figures of the time per token, by prompt length."""
        return tuple(figure for figure in self.figures if figure.key.startswith("tpot_"))

    def bytes_per_token(self, peer: str, figure: Figure) -> float | None:
        """Bytes that a token in the middle of a reply reads; None if they are unknown."""
        limit = self.rooflines.get(peer)
        return None if limit is None else limit.bytes_at(figure.number + self.settings["new_tokens"] / 2)

    def at_equal_bytes(self, figure: Figure, ours: str, peer: str) -> Summary | None:
        """Ratio of our time per byte read to the peer's, pair by pair; None if a number of bytes is unknown."""
        mine, theirs = self.bytes_per_token(ours, figure), self.bytes_per_token(peer, figure)
        return figure.ratio(peer, ours, theirs / mine) if mine and theirs else None

    def roofline_fractions(self, peer: str) -> dict[int, float]:
        """By prompt length, a peer's median TPOT as a fraction of the speed that memory bandwidth allows."""
        fractions = {}
        for figure in self.tpot_figures:
            summary, limit = figure.summary(peer), self.rooflines.get(peer)
            if summary and limit:
                fractions[figure.number] = limit.fraction(summary.p50, figure.number + self.settings["new_tokens"] / 2)
        return fractions

    def _equal_bytes_dict(self) -> dict[str, Any]:
        others = [peer for peer in self.peers if peer not in self.ours]
        return {
            ours: {
                figure.key: {
                    peer: ratio.to_dict() for peer in others if (ratio := self.at_equal_bytes(figure, ours, peer))
                }
                for figure in self.tpot_figures
            }
            for ours in self.ours
        }

    def to_dict(self) -> dict[str, Any]:
        """All fields, every sample included, as JSON-ready values."""
        return {
            "machine": self.machine.to_dict(),
            "device": asdict(self.device),
            "roofline": {
                "bandwidths": self.bandwidths,
                "peers": {peer: asdict(limit) for peer, limit in self.rooflines.items()},
                "of_limit": {peer: self.roofline_fractions(peer) for peer in self.peers},
                "tpot_ratio_at_equal_bytes": self._equal_bytes_dict(),
            },
            "model": self.model,
            "settings": self.settings,
            "versions": self.versions,
            "peers": list(self.peers),
            "not_measured": self.dropped,
            "not_equal": self.unequal,
            "replies_with_equal_ids": {name: {"equal": a, "of": b} for name, (a, b) in self.equal_ids.items()},
            "figures": {figure.key: figure.to_dict() for figure in self.figures},
        }
