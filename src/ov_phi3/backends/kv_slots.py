"""Where sequences live in an engine of our own: slots, each an infer request with the state of one sequence.

What is in a slot is known id by id. A request goes on in the slot that begins as it does, if the whole of that slot is
the beginning of the request: then nothing is copied. Otherwise the common part is copied to a slot of its own, or,
where nobody will want the rest, cut out in place. Values (`KVValue`), read from a file or out of a slot, are a third
place to begin from.

An engine hands out its state as float32 whatever it holds it in. What it holds is found again by looking: bfloat16 has
sixteen zero bits behind it, float16 survives the way there and back. So what is kept is bit for bit what the engine
had, at half the size, and a sequence that goes on from it goes on exactly. Only of an engine that quantises its cache
to integers can no exact copy be had in that size: its values are kept as float16, and quantised again when they go
back.
"""

from __future__ import annotations

import contextlib
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ov_phi3.kv.cache import DTYPES, KVTensors, KVValue

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ov_phi3.backends.protocol import Request

__all__ = ["KVSlots", "Slot"]

_MOST_SLOTS = 16
_WORTH_COPYING = 16  # tokens: reading a state and writing it back takes about as long as computing this many
_LOOK_EVERY = 64  # tokens of a reply between two looks at how full the slots are


class Slot:
    """One sequence in the engine.

    Attributes:
        request: the infer request that holds its state.
        past: whether its keys were rotated with the long factors of LongRoPE.
        keep: whether its conversation may go on, so that it is not cut for another.
        used: when it was last used.
        stepping: whether the request has the tensors of a step of one token.
        busy: whether its state and its ids are being changed; a failure meanwhile leaves it so, and its state unknown.
    """

    def __init__(self, request: Any) -> None:
        self.request = request
        self.past = False
        self.keep = False
        self.used = 0
        self.busy = False
        self.stepping = False
        self._ids = np.empty(64, dtype=np.int64)
        self._length = 0

    @property
    def ids(self) -> NDArray[np.int64]:
        """What it holds, as a view."""
        return self._ids[: self._length]

    @property
    def length(self) -> int:
        """Tokens that it holds."""
        return self._length

    @property
    def most(self) -> int:
        """Tokens that it has places for, so no fewer than it ever held."""
        return len(self._ids)

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """State and ids are changed in here; what is raised, Ctrl-C too, leaves the slot `busy`."""
        self.busy = True
        yield
        self.busy = False

    def append(self, ids: NDArray[np.int64]) -> None:
        """Note that the engine has computed these."""
        needed = self._length + len(ids)
        if needed > len(self._ids):
            self._ids = np.concatenate([self.ids, np.empty(max(needed, 2 * self._length), dtype=np.int64)])
        self._ids[self._length : needed] = ids
        self._length = needed

    def hold(self, ids: NDArray[np.int64]) -> None:
        """Note that it now holds these and no others."""
        self._length = 0
        self.append(ids)


