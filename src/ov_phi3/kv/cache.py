"""Which token ids are in the engine's KV cache, and what they cost; keys and values as arrays, beside the engine.

The engine does not tell what it found in its prefix cache (openvino-genai 2026.4.1), so `BlockLedger` keeps the same
books as the engine does, by the engine's own rules. `benchmarks/prefix_cache.py` checks them against measured prefill
time.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ov_phi3.model.info import ModelInfo

__all__ = ["DTYPES", "BlockLedger", "Books", "KVLayout", "KVTensors", "KVUsage", "KVValue", "names"]

_GROWTH_TOKENS = 256
_BITS = {"f32": 32, "f16": 16, "bf16": 16, "u8": 8, "u4": 4}


@dataclass(frozen=True, slots=True)
class KVUsage:
    """What a conversation has in the KV cache.

    Attributes:
        cached_tokens: tokens of the conversation whose keys and values are in the cache now, so that the next turn need
            not compute them. Another conversation may push some out.
        reused_tokens: prompt tokens that the last turn took from the cache.
        free_tokens: tokens left in the context window, for the next message and its reply.
        context_length: the window, in tokens.
        bytes: memory that the cached tokens take, by the precision that the engine holds them in.
    """

    cached_tokens: int
    reused_tokens: int
    free_tokens: int
    context_length: int
    bytes: int

    def to_dict(self) -> dict[str, int]:
        """Everything as JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class KVLayout:
    """How an engine lays out its KV cache: in blocks, of one precision each for keys and values.

    Attributes:
        block_size: tokens per block.
        key: precision of the keys: "f32", "f16", "bf16", "u8" or "u4".
        value: precision of the values.
        value_group: values that share a scale; 0 is all of a head.
    """

    block_size: int
    key: str = "f16"
    value: str = "f16"
    value_group: int = 0

    @classmethod
    def of(cls, info: ModelInfo, kind: str, properties: Mapping[str, Any]) -> KVLayout:
        """The layout on a device of this kind ("CPU", "GPU", "NPU"), by OpenVINO's properties.

        A property given at load wins over the one that the export wrote into the model, and that over the device's
        default: 8 bits on the CPU, float16 on a GPU. A precision that is not known here counts as float16.
        """
        general = info.runtime_options.get("KV_CACHE_PRECISION", "u8" if kind == "CPU" else "f16")

        def precision(name: str) -> str:
            found = str(properties.get(name, properties.get("KV_CACHE_PRECISION", general))).lower()
            return found if found in _BITS else "f16"

        group = str(properties.get("VALUE_CACHE_GROUP_SIZE", "0"))
        return cls(
            block_size=16 if kind == "GPU" else 32,
            key=precision("KEY_CACHE_PRECISION"),
            value=precision("VALUE_CACHE_PRECISION"),
            value_group=int(group) if group.isdecimal() else 0,
        )

    def block_bytes(self, info: ModelInfo) -> int:
        """Bytes of one block, in all layers.

        Integers come with a scale and a zero point as float32: keys with one pair per channel and block, values with
        one pair per token and head, or per group. (OpenVINO's CPU plugin, 2026.4; the same numbers come from the memory
        that it asks for, see `tests/test_kv_cache.py`.)
        """
        head, block = info.head_dim, self.block_size
        keys = head * block * _BITS[self.key] // 8
        values = head * block * _BITS[self.value] // 8
        if self.key in ("u8", "u4"):
            keys += 8 * head
        if self.value in ("u8", "u4"):
            values += 8 * block * (head // self.value_group if self.value_group else 1)
        return info.num_layers * info.num_kv_heads * (keys + values)

    def bytes_per_token(self, info: ModelInfo) -> float:
        """Bytes of one token in all layers, its share of the scales included."""
        return self.block_bytes(info) / self.block_size


class Books(Protocol):
    """What is known of an engine's cache: `BlockLedger` reckons it, an engine of our own knows it.

    Attributes:
        block_size: tokens per block; prompts are computed in pieces of whole blocks.
        grows: whether there is no fixed number of places.
    """

    block_size: int
    grows: bool

    @property
    def capacity(self) -> int:
        """Tokens that there are places for."""
        ...

    def find(self, ids: NDArray[np.int64], salt: bytes = b"", *, alone: bool = False) -> int:
        """Tokens of a prompt that it would find in the cache; `alone`: see `Request`."""
        ...

    def record(
        self,
        ids: NDArray[np.int64],
        generated: Sequence[int],
        *,
        longest: int,
        exact: bool,
        salt: bytes = b"",
        others: int = 0,
    ) -> None:
        """Note a reply that has ended."""
        ...

    def forget(self) -> None:
        """Note that the engine has failed."""
        ...


class BlockLedger:
    """The books of a paged prefix cache, kept as the engine keeps its own.

    A sequence lies in blocks. A block is known by the ids in it and all ids before it, and stays in the cache when its
    sequence has ended, until its place is needed: free places go first, then the block that was used least recently. A
    prompt takes over every full block from its start that is still there, and then the shortest remainder of a block
    that a sequence once ended with. Its last token is always computed. (`openvino.genai`, `block_manager.hpp`.)

    Args:
        block_size: tokens per block.
        num_blocks: places in the cache; 0 for one that grows: to twice the prompt, and by 256 tokens when it is full.
    """

    def __init__(self, block_size: int, num_blocks: int = 0) -> None:
        self.block_size = block_size
        self.grows = num_blocks == 0
        self._lock = threading.Lock()
        self._stored: dict[bytes, int] = {}  # key of a block to when it was last used
        self._free: deque[int] = deque()  # places never used; the engine dates them by when they were made
        self._clock = 0
        self._places = 0
        self._unknown = 0
        self._enlarge(num_blocks)

    def find(self, ids: NDArray[np.int64], salt: bytes = b"", *, alone: bool = False) -> int:  # noqa: ARG002
        """Tokens of a prompt that it would find in the cache.

        Args:
            ids: the prompt, int64, shape [tokens].
            salt: tells apart sequences whose ids are equal and whose keys are not.
            alone: has no effect: the engine shares its blocks with every request.
        """
        with self._lock:
            keys, tokens = self._plan(ids, salt)
        return min(tokens, len(ids) - 1) if keys else 0

    def record(
        self,
        ids: NDArray[np.int64],
        generated: Sequence[int],
        *,
        longest: int,
        exact: bool,
        salt: bytes = b"",
        others: int = 0,
    ) -> None:
        """Note a reply that has ended.

        Args:
            ids: its prompt, int64, shape [tokens].
            generated: the ids that the engine computed keys for: of a reply, all but the last.
            longest: the reply's limit, in tokens; a cache that grows reckons with it.
            exact: whether the engine computed these ids and no more. Where it may be further, it is not known what its
                last block is known by.
            salt: as for `find`.
            others: blocks that the request may have filled with something else: other beams, other samples.
        """
        block = self.block_size
        content = np.concatenate([ids, np.array(generated, dtype=np.int64)])
        blocks = -(-len(content) // block)
        with self._lock:
            held, _ = self._plan(ids, salt)
            if self.grows:
                self._enlarge(-(-min(2 * len(ids), len(ids) + longest) // block))
            self._clock += 1
            for key in held:
                del self._stored[key]
            dates = [self._clock] * len(held)
            dates += [self._take() for _ in range(blocks - len(held))]
            key = salt
            for index, date in enumerate(dates):
                part = content[index * block : (index + 1) * block]
                key = _key(key, part)
                self._store(key if exact or len(part) == block else self._unknown_key(), date)
            for _ in range(min(others, self._places or others)):
                self._store(self._unknown_key(), self._take())

    def forget(self) -> None:
        """Note that nothing is known any more of what the blocks hold, as after a failure of the engine."""
        with self._lock:
            self._stored = {self._unknown_key(): date for date in self._stored.values()}

    @property
    def capacity(self) -> int:
        """Tokens that there are places for."""
        return self._places * self.block_size

    def _plan(self, ids: NDArray[np.int64], salt: bytes) -> tuple[list[bytes], int]:
        """The stored blocks that a prompt takes over, and the tokens in them."""
        held: list[bytes] = []
        done, key = 0, salt
        while done < len(ids):
            part = ids[done : done + self.block_size]
            whole = _key(key, part)
            if whole not in self._stored:
                for length in range(1, len(part)):
                    if (found := _key(key, part[:length])) in self._stored:
                        return [*held, found], done + length
                break
            held.append(whole)
            done, key = done + len(part), whole
        return held, done

    def _take(self) -> int:
        """A place for a new block; returns its date."""
        if not self._free and not self._stored and self.grows:
            self._enlarge(self._places + _GROWTH_TOKENS // self.block_size)
        if self._free:
            return self._free.popleft()
        if self._stored:
            del self._stored[min(self._stored, key=self._stored.__getitem__)]
        return self._clock

    def _store(self, key: bytes, date: int) -> None:
        if key in self._stored:  # the same content twice: the older place becomes free
            self._free.append(self._stored[key])
        self._stored[key] = date

    def _enlarge(self, places: int) -> None:
        while self._places < places:
            self._clock += 1
            self._places += 1
            self._free.append(self._clock)

    def _unknown_key(self) -> bytes:
        self._unknown += 1
        return b"?%d" % self._unknown


def _key(before: bytes, part: NDArray[np.int64]) -> bytes:
    return hashlib.blake2b(before + part.tobytes(), digest_size=16).digest()


DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
"""Names of safetensors -> what numpy holds them in; it has no bfloat16, so that is kept as its bits."""


def names(layers: int) -> list[str]:
    """What the tensors of a model are called, in the order in which they are kept."""
    return [f"past_key_values.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


@dataclass(frozen=True)
class KVTensors:
    """Keys and values of some tokens, in all layers.

    Attributes:
        dtype: a key of `DTYPES`.
        arrays: keys and values of the first layer, then of the second, and so on; each of shape
            [kv_heads, tokens, head_dim].
        exact: whether they are what the engine holds, bit for bit.
    """

    dtype: str
    arrays: tuple[NDArray[Any], ...]
    exact: bool = True

    @property
    def tokens(self) -> int:
        """Tokens that there are keys and values of."""
        return int(self.arrays[0].shape[1]) if self.arrays else 0

    @property
    def nbytes(self) -> int:
        """Their size."""
        return sum(array.nbytes for array in self.arrays)

    def first(self, tokens: int) -> KVTensors:
        """Those of the first tokens, as views."""
        return KVTensors(self.dtype, tuple(array[:, :tokens] for array in self.arrays), self.exact)


@dataclass(frozen=True, eq=False)
class KVValue:
    """Keys and values that belong to these token ids, in this order, from the first position on.

    Attributes:
        ids: int64, shape [tokens].
        tensors: as many tokens of them.
        past_boundary: whether the keys were rotated with the long factors of a LongRoPE model.
    """

    ids: NDArray[np.int64]
    tensors: KVTensors
    past_boundary: bool = False
