"""The report of a measurement: the samples, and all that the figures depend on."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, overload

from ov_phi3.bench.roofline import Roofline
from ov_phi3.bench.samples import ChatTurn, Measurement
from ov_phi3.bench.text import chat_section, gaps_section, header_section, latency_section, load_section
from ov_phi3.system.machine import Machine

__all__ = ["Report"]


@dataclass(frozen=True, slots=True)
class Report:
    """The result of `measure`, with all that it depends on. Also a sequence of its measurements.

    Attributes:
        measured_at: time of the measurement, UTC, ISO 8601.
        machine: the machine and the package versions.
        device: the device, its driver and capabilities.
        model: the model, its storage format, and its manifest.
        settings: how the model was loaded and measured, with the seed.
        load_ms: duration of `load` and of its parts, milliseconds.
        first_inference_ms: duration of the first short inference after loading; None if the pipeline was used before.
        warm_inference_ms: duration of the same inference repeated; the difference is the cost of a first request.
        measurements: one per prompt length.
        chat: one per turn of a chat; empty if no chat was measured.
        roofline: the limit set by memory bandwidth; None if it was not measured.
        loaded_memory_bytes: resident memory of the process before the first measured reply; None where the system does
            not report it.
        peak_memory_bytes: peak memory of the process up to the last reply, loading included; None likewise.
    """

    measured_at: str
    machine: Machine
    device: dict[str, Any]
    model: dict[str, Any]
    settings: dict[str, Any]
    load_ms: dict[str, float]
    first_inference_ms: float | None
    warm_inference_ms: float
    measurements: tuple[Measurement, ...]
    chat: tuple[ChatTurn, ...] = ()
    roofline: Roofline | None = None
    loaded_memory_bytes: int | None = None
    peak_memory_bytes: int | None = None

    def __repr__(self) -> str:
        where = f"{self.model['path']} on {self.device['name']}"
        return f"<Report of {where}: {len(self.measurements)} prompt lengths, {len(self.chat)} chat turns>"

    def _repr_html_(self) -> str:
        """The tables as a notebook shows them."""
        return f"<pre>{html.escape(str(self))}</pre>"

    def __len__(self) -> int:
        return len(self.measurements)

    def __iter__(self) -> Iterator[Measurement]:
        return iter(self.measurements)

    @overload
    def __getitem__(self, index: int) -> Measurement: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Measurement]: ...

    def __getitem__(self, index: int | slice) -> Measurement | Sequence[Measurement]:
        return self.measurements[index]

    def __str__(self) -> str:
        sections = [header_section(self.machine, self.device, self.model, self.settings)]
        if self.measurements:
            sections.append(latency_section(self.measurements, self.settings, self.roofline))
            sections.append(gaps_section(self.measurements))
        if self.chat:
            sections.append(chat_section(self.chat))
        inference_ms = (self.first_inference_ms, self.warm_inference_ms)
        memory_bytes = (self.loaded_memory_bytes, self.peak_memory_bytes)
        sections.append(load_section(self.load_ms, self.settings["compile_cache"], inference_ms, memory_bytes))
        return "\n\n".join(sections)

    def to_dict(self) -> dict[str, Any]:
        """All fields, every sample included, as JSON-ready values."""
        return {
            "measured_at": self.measured_at,
            "machine": self.machine.to_dict(),
            "device": self.device,
            "model": self.model,
            "settings": self.settings,
            "load_ms": self.load_ms,
            "first_inference_ms": self.first_inference_ms,
            "warm_inference_ms": self.warm_inference_ms,
            "loaded_memory_bytes": self.loaded_memory_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "roofline": self.roofline and asdict(self.roofline),
            "measurements": [m.to_dict() for m in self.measurements],
            "chat": [turn.to_dict() for turn in self.chat],
        }
