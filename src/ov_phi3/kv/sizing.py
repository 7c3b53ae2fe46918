"""How large the engine's KV cache is, and how much of the context window fits it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ov_phi3.errors import ConfigError
from ov_phi3.kv.cache import KVLayout
from ov_phi3.system import machine

if TYPE_CHECKING:
    from ov_phi3.model.info import ModelInfo
    from ov_phi3.system.devices import DeviceInfo

__all__ = ["KVPool", "plan"]

_GIB = 2**30
# A whole prompt in one step, as in GenAI's own latency setting.
_WHOLE_PROMPTS = 2**31 - 1
# What the default may take of the memory that is free beside the model. The rest is for prefill and for others.
_SHARE = 0.5
# Memory that a model takes when it is loaded, over the size of its weights: they are repacked for the CPU's kernels.
_WEIGHTS = 1.5


@dataclass(frozen=True, slots=True)
class KVPool:
    """A KV cache of a size.

    Attributes:
        layout: its blocks and precisions.
        num_blocks: places for blocks; 0 for a cache that grows as it is needed.
        window: tokens of one conversation that fit.
        scheduler: whether the engine is to be given a scheduler for it, which means paged attention.
        because: why the window is smaller than the model's, for messages; begins with a space, or is empty.
        doubts: what the user should know.
    """

    layout: KVLayout
    num_blocks: int
    window: int
    scheduler: bool
    because: str = ""
    doubts: tuple[str, ...] = ()

    def properties(self, given: Mapping[str, Any], step: int = 0) -> dict[str, Any]:
        """The engine's properties with a scheduler for this pool, where it needs one and has none.

        Args:
            given: the properties.
            step: most tokens to compute at once; 0 for any number.
        """
        if not self.scheduler:
            return dict(given)
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.num_kv_blocks = self.num_blocks
        scheduler.enable_prefix_caching = True
        scheduler.max_num_batched_tokens = step or _WHOLE_PROMPTS
        return {**given, "scheduler_config": scheduler}


def plan(
    info: ModelInfo,
    device: DeviceInfo,
    properties: Mapping[str, Any],
    *,
    context_length: int | None = None,
    kv_cache_gb: float | None = None,
    conversations: int = 1,
    memory: machine.Memory | None = None,
) -> KVPool:
    """The KV cache for a model on a device.

    On the CPU its places are as many as one conversation of full length needs: memory is taken when a place is first
    used, and a cache that grows would throw out one conversation's blocks for another's long before that. On a GPU,
    which takes the memory at once, it grows unless `kv_cache_gb` says how large it is.

    Raises:
        ConfigError: a budget that holds nothing, a window that the memory cannot hold, or two settings for one thing.
        TypeError: `kv_cache_gb` is not a number.
    """
    layout = KVLayout.of(info, device.kind, properties)
    window = context_length or info.context_length
    user = properties.get("scheduler_config")
    paged = device.kind != "NPU" and str(properties.get("ATTENTION_BACKEND", "PA")).upper() == "PA"
    if kv_cache_gb is not None:
        blocks = _budget(kv_cache_gb, layout, info, user)
        window, because = _fitted(window, blocks, layout, f" (what kv_cache_gb={kv_cache_gb:g} holds)")
        return KVPool(layout, blocks if paged else 0, window, paged, because)
    if user is not None:
        blocks = user.num_kv_blocks or int(user.cache_size * _GIB / layout.block_bytes(info))
        if not blocks:
            return KVPool(layout, 0, window, scheduler=False)
        window, because = _fitted(window, blocks, layout, " (what the scheduler_config's cache holds)")
        return KVPool(layout, blocks, window, False, because)
    # A draft model shares the places of a cache of fixed size with the model, by GenAI's own reckoning.
    if not paged or device.kind != "CPU" or "draft_model" in properties:
        return KVPool(layout, 0, window, paged)
    return _in_memory(
        info, layout, window, context_length is not None, conversations, memory or machine.Probe().memory()
    )


def _budget(gib: float, layout: KVLayout, info: ModelInfo, scheduler: object) -> int:
    """Blocks that fit a budget."""
    if isinstance(gib, bool) or not isinstance(gib, (int, float)):
        raise TypeError(f"kv_cache_gb must be a number of GiB, not {gib!r}")
    if scheduler is not None:
        raise ConfigError("kv_cache_gb and ov_config['scheduler_config'] both limit the KV cache; give one of them.")
    if not gib <= 2**20:
        raise ConfigError(f"kv_cache_gb={gib}; expected a number of GiB that a machine can have.")
    blocks = int(gib * _GIB / layout.block_bytes(info)) if gib > 0 else 0
    if blocks < 2:
        least = 2 * layout.block_bytes(info) / _GIB
        raise ConfigError(
            f"kv_cache_gb={gib} holds no conversation: a token takes {layout.bytes_per_token(info):,.0f} bytes in this "
            f"model's cache, and two blocks of {layout.block_size} tokens are the least. Give at least {least:.2g} GiB."
        )
    return blocks


def _fitted(window: int, blocks: int, layout: KVLayout, because: str) -> tuple[int, str]:
    """The window that fits these blocks, one of which is kept for the token that is being computed."""
    fits = (blocks - 1) * layout.block_size
    return (fits, because) if fits < window else (window, "")


def _in_memory(
    info: ModelInfo, layout: KVLayout, window: int, asked: bool, conversations: int, memory: machine.Memory | None
) -> KVPool:
    """A pool for whole conversations, or for what the memory holds; one of them can have all of it."""
    blocks = conversations * (-(-window // layout.block_size) + 1)
    size = layout.block_bytes(info)
    if memory is None:
        return KVPool(layout, blocks, window, scheduler=True)
    free = memory.available - int(_WEIGHTS * info.weight_bytes)
    if asked and blocks * size > free:
        fits = max(0, free // size // conversations - 1) * layout.block_size
        raise ConfigError(
            f"context_length={window} needs {blocks * size / _GIB:.1f} GiB of KV cache, and {max(0, free) / _GIB:.1f} "
            f"GiB are free beside the model. Ask for at most {fits} tokens, or for a smaller KV_CACHE_PRECISION."
        )
    if not asked and blocks * size > _SHARE * free:
        fewer = max(2, int(_SHARE * max(0, free)) // size)
        fits, because = _fitted(window, fewer, layout, " (what the memory that was free at loading holds)")
        doubt = (
            f"the context window is {fits} tokens instead of {window}: {window} would take {blocks * size / _GIB:.1f} "
            f"GiB of KV cache, and {max(0, free) / _GIB:.1f} GiB are free beside the model. Pass context_length= or "
            "kv_cache_gb= to choose it yourself."
        )
        return KVPool(layout, fewer, fits, True, because, (doubt,) if because else ())
    return KVPool(layout, blocks, window, scheduler=True)