class KVSlots:
    """The slots of one engine. Keeps books by the token, with the methods that `Generator` asks of a ledger.

    Args:
        make: makes an infer request.
        capacity: tokens that all slots together may hold.
        candidates: types to try when a state is read, see `read_state`.
    """

    block_size = 1
    grows = True

    def __init__(self, make: Callable[[], Any], capacity: int, candidates: Sequence[str]) -> None:
        self._capacity = capacity
        self._make = make
        self._candidates = tuple(candidates)
        self._slots: list[Slot] = []
        self._values: weakref.WeakSet[KVValue] = weakref.WeakSet()
        self._clock = 0
        self._lock = threading.RLock()

    # -- the ledger's part -------------------------------------------------------------------------------------------

    def find(self, ids: NDArray[np.int64], salt: bytes = b"", *, alone: bool = False) -> int:
        """Tokens of a prompt that it would find, its last one left out; `salt` means past the LongRoPE boundary."""
        with self._lock:
            _, in_slot, _, in_value = self._best(ids, bool(salt), alone=alone)
        return max(in_slot, in_value)

    @property
    def capacity(self) -> int:
        """Tokens that all slots together may hold."""
        return self._capacity

    def record(self, *_: object, **__: object) -> None:
        """Nothing: the slots keep their own books."""

    def forget(self) -> None:
        """Give up the slots that were being changed when the engine failed."""
        with self._lock:
            self._slots = [slot for slot in self._slots if not slot.busy]

    # -- sequences ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Free all of them."""
        with self._lock:
            self._slots.clear()

    def register(self, value: KVValue) -> None:
        """Let requests begin from a value for as long as somebody holds it."""
        with self._lock:
            self._values.add(value)

    def begin(self, request: Request) -> Slot:
        """A slot that holds the beginning of a request's ids, as much of it as there is, but never all."""
        ids, past = request.ids, request.past_boundary
        with self._lock:
            slot, in_slot, value, in_value = self._best(ids, past, alone=request.alone)
            self._clock += 1
            whole = slot is not None and in_slot == slot.length
            if value is not None and (in_value > in_slot or (in_value == in_slot and not whole)):
                # Over the last sequence that began from it, where nobody wants that: its memory is warm.
                place = slot if slot is not None and in_slot == in_value and not slot.keep else None
                found = self._written(value.tensors, ids[:in_value], len(ids), place)
            elif slot is None:
                found = self._vacant(len(ids))
            elif whole:
                found = slot
            else:
                found = self._cut(slot, in_slot, len(ids))
            # What a chat has in a slot stays worth keeping when another request goes on from all of it.
            found.keep = request.keep or (found.keep and found is slot and whole)
            found.past, found.used = past, self._clock
            return found

    def extend(self, slot: Slot, ids: NDArray[np.int64]) -> None:
        """Note that a slot's sequence has grown."""
        with self._lock:
            slot.append(ids)
            if len(ids) > 1 or slot.length % _LOOK_EVERY == 0:
                self._make_room(0, slot)

    def value(self, ids: NDArray[np.int64], past: bool) -> KVValue:
        """The keys and values of the first of these ids, as many as there are in one place."""
        with self._lock:
            following = np.append(ids, -1)
            slot, in_slot, value, in_value = self._best(following, past, least=1)
            if value is not None and in_value >= in_slot:
                return KVValue(ids[:in_value].copy(), value.tensors.first(in_value), past)
            if slot is None:
                return KVValue(ids[:0].copy(), KVTensors("F16", ()), past)
            tensors = read_state(slot.request.query_state(), in_slot, self._candidates)
            return KVValue(ids[:in_slot].copy(), tensors, past)

    # -- inside ------------------------------------------------------------------------------------------------------

    def _best(
        self, ids: NDArray[np.int64], past: bool, *, alone: bool = False, least: int = _WORTH_COPYING
    ) -> tuple[Slot | None, int, KVValue | None, int]:
        """The slot and the value that begin most like a prompt, and how many tokens long.

        With `alone` there are no slots, and only values that the prompt begins with as a whole, as those that somebody
        holds on purpose.
        """
        limit = len(ids) - 1
        best, in_slot = None, 0
        for slot in () if alone else self._slots:
            common = min(_common(slot.ids, ids), limit) if slot.past == past else 0
            # A slot that goes on in another way must be copied, which has to be worth it.
            whole = common == slot.length
            if common and (whole or common >= least) and (common > in_slot or (common == in_slot and whole)):
                best, in_slot = slot, common
        found, in_value = None, 0
        for value in self._values:
            common = min(_common(value.ids, ids), limit) if value.past_boundary == past else 0
            if common > in_value and (common >= len(value.ids) - 1 or (common >= least and not alone)):
                found, in_value = value, common
        return best, in_slot, found, in_value

    def _cut(self, slot: Slot, tokens: int, expected: int) -> Slot:
        """A slot with the first tokens of another one."""
        tensors = read_state(slot.request.query_state(), tokens, self._candidates)
        return self._written(tensors, slot.ids[:tokens].copy(), expected, None if slot.keep else slot)

    def _written(self, tensors: KVTensors, ids: NDArray[np.int64], expected: int, place: Slot | None = None) -> Slot:
        """A slot with the tensors of these ids in it."""
        slot = place or self._vacant(expected)
        with slot.changing():
            slot.hold(ids[:0])
            write_state(slot.request.query_state(), tensors, len(ids))
            slot.hold(ids)
        return slot

    def _vacant(self, expected: int) -> Slot:
        """An empty slot."""
        taken = self._make_room(expected)
        if taken is not None and taken.most > 2 * expected + 64:
            self._slots.remove(taken)  # a request keeps the memory of its longest sequence, and a new one takes 0.3 ms
            taken = None
        slot = taken or Slot(self._make())
        slot.hold(np.empty(0, dtype=np.int64))
        slot.request.reset_state()
        if taken is None:
            self._slots.append(slot)
        return slot

    def _make_room(self, expected: int, running: Slot | None = None) -> Slot | None:
        """Empty the slots that were used least recently until there is room; returns one of them to use again."""
        free: Slot | None = None
        while True:
            others = [slot for slot in self._slots if slot is not running and slot is not free]
            full = sum(slot.length for slot in self._slots if slot is not free) + expected > self._capacity
            many = expected and free is None and len(self._slots) >= _MOST_SLOTS
            if not others or not (full or many):
                return free
            oldest = min(others, key=lambda slot: slot.used)
            if free is None and expected:
                free = oldest
            else:
                self._slots.remove(oldest)


