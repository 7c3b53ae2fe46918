"""Size of a KV cache: blocks, precisions, bytes per token; and what one conversation uses of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ov_phi3.model.info import ModelInfo

__all__ = ["KVLayout", "KVUsage"]

_BITS = {"f32": 32, "f16": 16, "bf16": 16, "u8": 8, "u4": 4}
_INTEGERS = ("u8", "u4")
_SCALE_BYTES = 8  # a float32 scale and a float32 zero point


@dataclass(frozen=True, slots=True)
class KVUsage:
    """What a conversation uses of the KV cache.

    Attributes:
        cached_tokens: tokens of the conversation whose keys and values are in the cache now, so that the next turn need
            not compute them. Other conversations may evict them.
        reused_tokens: prompt tokens that the last turn took from the cache.
        free_tokens: tokens left in the context window, for the next message and its reply.
        context_length: the context window, in tokens.
        bytes: memory of the cached tokens, in the precision of the cache.
    """

    cached_tokens: int
    reused_tokens: int
    free_tokens: int
    context_length: int
    bytes: int

    def to_dict(self) -> dict[str, int]:
        """All fields as JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Layout of a KV cache: its block size, and one precision each for keys and values.

    Attributes:
        block_size: tokens per block.
        key: precision of the keys: "f32", "f16", "bf16", "u8" or "u4".
        value: precision of the values.
        value_group: values that share a scale; 0 for all values of a head.
    """

    block_size: int
    key: str = "f16"
    value: str = "f16"
    value_group: int = 0

    @classmethod
    def of(cls, info: ModelInfo, kind: str, properties: Mapping[str, Any]) -> KVLayout:
        """The layout on a device of this kind ("CPU", "GPU", "NPU"), derived from OpenVINO properties.

        Precedence: a property passed to `load`, then the property that the export wrote into the model, then the
        device's default, which is 8 bits on the CPU and float16 on a GPU. An unknown precision counts as float16.
        """
        default = info.runtime_options.get("KV_CACHE_PRECISION", "u8" if kind == "CPU" else "f16")

        def precision(name: str) -> str:
            value = str(properties.get(name, properties.get("KV_CACHE_PRECISION", default))).lower()
            return value if value in _BITS else "f16"

        group = str(properties.get("VALUE_CACHE_GROUP_SIZE", "0"))
        return cls(
            block_size=16 if kind == "GPU" else 32,
            key=precision("KEY_CACHE_PRECISION"),
            value=precision("VALUE_CACHE_PRECISION"),
            value_group=int(group) if group.isdecimal() else 0,
        )

    def block_bytes(self, info: ModelInfo) -> int:
        """Bytes of one block in all layers.

        Integer precisions have a scale and a zero point, both float32: one pair per channel and block for keys, one
        pair per token and head, or per group, for values. Source: OpenVINO's CPU plugin, 2026.4; the memory that the
        plugin requests gives the same numbers (`tests/kv/test_layout.py`).
        """
        head, block = info.head_dim, self.block_size
        keys = head * block * _BITS[self.key] // 8
        values = head * block * _BITS[self.value] // 8
        if self.key in _INTEGERS:
            keys += _SCALE_BYTES * head
        if self.value in _INTEGERS:
            values += _SCALE_BYTES * block * (head // self.value_group if self.value_group else 1)
        return info.num_layers * info.num_kv_heads * (keys + values)

    def bytes_per_token(self, info: ModelInfo) -> float:
        """Bytes of one token in all layers, including its share of the scales."""
        return self.block_bytes(info) / self.block_size
