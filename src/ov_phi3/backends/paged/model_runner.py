"""The compiled model and its cache: one step computes some tokens of some sequences."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ov_phi3.backends.paged.graph import LONG_ROPE, ROWS, read_paged_graph
from ov_phi3.backends.paged.kv_tensors import KVTensorPool, cache_ports
from ov_phi3.backends.protocol import Cancelled
from ov_phi3.kv.entry import KVTensors
from ov_phi3.system.core import import_openvino, keeping_signal_stack, shared_core

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ov_phi3.backends.paged.sequence import Sequence
    from ov_phi3.model.adapter import Adapter

__all__ = ["SCRATCH_BLOCKS", "ModelRunner", "ScheduledTokens"]

SCRATCH_BLOCKS = 1
"""Blocks at the start of the cache that belong to no sequence: a repairing pass writes there."""

_LONG_PASS = 16  # tokens from which a pass may take long enough to be cancelled
_TIMED_PAST = 160  # tokens in front of those of a pass that is timed
_POLL_MS = 50  # interval of the checks whether a pass is still wanted
_MOST_PADDING = 6  # rows in all, until a pass is prepared for fewer: that takes as long as about eight rows


@dataclass(frozen=True, slots=True)
class ScheduledTokens:
    """The part of a step that belongs to one sequence.

    Attributes:
        sequence: the sequence.
        count: number of tokens to compute, from its first uncached one.
        rows: of these, the tokens whose logits are wanted; () for none.
        drafts: guesses of the tokens behind the sequence's last one, the last ones of `count`.
    """

    sequence: Sequence
    count: int
    rows: tuple[int, ...]
    drafts: tuple[int, ...] = ()

    @property
    def known(self) -> int:
        """Of `count`, the tokens that the sequence has."""
        return self.count - len(self.drafts)


class ModelRunner:
    """One compiled model with a cache.

    Args:
        model_dir: an exported model.
        device: an OpenVINO device name.
        properties: for `Core.compile_model`.
        num_blocks: blocks of the cache, the scratch block included, from the tokens and the bytes of a block, which the
            compiled model determines.
        rope_boundary: see `ModelInfo.rope_boundary`; None if the boundary cannot be reached.
        adapters: LoRA adapters, each with its factor.

    Attributes:
        block_size: tokens per block.
        pool: the cache tensors.
    """

    def __init__(
        self,
        model_dir: Path,
        device: str,
        properties: Mapping[str, Any],
        *,
        num_blocks: Callable[[int, int], int],
        rope_boundary: int | None = None,
        adapters: Sequence_[tuple[Adapter, float]] = (),
    ) -> None:
        with keeping_signal_stack():
            graph = read_paged_graph(model_dir / "openvino_model.xml", rope_boundary, adapters)
            self._compiled: Any = shared_core().compile_model(graph.model, device, dict(properties))
        self.ports = cache_ports(self._compiled)
        self.block_size = self.ports[1].block_shape[1]  # values are [heads, tokens, ...] on every device
        block_bytes = sum(port.block_bytes for port in self.ports)
        self.pool = KVTensorPool(self.ports, device, num_blocks(self.block_size, block_bytes))
        self._request: Any = self._compiled.create_infer_request()
        self._inputs = _Inputs(self._request, has_long_rope=graph.has_long_rope)
        self._bind_cache()
        self._shapes = (1, 1, 1)
        self._decodes = 0  # of the last pass, if it computed one token of every sequence; padding included
        self._padded = 0  # rows of padding since the number of tokens changed
        self._on_cpu = device.startswith("CPU")

    def grow(self, num_blocks: int) -> None:
        """Enlarge the cache to this number of blocks, the scratch blocks included."""
        self.pool.grow(num_blocks)
        self._bind_cache()

    def _bind_cache(self) -> None:
        for name, tensor in self.pool.tensors.items():
            self._request.set_tensor(name, tensor)

    @property
    def kv_layout(self) -> str:
        """How the keys and values of a block lie in memory, as text; equal for caches whose bytes are compatible."""
        kinds = dict.fromkeys(map(str, self.ports))
        return f"{self.block_size} tokens a block, {' '.join(kinds)}"

    def kv_tensors(self, blocks: Sequence_[int], tokens: int) -> KVTensors:
        """A copy of the contents of blocks that hold this many tokens."""
        contents = tuple(self.pool.read(blocks))
        if tokens % self.block_size:
            self.pool.clear_unused(contents, tokens % self.block_size)
        return KVTensors(self.kv_layout, self.ports[0].type_name, self.block_size, contents)

    def get_property(self, key: str) -> Any:
        """A property of the compiled model, or None if the plugin does not know it."""
        try:
            return self._compiled.get_property(key)
        except RuntimeError:
            return None

    def node_times(self) -> dict[tuple[str, str, str], float]:
        """Mean seconds of each node over all passes so far, by its name, type and kernel; needs PERF_COUNT."""
        infos = self._request.profiling_info
        return {(info.node_name, info.node_type, info.exec_type): info.real_time.total_seconds() for info in infos}

    def run(
        self,
        step: Sequence_[ScheduledTokens],
        should_continue: Callable[[], bool] | None = None,
        beside: Callable[[], None] | None = None,
    ) -> NDArray[np.float32]:
        """Compute the tokens of a step and store their keys and values.

        Args:
            step: the sequences, whose tables have blocks for the new tokens.
            should_continue: called now and then during a long pass; False cancels it. Not called on a GPU, where a
                pass always runs to its end (openvino 2026.4.1).
            beside: called while the pass runs.

        Returns:
            Logits of the wanted rows in the order of the step, float32, shape [rows, vocabulary]; valid until the next
            step.

        Raises:
            Cancelled: `should_continue` returned False. The keys and values of the step's tokens are then unknown.
        """
        padding = self._padding(step)
        shapes = self._inputs.fill(step, self.block_size, padding)
        try:
            cancels = shapes[0] >= _LONG_PASS and self._on_cpu
            self._infer(should_continue if cancels else None, beside)
        except BaseException:
            self._repair(shapes)
            raise
        self._shapes = shapes
        logits = self._request.get_tensor("logits").data
        rows: NDArray[np.float32] = logits.reshape(-1, logits.shape[-1])[: shapes[2] - padding]
        return rows if rows.dtype == np.float32 else rows.astype(np.float32)

    def _padding(self, step: Sequence_[ScheduledTokens]) -> int:
        """Rows to add to a step of decodes, so that it has as many as the one before.

        When a reply ends, another often begins a moment later. A CPU prepares every node of the graph again for a pass
        with another number of tokens (openvino 2026.4.1; `benchmarks/overhead.py`), which takes longer than some rows.
        """
        decodes = len(step) if all(part.count == len(part.rows) == 1 for part in step) else 0
        missing = self._decodes - decodes
        if not decodes or missing < 0 or missing + self._padded > _MOST_PADDING or not self._on_cpu:
            self._decodes, self._padded = decodes, 0
            return 0
        self._padded += missing
        return missing

    def time_rows(self, rows: int) -> float:
        """Seconds of a pass of this many tokens of one sequence with the logits of all, in a scratch block.

        The tokens have some before them, as in a reply: without any the attention runs another kernel.
        """
        self._inputs.fill_scratch(rows, rows, _TIMED_PAST, self.block_size)
        began = time.perf_counter()
        self._request.infer()
        seconds = time.perf_counter() - began
        self._shapes = (rows, rows + _TIMED_PAST, rows)
        return seconds

    def _infer(self, should_continue: Callable[[], bool] | None, beside: Callable[[], None] | None) -> None:
        if should_continue is None and beside is None:
            self._request.infer()
            return
        self._request.start_async()
        if beside is not None:
            try:
                beside()
            except BaseException:
                self._request.wait()  # the inputs are in use until then
                raise
        if should_continue is None:
            self._request.wait()
            return
        while not self._request.wait_for(_POLL_MS):
            if not should_continue():
                self._request.cancel()
                with contextlib.suppress(RuntimeError):  # reports that it was cancelled
                    self._request.wait()
                raise Cancelled

    def _repair(self, broken: tuple[int, int, int]) -> None:
        """Repair the compiled model after a pass that did not end, with another pass in the scratch block.

        A node of the CPU plugin that the broken pass did not reach has outputs of that pass's shape and remembers the
        input shapes of the pass before. A later pass with those input shapes then skips the node's preparation: it
        fails, or kills the process (openvino 2026.4.1). Input shapes that differ from both make every node prepare
        again.
        """
        self._decodes = 0
        used = {*broken, *self._shapes}
        rows = next(count for count in range(1, 8) if count not in used)
        tokens = next(count for count in range(rows, 16) if count not in used)
        with contextlib.suppress(RuntimeError):  # a broken engine fails at the next pass
            self._inputs.fill_scratch(tokens, rows)
            self._request.infer()
            self._shapes = (tokens, tokens, rows)

    def close(self) -> None:
        """Free the model and the cache."""
        with keeping_signal_stack():
            del self._request, self._inputs, self._compiled, self.pool


class _Input:
    """One input: an array that is reused, and a tensor over the part of it that a step needs."""

    def __init__(self, request: Any, name: str, dtype: Any, shape: tuple[int, ...] = (-1,)) -> None:
        self._request = request
        self._name = name
        self._shape = shape
        self._tensor_type = import_openvino().Tensor
        self._array = np.zeros(64, dtype=dtype)
        self._view: NDArray[Any] = self._array[:0]

    def view(self, length: int) -> NDArray[Any]:
        """An array of this length whose contents are the input of the next pass."""
        if len(self._view) != length:
            if length > len(self._array):
                self._array = np.zeros(2 * length, dtype=self._array.dtype)
            self._view = self._array[:length]
            self._request.set_tensor(self._name, self._tensor_type(self._view.reshape(self._shape), shared_memory=True))
        return self._view


class _Inputs:
    """The inputs of a step. Tensors are bound again only if a length changes, not at every step of a reply."""

    def __init__(self, request: Any, *, has_long_rope: bool) -> None:
        self._ids = _Input(request, "input_ids", np.int64)
        self._positions = _Input(request, "position_ids", np.int64)
        self._past = _Input(request, "past_lens", np.int32)
        self._begins = _Input(request, "subsequence_begins", np.int32)
        self._blocks = _Input(request, "block_indices", np.int32)
        self._block_begins = _Input(request, "block_indices_begins", np.int32)
        self._longest = _Input(request, "max_context_len", np.int32, ())
        self._rows = _Input(request, ROWS, np.int64)
        self._long_rope = _Input(request, LONG_ROPE, np.bool_, (-1, 1)) if has_long_rope else None

    def fill(self, step: Sequence_[ScheduledTokens], block_size: int, padding: int) -> tuple[int, int, int]:
        """Set all inputs; returns the numbers of tokens, of tokens with their past, and of rows.

        Args:
            step: what is computed.
            block_size: tokens per block.
            padding: sequences of one token to add, in the scratch block; each has a row behind the wanted ones.
        """
        tokens = sum(part.count for part in step) + padding
        used = [-(-(part.sequence.num_cached + part.count) // block_size) for part in step] + [1] * padding
        num_rows = sum(len(part.rows) for part in step) + padding
        ids, positions = self._ids.view(tokens), self._positions.view(tokens)
        past, begins = self._past.view(len(used)), self._begins.view(len(used) + 1)
        blocks, block_begins = self._blocks.view(sum(used)), self._block_begins.view(len(used) + 1)
        rows = self._rows.view(max(1, num_rows))
        long_rope = None if self._long_rope is None else self._long_rope.view(tokens)
        begins[0] = block_begins[0] = 0
        at = block_at = row_at = longest = 0
        rows[0] = tokens - 1  # a step without wanted rows computes one all the same
        for index, part in enumerate(step):
            sequence, count, start = part.sequence, part.count, part.sequence.num_cached
            end = at + count
            ids[at : at + part.known] = sequence.ids[start : start + part.known]
            ids[at + part.known : end] = part.drafts
            positions[at:end] = np.arange(start, start + count)
            if long_rope is not None:
                long_rope[at:end] = sequence.is_long
            past[index] = start
            begins[index + 1] = end
            blocks[block_at : block_at + used[index]] = sequence.blocks[: used[index]]
            block_at += used[index]
            block_begins[index + 1] = block_at
            for row in part.rows:
                rows[row_at] = at + row
                row_at += 1
            longest = max(longest, start + count)
            at = end
        if padding:
            for array in (ids, positions, past, blocks):
                array[-padding:] = 0
            begins[-padding:] = np.arange(at + 1, tokens + 1)
            block_begins[-padding:] = np.arange(block_at + 1, block_at + padding + 1)
            rows[row_at:] = np.arange(at, tokens)
            if long_rope is not None:
                long_rope[-padding:] = False
        self._longest.view(1)[0] = longest
        return tokens, tokens + int(past.sum()), num_rows

    def fill_scratch(self, tokens: int, rows: int, past: int = 0, block_size: int = 16) -> None:
        """Set all inputs for a pass over the scratch block, which stands for all blocks of the past."""
        used = -(-(past + tokens) // block_size)
        self._ids.view(tokens)[:] = 0
        self._positions.view(tokens)[:] = np.arange(past, past + tokens)
        self._past.view(1)[:] = past
        self._begins.view(2)[:] = (0, tokens)
        self._blocks.view(used)[:] = 0
        self._block_begins.view(2)[:] = (0, used)
        self._longest.view(1)[:] = past + tokens
        self._rows.view(rows)[:] = np.arange(rows) % tokens
        if self._long_rope is not None:
            self._long_rope.view(tokens)[:] = False