def _common(one: NDArray[np.int64], other: NDArray[np.int64]) -> int:
    """How many ids two sequences begin with in common."""
    length = min(len(one), len(other))
    different = one[:length] != other[:length]
    return int(different.argmax()) if different.any() else length


_STATE = re.compile(r"past_key_values\.(\d+)\.(key|value)")


def _ordered(states: Sequence[Any]) -> list[Any]:
    """The engine's states in the order of `names`."""

    def place(state: Any) -> tuple[int, str]:
        found = _STATE.match(state.name)
        if found is None:
            raise RuntimeError(f"the model has a state named {state.name!r}, which is not one of a key or a value")
        return int(found[1]), found[2]

    return sorted(states, key=place)


def read_state(states: Sequence[Any], tokens: int, candidates: Sequence[str]) -> KVTensors:
    """A copy of the first tokens of a state.

    Args:
        states: of an infer request, as `query_state()` gives them.
        tokens: how many.
        candidates: keys of `DTYPES` to try, in order. The first that holds the values exactly is taken, or the last.
            A device that gives its state out as float16 (a GPU) holds it so.
    """
    ordered = _ordered(states)
    if ordered and ordered[0].state.data.dtype == DTYPES["F16"]:
        candidates = ("F16",)
    for dtype in candidates:
        arrays = []
        exact = True
        for state in ordered:
            array, same = _converted(state.state.data[0, :, :tokens], dtype)
            exact = exact and same
            if not exact and dtype != candidates[-1]:
                break
            arrays.append(array)
        else:
            return KVTensors(dtype, tuple(arrays), exact)
    raise AssertionError("no candidates")


def _converted(values: NDArray[Any], dtype: str) -> tuple[NDArray[Any], bool]:
    """A copy of some values in another type, and whether nothing was lost."""
    if values.dtype == DTYPES[dtype]:
        return np.array(values), True
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        return (bits >> 16).astype(np.uint16), not np.bitwise_and(bits, 0xFFFF).any()
    with np.errstate(over="ignore"):
        converted = values.astype(DTYPES[dtype])
    return converted, bool((converted.astype(values.dtype) == values).all())


def write_state(states: Sequence[Any], tensors: KVTensors, tokens: int) -> None:
    """Give the first tokens of some tensors to a state, in place of what it held."""
    import openvino as ov

    kinds = {"F32": ov.Type.f32, "F16": ov.Type.f16, "BF16": ov.Type.bf16}
    for state, array in zip(_ordered(states), tensors.arrays, strict=True):
        heads, total, width = array.shape
        whole = np.ascontiguousarray(array)
        tensor = ov.Tensor(whole, ov.Shape([1, heads, total, width]), kinds[tensors.dtype])
        if tokens < total:  # a view of the first ones, not a copy
            tensor = ov.Tensor(tensor, ov.Coordinate([0, 0, 0, 0]), ov.Coordinate([1, heads, tokens, width]))
        state.state = tensor
