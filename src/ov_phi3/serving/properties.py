"""OpenVINO properties for replies that do not depend on what runs beside them."""

from __future__ import annotations

from types import MappingProxyType

__all__ = ["EXACT"]

EXACT = MappingProxyType(
    {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}
)
"""Float32 arithmetic and cache."""
