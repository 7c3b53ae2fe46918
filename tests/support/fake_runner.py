"""A stand-in for the compiled model, whose logits show whether the cache holds what it should.

The "keys and values" of a token are a checksum of those of all tokens before it, as they lie in the blocks of its
sequence, of its own id, and of its LongRoPE factors. A block that is lost, shared at the wrong time, or of another
sequence changes every later token.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ov_phi3.backends.protocol import Cancelled
from ov_phi3.kv.entry import KVTensors

BLOCK = 4
VOCABULARY = 61
_START = b"start"


def _value(before: bytes, token: int, long_rope: bool) -> int:
    return zlib.crc32(before + bytes([token % 251, long_rope]), zlib.crc32(_START))


def _logits(values: bytes) -> Any:
    draw = np.random.default_rng(zlib.crc32(values))
    return draw.normal(size=VOCABULARY).astype(np.float32)


def logits_after(ids: Sequence[int], boundary: int | None = None) -> Any:
    """Logits after a sequence, computed without a cache."""
    long_rope = boundary is not None and len(ids) > boundary
    values = b""
    for token in ids:
        values += np.uint32(_value(values, token, long_rope)).tobytes()
    return _logits(values)


def greedy(prompt: Sequence[int], count: int, boundary: int | None = None) -> list[int]:
    """A greedy reply of this length, computed without a cache."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits_after(ids, boundary).argmax()))
    return ids[len(prompt) :]


class _Pool:
    """Blocks of checksums."""

    def __init__(self, num_blocks: int) -> None:
        self.values = np.zeros((num_blocks, BLOCK), dtype=np.uint32)

    @property
    def num_blocks(self) -> int:
        return len(self.values)

    def copy(self, source: int, target: int) -> None:
        self.values[target] = self.values[source]

    def read(self, blocks: Sequence[int]) -> list[Any]:
        return [self.values[list(blocks)].view(np.uint8)]

    def write(self, blocks: Sequence[int], contents: Sequence[Any]) -> None:
        self.values[list(blocks)] = np.ascontiguousarray(contents[0]).view(np.uint32)


class FakeRunner:
    """What `PagedEngine` needs of a `ModelRunner`.

    Args:
        num_blocks: blocks that can be given out.
        before_pass: called at every pass with the step; an exception from it ends the pass half way.

    Attributes:
        passes: number of passes.
    """

    block_size = BLOCK

    def __init__(self, num_blocks: int, before_pass: Callable[[Sequence[Any]], object] | None = None) -> None:
        self.pool = _Pool(num_blocks + 1)
        self.before_pass = before_pass
        self.passes = 0
        self.closed = threading.Event()

    def grow(self, num_blocks: int) -> None:
        values = np.full((num_blocks, BLOCK), 0xDEAD, dtype=np.uint32)
        values[: self.pool.num_blocks] = self.pool.values
        self.pool.values = values

    def kv_tensors(self, blocks: Sequence[int], tokens: int) -> KVTensors:
        return KVTensors("fake", "u8", BLOCK, tuple(self.pool.read(blocks)))

    def close(self) -> None:
        self.closed.set()

    def run(
        self,
        step: Sequence[Any],
        should_continue: Callable[[], bool] | None = None,
        beside: Callable[[], None] | None = None,
    ) -> Any:
        self.passes += 1
        if beside is not None:
            beside()
        try:
            if self.before_pass is not None:
                self.before_pass(step)
            if should_continue is not None and sum(part.count for part in step) > 12 and not should_continue():
                raise Cancelled
        except BaseException:
            for part in step:  # the slots of its tokens hold anything now
                for position in range(part.sequence.num_cached, part.sequence.num_cached + part.count):
                    self.pool.values[part.sequence.blocks[position // BLOCK], position % BLOCK] = 0xBAD
            raise
        rows = [row for part in step for row in self._part(part)]
        return np.array(rows, dtype=np.float32).reshape(-1, VOCABULARY)

    def _part(self, part: Any) -> list[Any]:
        sequence, start = part.sequence, part.sequence.num_cached
        ids = [*sequence.ids[start : start + part.known], *part.drafts]
        used = sequence.blocks[: -(-(start + part.count) // BLOCK)]
        values = self.pool.values[used].reshape(-1)
        rows = []
        for index in range(part.count):
            position = start + index
            value = _value(values[:position].tobytes(), int(ids[index]), sequence.is_long)
            values[position] = value
            self.pool.values[used[position // BLOCK], position % BLOCK] = value
            if index in part.rows:
                rows.append(_logits(values[: position + 1].tobytes()))
        return rows
