"""Sequences of our own decode loop: slots, each an infer request that holds the KV state of one sequence.

The contents of a slot are known id by id. A request continues in the slot whose whole sequence is its beginning;
nothing is copied then. Otherwise the common prefix is copied into another slot or, if the slot is not pinned, the slot
is cut in place. `KVEntry` objects, read from a file or from a slot, are a third source.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ov_phi3.backends.kv_state import read_state, write_state
from ov_phi3.kv.entry import KVEntry, KVTensors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ov_phi3.backends.protocol import Request

__all__ = ["KVSlots", "Slot"]

_MAX_SLOTS = 16
_MIN_COPIED = 16  # tokens: reading a state and writing it back takes about as long as computing this many tokens
_CHECK_EVERY = 64  # tokens of a reply between two checks of the slots' total length


class Slot:
    """One sequence.

    Attributes:
        request: the infer request that holds its state.
        long_rope: whether its keys were rotated with the long factors of LongRoPE.
        pinned: whether its conversation may continue, so that it is not cut for another sequence.
        used: clock value of the last use.
        stepping: whether the request's inputs are those of a step of one token.
        dirty: whether state and ids are being changed; stays set after a failure, when the state is unknown.
    """

    def __init__(self, request: Any) -> None:
        self.request = request
        self.long_rope = False
        self.pinned = False
        self.used = 0
        self.dirty = False
        self.stepping = False
        self._ids = np.empty(64, dtype=np.int64)
        self._length = 0

    @property
    def ids(self) -> NDArray[np.int64]:
        """Its token ids, as a view; int64, shape [tokens]."""
        return self._ids[: self._length]

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self._length

    @property
    def capacity(self) -> int:
        """Tokens it has room for: at least as many as it ever held."""
        return len(self._ids)

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """State and ids change in this block; an exception in it, also Ctrl-C, leaves the slot `dirty`."""
        self.dirty = True
        yield
        self.dirty = False

    def append(self, ids: NDArray[np.int64]) -> None:
        """Record that these ids have been computed."""
        needed = self._length + len(ids)
        if needed > len(self._ids):
            self._ids = np.concatenate([self.ids, np.empty(max(needed, 2 * self._length), dtype=np.int64)])
        self._ids[self._length : needed] = ids
        self._length = needed

    def hold(self, ids: NDArray[np.int64]) -> None:
        """Record that it now holds these ids and no others."""
        self._length = 0
        self.append(ids)


class KVSlots:
    """The slots of one model, which are also its prefix index, exact to the token (see `PrefixIndex`).

    Args:
        make: creates an infer request.
        capacity: tokens that all slots together may hold.
        candidates: types to try when a state is read, see `read_state`.
    """

    block_size = 1
    growable = True

    def __init__(self, make: Callable[[], Any], capacity: int, candidates: Sequence[str]) -> None:
        self._capacity = capacity
        self._make = make
        self._candidates = tuple(candidates)
        self._slots: list[Slot] = []
        self._entries: weakref.WeakSet[KVEntry] = weakref.WeakSet()
        self._clock = 0
        self._lock = threading.RLock()

    # -- the prefix index -------------------------------------------------------------------------------------------

    def match(self, ids: NDArray[np.int64], namespace: bytes = b"", *, isolated: bool = False) -> int:
        """Prompt tokens that are cached, without the last one; a `namespace` means past the LongRoPE boundary."""
        with self._lock:
            _, in_slot, _, in_entry = self._best(ids, bool(namespace), isolated=isolated)
        return max(in_slot, in_entry)

    @property
    def capacity(self) -> int:
        """Tokens that all slots together may hold."""
        return self._capacity

    def commit(self, *_: object, **__: object) -> None:
        """Nothing: the slots record their own contents."""

    def invalidate(self) -> None:
        """Drop the slots that were being changed when the engine failed."""
        with self._lock:
            self._slots = [slot for slot in self._slots if not slot.dirty]

    # -- sequences ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Free all slots."""
        with self._lock:
            self._slots.clear()

    def register(self, entry: KVEntry) -> None:
        """Let requests start from an entry for as long as it is referenced elsewhere."""
        with self._lock:
            self._entries.add(entry)

    def acquire(self, request: Request) -> Slot:
        """A slot that holds the longest cached beginning of a request's ids, but never all of them."""
        ids, long_rope = request.ids, request.long_rope
        with self._lock:
            slot, in_slot, entry, in_entry = self._best(ids, long_rope, isolated=request.isolated)
            self._clock += 1
            whole = slot is not None and in_slot == slot.length
            if entry is not None and (in_entry > in_slot or (in_entry == in_slot and not whole)):
                # Reuse the slot last started from this entry if it is not pinned: its buffers are allocated already.
                target = slot if slot is not None and in_slot == in_entry and not slot.pinned else None
                acquired = self._write(entry.tensors, ids[:in_entry], len(ids), target)
            elif slot is None:
                acquired = self._allocate(len(ids))
            elif whole:
                acquired = slot
            else:
                acquired = self._copy_prefix(slot, in_slot, len(ids))
            # The slot of a chat stays pinned when another request continues all of it.
            acquired.pinned = request.pinned or (acquired.pinned and acquired is slot and whole)
            acquired.long_rope, acquired.used = long_rope, self._clock
            return acquired

    def extend(self, slot: Slot, ids: NDArray[np.int64]) -> None:
        """Record that a slot's sequence has grown."""
        with self._lock:
            slot.append(ids)
            if len(ids) > 1 or slot.length % _CHECK_EVERY == 0:
                self._evict(0, slot)

    def export(self, ids: NDArray[np.int64], *, long_rope: bool) -> KVEntry:
        """A copy of the keys and values of the longest beginning of these ids in one slot or entry."""
        with self._lock:
            continued = np.append(ids, -1)
            slot, in_slot, entry, in_entry = self._best(continued, long_rope, least=1)
            if entry is not None and in_entry >= in_slot:
                return KVEntry(ids[:in_entry].copy(), entry.tensors.first(in_entry), long_rope)
            if slot is None:
                return KVEntry.empty()
            tensors = read_state(slot.request.query_state(), in_slot, self._candidates)
            return KVEntry(ids[:in_slot].copy(), tensors, long_rope)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _best(
        self, ids: NDArray[np.int64], long_rope: bool, *, isolated: bool = False, least: int = _MIN_COPIED
    ) -> tuple[Slot | None, int, KVEntry | None, int]:
        """The slot and the entry with the longest common prefix with a prompt, and its length in each.

        `isolated` excludes all slots, and entries that are not a prefix of the prompt as a whole.
        """
        limit = len(ids) - 1
        best, in_slot = None, 0
        for slot in () if isolated else self._slots:
            common = min(_common(slot.ids, ids), limit) if slot.long_rope == long_rope else 0
            # A slot that continues differently must be copied, which pays from `least` tokens on.
            whole = common == slot.length
            if common and (whole or common >= least) and (common > in_slot or (common == in_slot and whole)):
                best, in_slot = slot, common
        best_entry, in_entry = None, 0
        for entry in self._entries:
            common = min(_common(entry.ids, ids), limit) if entry.long_rope == long_rope else 0
            if common > in_entry and (common >= len(entry.ids) - 1 or (common >= least and not isolated)):
                best_entry, in_entry = entry, common
        return best, in_slot, best_entry, in_entry

    def _copy_prefix(self, slot: Slot, tokens: int, expected: int) -> Slot:
        """A slot with the first tokens of another one, or that one cut in place if it is not pinned."""
        tensors = read_state(slot.request.query_state(), tokens, self._candidates)
        return self._write(tensors, slot.ids[:tokens].copy(), expected, None if slot.pinned else slot)

    def _write(self, tensors: KVTensors, ids: NDArray[np.int64], expected: int, target: Slot | None = None) -> Slot:
        """A slot, `target` if given, with the tensors of these ids written into it."""
        slot = target or self._allocate(expected)
        with slot.changing():
            slot.hold(ids[:0])
            write_state(slot.request.query_state(), tensors, len(ids))
            slot.hold(ids)
        return slot

    def _allocate(self, expected: int) -> Slot:
        """An empty slot for a sequence of `expected` tokens."""
        evicted = self._evict(expected)
        if evicted is not None and evicted.capacity > 2 * expected + 64:
            self._slots.remove(evicted)  # a request keeps the memory of its longest sequence; a new one takes 0.3 ms
            evicted = None
        slot = evicted or Slot(self._make())
        slot.hold(np.empty(0, dtype=np.int64))
        slot.request.reset_state()
        if evicted is None:
            self._slots.append(slot)
        return slot

    def _evict(self, expected: int, running: Slot | None = None) -> Slot | None:
        """Evict the least recently used slots until there is room; returns one of them for reuse."""
        free: Slot | None = None
        while True:
            others = [slot for slot in self._slots if slot is not running and slot is not free]
            full = sum(slot.length for slot in self._slots if slot is not free) + expected > self._capacity
            many = expected and free is None and len(self._slots) >= _MAX_SLOTS
            if not others or not (full or many):
                return free
            oldest = min(others, key=lambda slot: slot.used)
            if free is None and expected:
                free = oldest
            else:
                self._slots.remove(oldest)


def _common(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """Length of the common prefix of two sequences."""
    length = min(len(one), len(other))
    different = one[:length] != other[:length]
    return int(different.argmax()) if different.any() else length
