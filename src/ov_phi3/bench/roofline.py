"""Upper limit of the decode speed: the bytes that a token reads from memory, divided by the memory bandwidth.

Decoding a token reads every weight once, and the keys and values of all preceding tokens. It computes so little per
byte that memory bandwidth bounds it (Williams, Waterman, Patterson: "Roofline", 2009):

    lower limit of TPOT (time per output token) = (weight bytes + KV cache bytes) / memory bandwidth

The limit holds for one token per step. Prompt lookup and draft models yield several tokens per step and can beat it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ov_phi3.kv.layout import KVLayout
from ov_phi3.model.ir import IrGraph
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

    All constants are read whole, except a table that is only looked up in: of the input embedding a token reads one
    row, unless the output layer uses the same table.

    Raises:
        ModelError: the file cannot be read.
    """
    graph = IrGraph.read(xml)
    sizes: dict[int, int] = {}  # by offset in the file: constants with equal content share it
    for layer in graph.layers("Const"):
        if (constant := layer.constant) is None:
            continue
        rows = constant.shape[0] if constant.shape and _is_table(layer.id, graph) else 1
        sizes[constant.offset] = max(constant.size // rows, sizes.get(constant.offset, 0))
    return sum(sizes.values())


def _is_table(constant: str, graph: IrGraph) -> bool:
    """Whether all readers of a constant, behind its decompression if it has one, look up rows in it."""
    decompression, readers = set(), set()
    pending = [constant]
    while pending:
        for edge in graph.edges_from(pending.pop()):
            type_ = graph.layer(edge.reader).type
            if type_ in ("Convert", "Subtract", "Multiply", "Reshape") and edge.reader not in decompression:
                decompression.add(edge.reader)
                pending.append(edge.reader)
            else:
                readers.add(type_)
    return readers == {"Gather"}
