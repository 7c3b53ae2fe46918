"""Keys and values of open chats on disk while the model is unloaded."""

from __future__ import annotations

import itertools
import logging
import mmap
import tempfile
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ov_phi3.backends.protocol import Request
from ov_phi3.generation.config import GenerationConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ov_phi3.engine.runner import Runner
    from ov_phi3.kv.entry import KVEntry

__all__ = ["Parking", "copy_to_disk"]

_log = logging.getLogger("ov_phi3")


class _Holder(Protocol):
    """A conversation that is continued later."""

    def ids_to_park(self) -> NDArray[np.int64] | None:
        """Its ids, int64, shape [tokens]; None if it needs no keys and values."""
        ...

    def hold(self, entry: KVEntry) -> None:
        """Keep an entry alive until the next turn has used it."""
        ...


class Parking:
    """The conversations whose keys and values outlive an unload.

    Args:
        directory: where they are written; None for nowhere.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._lock = threading.Lock()  # a set must not change while it is iterated over
        self._holders: weakref.WeakSet[_Holder] = weakref.WeakSet()

    def add(self, holder: _Holder) -> None:
        """Add a conversation, for as long as it is referenced elsewhere."""
        if self._directory is not None:
            with self._lock:
                self._holders.add(holder)

    def park(self, runner: Runner, wanted: Callable[[], bool] = lambda: True) -> None:
        """Write what the cache has of each conversation to disk. Nothing may be running.

        What cannot be written, since disk or memory are full or the backend failed, is logged, and computed again
        later.

        Args:
            runner: runs requests on the backend that is about to be unloaded.
            wanted: asked in front of every conversation; False ends it.
        """
        if self._directory is None:
            return
        with self._lock:
            holders = list(self._holders)
        for holder in holders:
            if not wanted():
                return
            try:
                if (entry := _cached_entry(holder, runner)) is not None:
                    entry = copy_to_disk(entry, self._directory)
                    runner.backend.import_kv(entry)
                    holder.hold(entry)
            except Exception as exc:  # noqa: BLE001 - the model must leave memory in any case
                _log.warning("keys and values of a chat could not be written to %s: %s", self._directory, exc)


def _cached_entry(holder: _Holder, runner: Runner) -> KVEntry | None:
    """A copy of what the cache has of a conversation; None if it has nothing that the next turn could use."""
    ids = holder.ids_to_park()
    cached = 0 if ids is None else runner.cached_tokens(ids)
    is_long = runner.long_rope.is_long
    if ids is None or not cached or is_long(cached) != is_long(len(ids) + 1):
        return None  # the keys of a shorter sequence have the other LongRoPE factors
    return runner.compute_kv(Request(ids[:cached], GenerationConfig.one_token(), ()), lambda *_: True)


def copy_to_disk(entry: KVEntry, directory: Path) -> KVEntry:
    """A copy of an entry whose blocks are pages of a file without a name (on Windows: one that is deleted with it).

    The file's space is free again when the copy is freed, or when the process ends in whatever way.

    Raises:
        OSError: the disk is full, or the directory cannot be written to.
    """
    arrays = entry.tensors.arrays
    with tempfile.TemporaryFile(dir=directory, prefix="ov_phi3-") as file:
        for array in arrays:
            file.write(np.ascontiguousarray(array).data)
        file.flush()
        pages = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    ends = itertools.accumulate(array.nbytes for array in arrays)
    copies = tuple(
        pages[end - array.nbytes : end].reshape(array.shape) for array, end in zip(arrays, ends, strict=True)
    )
    return replace(entry, tensors=replace(entry.tensors, arrays=copies))
