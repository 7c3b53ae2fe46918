"""Size of a KV cache: blocks, precisions, bytes per token; and what one conversation uses of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ov_phi3.model.info import ModelInfo

__all__ = ["INTEGER_PRECISIONS", "KVLayout", "KVUsage", "inference_precision", "precision_name"]

INTEGER_PRECISIONS = ("u8", "i8", "u4", "i4")
"""Precisions of a KV cache that need scales and zero points."""

_BITS = {"f32": 32, "f16": 16, "bf16": 16, "u8": 8, "i8": 8, "u4": 4, "i4": 4}
# Names of `openvino.Type` in Python, where they differ from those of properties.
_OTHER_NAMES = {
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "uint8_t": "u8",
    "int8_t": "i8",
    "uint4_t": "u4",
    "int4_t": "i4",
}
_GPU_BLOCK = 16
_GPU_DEFAULTS = {"f32": "i8", "f16": "u4"}  # by the precision of the inference (GPU plugin 2026.4.1)


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


def precision_name(value: object) -> str:
    """The short name of a precision, such as "f16", from any spelling: "F16", "float16", `openvino.Type.f16`."""
    text = str(value).lower().removeprefix("<type: '").removesuffix("'>")
    return _OTHER_NAMES.get(text, text)


def inference_precision(kind: str, properties: Mapping[str, Any]) -> str:
    """The precision that a device of this kind computes in, by its properties; "" if they do not say it."""
    if "INFERENCE_PRECISION_HINT" in properties:
        return precision_name(properties["INFERENCE_PRECISION_HINT"])
    if kind != "GPU":
        return ""
    return "f32" if str(properties.get("EXECUTION_MODE_HINT", "")).upper().endswith("ACCURACY") else "f16"


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Layout of a KV cache: its block size, and one precision each for keys and values.

    Attributes:
        block_size: tokens per block.
        key: precision of the keys: "f32", "f16", "bf16", "u8", "i8", "u4" or "i4".
        value: precision of the values.
        value_group: values that share a scale; 0 for all values of a head.
        scale_bytes: bytes of a scale and its zero point, for integer precisions.
    """

    block_size: int
    key: str = "f16"
    value: str = "f16"
    value_group: int = 0
    scale_bytes: int = 8

    @classmethod
    def of(cls, info: ModelInfo, kind: str, properties: Mapping[str, Any]) -> KVLayout:
        """The layout on a device of this kind ("CPU", "GPU", "NPU"), derived from OpenVINO properties.

        Precedence: a property passed to `load`, then the property that the export wrote into the model, then the
        device's default: 8 bits on the CPU; on a GPU 4 bits, or 8 bits if it computes in float32. An unknown precision
        counts as float16.
        """
        if kind == "GPU":  # has no properties for keys and values apart, and no groups
            computes = inference_precision(kind, properties)
            default = info.runtime_options.get("KV_CACHE_PRECISION", _GPU_DEFAULTS.get(computes, "f16"))
            name = _known(properties.get("KV_CACHE_PRECISION", default))
            return cls(_GPU_BLOCK, name, name, scale_bytes=8 if computes == "f32" else 4)
        default = info.runtime_options.get("KV_CACHE_PRECISION", "u8" if kind == "CPU" else "f16")
        both = properties.get("KV_CACHE_PRECISION", default)
        group = str(properties.get("VALUE_CACHE_GROUP_SIZE", "0"))
        return cls(
            block_size=32,
            key=_known(properties.get("KEY_CACHE_PRECISION", both)),
            value=_known(properties.get("VALUE_CACHE_PRECISION", both)),
            value_group=int(group) if group.isdecimal() else 0,
        )

    def block_bytes(self, info: ModelInfo) -> int:
        """Bytes of one block in all layers.

        Integer precisions have a scale and a zero point: one pair per channel and block for keys, one pair per token
        and head, or per group, for values. They are float32 on a CPU, and of the inference's precision on a GPU.
        Source: OpenVINO's plugins, 2026.4; the memory that they request gives the same numbers
        (`tests/kv/test_layout.py`, `tests/system/test_emulated_gpu.py`).
        """
        head, block = info.head_dim, self.block_size
        keys = head * block * _BITS[self.key] // 8
        values = head * block * _BITS[self.value] // 8
        if block == _GPU_BLOCK and _BITS[self.value] == 4:
            values = block * -(-head // 32) * 16  # 4-bit values of a token are padded to 16 bytes
        if self.key in INTEGER_PRECISIONS:
            keys += self.scale_bytes * head
        if self.value in INTEGER_PRECISIONS:
            values += self.scale_bytes * block * (head // self.value_group if self.value_group else 1)
        return info.num_layers * info.num_kv_heads * (keys + values)

    def bytes_per_token(self, info: ModelInfo) -> float:
        """Bytes of one token in all layers, including its share of the scales."""
        return self.block_bytes(info) / self.block_size


def _known(precision: object) -> str:
    name = precision_name(precision)
    return name if name in _BITS else "f16"
