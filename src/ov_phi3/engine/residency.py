"""A backend that can leave memory between requests, and is opened again for the next one."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from ov_phi3.backends.request_queue import Ticket
from ov_phi3.engine.channel import Channel
from ov_phi3.engine.threads import new_worker_thread
from ov_phi3.system.core import give_memory_back

if TYPE_CHECKING:
    from ov_phi3.backends.protocol import Backend, BackendReport, Capabilities, Hypothesis, Request, TokenSink
    from ov_phi3.backends.request_queue import RequestQueue
    from ov_phi3.generation.config import GenerationConfig
    from ov_phi3.kv.entry import KVEntry
    from ov_phi3.kv.prefix_index import PrefixIndex

__all__ = ["IdleWatch", "ResidentBackend", "unload_in_turn"]

_log = logging.getLogger("ov_phi3")


class ResidentBackend:
    """A backend whose weights and KV cache can leave memory. Itself a backend.

    While it is unloaded, what needs no model still works: its capabilities, and the check of options. Its prefix cache
    is empty. KV entries that were imported, and that are still referenced elsewhere, are imported again.

    Args:
        backend: the open backend.
        reopen: opens it again.

    Attributes:
        loaded: whether weights and KV cache are in memory.
        warnings: those of the first opening.
        draft_ms: of the first opening.
    """

    def __init__(self, backend: Backend, reopen: Callable[[], Backend]) -> None:
        self._backend = backend
        self._reopen = reopen
        self._lock = threading.Lock()  # of `load`, for requests that start at the same time
        self._entries: weakref.WeakSet[KVEntry] = weakref.WeakSet()
        self._entries_lock = threading.Lock()  # a set must not change while it is iterated over
        self.loaded = True
        self.warnings = backend.warnings
        self.draft_ms = backend.draft_ms

    def load(self) -> float | None:
        """Open the backend if it is not open.

        Returns:
            The milliseconds that it took; None if it was open.

        Raises:
            ConfigError, DeviceError, ModelError: it does not load; the next request tries again.
        """
        if self.loaded:
            return None
        with self._lock:
            if self.loaded:
                return None
            began = time.perf_counter()
            self._backend = self._reopen()
            with self._entries_lock:
                entries = list(self._entries)
            for entry in entries:
                if entry.tensors.layout == self._backend.kv_layout:
                    self._backend.import_kv(entry)
            self.loaded = True
            took_ms = (time.perf_counter() - began) * 1000.0
        _log.info("loaded the model again in %.0f ms", took_ms)
        return took_ms

    def unload(self) -> None:
        """Free weights and KV cache. Nothing may be running."""
        with self._lock:
            if self.loaded:
                self.loaded = False
                self._backend.close()

    # -- the protocol of a backend -----------------------------------------------------------------------------------

    @property
    def capabilities(self) -> Capabilities:
        """What it can do."""
        return self._backend.capabilities

    @property
    def prefix_index(self) -> PrefixIndex | None:
        """Index of its prefix cache; None while there is no cache."""
        return self._backend.prefix_index if self.loaded else None

    @property
    def needs_whole_prompts(self) -> bool:
        """Whether every prompt must be prefilled in one pass."""
        return self._backend.needs_whole_prompts

    @property
    def kv_layout(self) -> str:
        """How the blocks of its cache lie in memory; "" if they cannot be read."""
        return self._backend.kv_layout

    def unsupported(self, config: GenerationConfig) -> str | None:
        """The first option that it does not support, as a sentence."""
        return self._backend.unsupported(config)

    def uses_prefix_cache(self, request: Request) -> bool:
        """Whether this request reads and fills the prefix cache."""
        return self._backend.uses_prefix_cache(request)

    def generate(self, request: Request, sink: TokenSink) -> BackendReport:
        """Stream one reply."""
        return self._backend.generate(request, sink)

    def generate_n(self, request: Request) -> list[Hypothesis]:
        """Several replies."""
        return self._backend.generate_n(request)

    def score(self, request: Request, start: int, on_progress: Callable[[int], bool], chunk: int) -> list[float]:
        """Log-probabilities of the request's ids from `start` on."""
        return self._backend.score(request, start, on_progress, chunk)

    def compute_kv(self, request: Request) -> KVEntry:
        """A copy of the keys and values of the request's ids."""
        return self._backend.compute_kv(request)

    def fits(self, entry: KVEntry) -> bool:
        """Whether an entry of the same `kv_layout` fits the blocks of this cache."""
        return self._backend.fits(entry)

    def import_kv(self, entry: KVEntry) -> None:
        """Let requests reuse an entry for as long as it is referenced elsewhere; at once, or after the next `load`."""
        with self._entries_lock:
            self._entries.add(entry)
        if self.loaded:
            self._backend.import_kv(entry)

    def close(self) -> None:
        """Free the model."""
        self.unload()


def _check_protocol(backend: ResidentBackend) -> Backend:
    return backend  # mypy holds the class against the protocol here


def unload_in_turn(
    backend: ResidentBackend,
    queue: RequestQueue,
    *,
    only_if_empty: bool = False,
    before: Callable[[], None] = lambda: None,
) -> None:
    """Unload a backend when no request runs: when all that came before have left the queue.

    Args:
        backend: the backend.
        queue: the queue of its engine.
        only_if_empty: do nothing if a request runs or waits.
        before: called in front of the unloading, if the model is in memory.

    Raises:
        StreamError: called from inside a callback of a running request.
    """
    ticket = Ticket(exclusive=True)
    try:
        if not only_if_empty:
            queue.join(ticket)
        elif not queue.join_if_empty(ticket):
            return
        queue.start(ticket)
        if backend.loaded:
            before()
        backend.unload()
        give_memory_back()
    finally:
        queue.leave(ticket)


class IdleWatch:
    """Calls `unload` once nothing has run for some time. Its thread sleeps until then, and ends with the unloading.

    Args:
        seconds: how long nothing must have run.
        unload: unloads if nothing runs at that moment. Held weakly, so that the watch keeps no engine alive.
    """

    def __init__(self, seconds: float, unload: weakref.WeakMethod[Callable[[], None]]) -> None:
        self._seconds = seconds
        self._unload = unload
        self._last = 0.0
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._cancelled = False
        self._gate = threading.Lock()  # not an Event: see `request_queue`
        self._gate.acquire()

    def touch(self) -> None:
        """Something ran until now."""
        with self._lock:
            self._last = time.monotonic()
            if self._thread is None and not self._cancelled:
                self._channel = Channel()  # is cancelled when the interpreter ends
                self._channel.on_cancel(self.cancel)
                self._thread = new_worker_thread(self._channel, self._watch, name="ov_phi3-idle")
                self._thread.start()

    def cancel(self) -> None:
        """End the watch; it never unloads after this."""
        self._cancelled = True
        with contextlib.suppress(RuntimeError):  # open already
            self._gate.release()

    def _watch(self) -> None:
        while True:
            last = self._last
            left = min(max(0.0, last + self._seconds - time.monotonic()), threading.TIMEOUT_MAX)
            if self._gate.acquire(timeout=left):
                return
            with self._lock:
                if self._last == last:
                    self._thread = None  # what runs from here on starts another one when it ends
                    break
        if (unload := self._unload()) is not None:
            unload()
