"""How large the KV cache of a model is made, and how much of the context window it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ov_phi3.errors import ConfigError
from ov_phi3.kv.layout import INTEGER_PRECISIONS, KVLayout, inference_precision, precision_name
from ov_phi3.system.memory import Memory, machine_memory

if TYPE_CHECKING:
    from ov_phi3.model.info import ModelInfo
    from ov_phi3.system.devices import DeviceInfo

__all__ = ["KVCachePlan", "plan_kv_cache"]

_GIB = 2**30
# Share of the memory that is free beside the model which the default may take. The rest is for prefill and for others.
_SHARE = 0.5
# Memory that a loaded model takes, relative to its weights on disk: the CPU plugin repacks them for its kernels.
_WEIGHTS = 1.5


@dataclass(frozen=True, slots=True)
class KVCachePlan:
    """Planned size and layout of the KV cache.

    Attributes:
        layout: block size and precisions.
        num_blocks: number of blocks; 0 for a cache that grows on demand.
        context_length: tokens of one conversation that fit.
        paged: whether the backend must create a paged cache of this size.
        reason: why the context length is below the model's, for messages; starts with a space, or is empty.
        warnings: sentences for the user.
    """

    layout: KVLayout
    num_blocks: int
    context_length: int
    paged: bool
    reason: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def capacity(self) -> int:
        """Tokens that the planned blocks hold; 0 for a cache that grows."""
        return self.num_blocks * self.layout.block_size


def plan_kv_cache(
    info: ModelInfo,
    device: DeviceInfo,
    properties: Mapping[str, Any],
    *,
    context_length: int | None = None,
    kv_cache_gb: float | None = None,
    conversations: int = 1,
    memory: Memory | None = None,
    draft: ModelInfo | None = None,
) -> KVCachePlan:
    """Plan the KV cache of a model on a device. With a draft model, the memory is shared with its weights and cache.

    On the CPU the cache has as many blocks as `conversations` of full length need: memory is taken when a block is
    first used, and a growing cache would evict one conversation's blocks for another's much earlier. On a GPU, which
    takes the memory at once, the cache grows unless `kv_cache_gb` gives its size.

    Raises:
        ConfigError: a budget below two blocks, a context window that the memory cannot hold, two settings for the same
            size, or a precision that the device does not support.
        TypeError: `kv_cache_gb` is not a number.
    """
    layout = KVLayout.of(info, device.kind, properties)
    window = context_length or info.context_length
    scheduler = properties.get("scheduler_config")
    paged = device.kind != "NPU" and str(properties.get("ATTENTION_BACKEND", "PA")).upper() == "PA"
    if paged:
        _check_precision(device, properties)
    size = layout.block_bytes(info) + (KVLayout.of(draft, device.kind, properties).block_bytes(draft) if draft else 0)
    if kv_cache_gb is not None:
        blocks = _blocks_in_budget(kv_cache_gb, layout, size, scheduler)
        window, reason = _fit_window(window, blocks, layout, f" (what kv_cache_gb={kv_cache_gb:g} holds)")
        return KVCachePlan(layout, blocks if paged else 0, window, paged, reason)
    if scheduler is not None:
        blocks = scheduler.num_kv_blocks or int(scheduler.cache_size * _GIB / layout.block_bytes(info))
        if not blocks:
            return KVCachePlan(layout, 0, window, paged=False)
        window, reason = _fit_window(window, blocks, layout, " (what the scheduler_config's cache holds)")
        return KVCachePlan(layout, blocks, window, False, reason)
    # GenAI divides a cache of fixed size between a draft model and the model by a rule of its own.
    if not paged or device.kind != "CPU" or "draft_model" in properties:
        return KVCachePlan(layout, 0, window, paged)
    memory = memory or machine_memory()
    weights = info.weight_bytes + (draft.weight_bytes if draft else 0)
    return _plan_in_memory(weights, size, layout, window, context_length is not None, conversations, memory)


def _check_precision(device: DeviceInfo, properties: Mapping[str, Any]) -> None:
    """Refuse an integer KV cache with float32 inference on a GPU, which would fail at the first request (2026.4.1)."""
    precision = precision_name(properties.get("KV_CACHE_PRECISION", ""))
    if device.kind != "GPU" or precision not in INTEGER_PRECISIONS:
        return
    if inference_precision(device.kind, properties) == "f32":
        raise ConfigError(
            f"KV_CACHE_PRECISION={precision} does not work on {device.name} if it computes in float32: the GPU plugin "
            "has no paged attention for both. Leave out KV_CACHE_PRECISION, or INFERENCE_PRECISION_HINT."
        )


def _blocks_in_budget(gib: float, layout: KVLayout, size: int, scheduler: object) -> int:
    """Number of blocks of `size` bytes that fit a budget."""
    if isinstance(gib, bool) or not isinstance(gib, (int, float)):
        raise TypeError(f"kv_cache_gb must be a number of GiB, not {gib!r}")
    if scheduler is not None:
        raise ConfigError("kv_cache_gb and ov_config['scheduler_config'] both limit the KV cache; give one of them.")
    if not gib <= 2**20:
        raise ConfigError(f"kv_cache_gb={gib}; expected a number of GiB that a machine can have.")
    blocks = int(gib * _GIB / size) if gib > 0 else 0
    if blocks < 2:
        least = 2 * size / _GIB
        raise ConfigError(
            f"kv_cache_gb={gib} holds no conversation: a token takes {size / layout.block_size:,.0f} bytes in this "
            f"model's cache, and two blocks of {layout.block_size} tokens are the least. Give at least {least:.2g} GiB."
        )
    return blocks


def _fit_window(window: int, blocks: int, layout: KVLayout, reason: str) -> tuple[int, str]:
    """The context length that these blocks hold, less one block for the token that is being computed."""
    tokens = (blocks - 1) * layout.block_size
    return (tokens, reason) if tokens < window else (window, "")


def _plan_in_memory(
    weight_bytes: int,
    size: int,
    layout: KVLayout,
    window: int,
    requested: bool,
    conversations: int,
    memory: Memory | None,
) -> KVCachePlan:
    """Plan for whole conversations, or for what the free memory holds; one conversation may use all of it.

    `weight_bytes` are those of all models, and `size` the bytes of a block in all caches.
    """
    blocks = conversations * (-(-window // layout.block_size) + 1)
    if memory is None:
        return KVCachePlan(layout, blocks, window, paged=True)
    free = memory.available - int(_WEIGHTS * weight_bytes)
    if requested and blocks * size > free:
        tokens = max(0, free // size // conversations - 1) * layout.block_size
        raise ConfigError(
            f"context_length={window} needs {blocks * size / _GIB:.1f} GiB of KV cache, and {max(0, free) / _GIB:.1f} "
            f"GiB are free beside the model. Ask for at most {tokens} tokens, or for a smaller KV_CACHE_PRECISION."
        )
    if not requested and blocks * size > _SHARE * free:
        fewer = max(2, int(_SHARE * max(0, free)) // size)
        tokens, reason = _fit_window(window, fewer, layout, " (what the memory that was free at loading holds)")
        warning = (
            f"the context window is {tokens} tokens instead of {window}: {window} would take "
            f"{blocks * size / _GIB:.1f} GiB of KV cache, and {max(0, free) / _GIB:.1f} GiB are free beside the model. "
            "Pass context_length= or kv_cache_gb= to choose it yourself."
        )
        return KVCachePlan(layout, fewer, tokens, True, reason, (warning,) if reason else ())
    return KVCachePlan(layout, blocks, window, paged=True)
