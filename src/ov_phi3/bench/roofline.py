"""Upper limit of the decode speed: the bytes that a token reads from memory, divided by the memory bandwidth.

Decoding a token reads every weight once, and the keys and values of all preceding tokens. It computes so little per
byte that memory bandwidth bounds it (Williams, Waterman, Patterson: "Roofline", 2009):

    lower limit of TPOT (time per output token) = (weight bytes + KV cache bytes) / memory bandwidth

The limit holds for one token per step. Prompt lookup and draft models yield several tokens per step and can beat it.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ov_phi3.errors import ModelError
from ov_phi3.kv.cache import KVLayout
from ov_phi3.system.bandwidth import bandwidth

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ov_phi3.model.info import ModelInfo

__all__ = ["Roofline", "weight_bytes_per_token"]


@dataclass(frozen=True, slots=True)
class Roofline:
    """The limit that memory bandwidth sets to decoding.

    Attributes:
        bandwidth_bytes_per_s: measured memory bandwidth of the device, bytes per second.
        weight_bytes: bytes of weights that a token reads, as the model stores them.
        kv_bytes_per_token: bytes of KV cache per token, as the engine stores it.
    """

    bandwidth_bytes_per_s: float
    weight_bytes: int
    kv_bytes_per_token: float

    @classmethod
    def measure(cls, info: ModelInfo, device: str, properties: Mapping[str, Any] | None = None) -> Roofline:
        """The limit for an exported model on a device; measures the bandwidth, which takes a second or two.

        Args:
            info: the model.
            device: an OpenVINO device name.
            properties: OpenVINO properties; those that set the precision of the KV cache are used.

        Raises:
            ModelError: the model's `.xml` file cannot be read.
        """
        layout = KVLayout.of(info, device.partition(".")[0], properties or {})
        return cls(
            bandwidth_bytes_per_s=bandwidth(device),
            weight_bytes=weight_bytes_per_token(info.path / "openvino_model.xml"),
            kv_bytes_per_token=layout.bytes_per_token(info),
        )

    def bytes_at(self, cached_tokens: float) -> float:
        """Bytes that a token reads when `cached_tokens` tokens precede it."""
        return self.weight_bytes + self.kv_bytes_per_token * cached_tokens

    def limit_ms(self, cached_tokens: float) -> float:
        """Shortest possible time for a token when `cached_tokens` tokens precede it, milliseconds."""
        return self.bytes_at(cached_tokens) / self.bandwidth_bytes_per_s * 1000.0

    def fraction(self, tpot_ms: float, cached_tokens: float) -> float:
        """Fraction of the limit that a measured time per token reaches; 1 is as fast as memory bandwidth allows."""
        return self.limit_ms(cached_tokens) / tpot_ms


def weight_bytes_per_token(xml: Path) -> int:
    """Bytes of constants that one token reads, from a model's `.xml` file.

    All of them but tables in which a token looks up one row: the input embedding, unless the output layer uses the same
    one.

    Raises:
        ModelError: the file cannot be read.
    """
    try:
        root = ET.parse(xml).getroot()
    except (OSError, ET.ParseError) as exc:
        raise ModelError(f"{xml} cannot be read: {exc}.") from exc
    layers = {layer.get("id", ""): layer for layer in root.iterfind("layers/layer")}
    readers: dict[str, list[str]] = defaultdict(list)
    for edge in root.iterfind("edges/edge"):
        readers[edge.get("from-layer", "")].append(edge.get("to-layer", ""))
    reads: dict[str, int] = {}  # by place in the file: constants of equal content share one
    for key, layer in layers.items():
        data = layer.find("data")
        if layer.get("type") != "Const" or data is None:
            continue
        size, place = int(data.get("size", "0")), data.get("offset", "")
        if _is_table(key, layers, readers):
            size //= int((data.get("shape") or "1").split(",")[0])
        reads[place] = max(size, reads.get(place, 0))
    return sum(reads.values())


def _is_table(key: str, layers: dict[str, ET.Element], readers: dict[str, list[str]]) -> bool:
    """Whether a constant, decompressed or not, is only ever looked up in."""
    seen, ends = set(), set()
    pending = [key]
    while pending:
        for reader in readers[pending.pop()]:
            kind = layers[reader].get("type", "")
            if kind in ("Convert", "Subtract", "Multiply", "Reshape") and reader not in seen:
                seen.add(reader)
                pending.append(reader)
            else:
                ends.add(kind)
    return ends == {"Gather"}
