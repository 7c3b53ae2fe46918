"""The running model: a queue of requests in front of one backend.

`Pipeline`, `Chat`, `Prefix` and `measure` use the engine and never the backend. It deals in token ids only: prompts are
encoded before they reach it, and conversations are values outside of it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ov_phi3.backends.protocol import CallbackFailed, Cancelled, Capabilities, Request
from ov_phi3.backends.registry import backends_with
from ov_phi3.backends.request_queue import RequestQueue, Ticket
from ov_phi3.engine.channel import Channel
from ov_phi3.engine.limits import Limits
from ov_phi3.engine.parking import Parking
from ov_phi3.engine.residency import IdleWatch, unload_in_turn
from ov_phi3.engine.runner import Runner
from ov_phi3.engine.stream import TokenStream
from ov_phi3.engine.threads import new_worker_thread
from ov_phi3.engine.worker import OnPrefill, ReplyOptions, ReplyWorker
from ov_phi3.errors import ClosedError, ConfigError, Error, forked
from ov_phi3.generation.config import GenerationConfig
from ov_phi3.system.failures import to_generation_error

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ov_phi3.engine.residency import ResidentBackend
    from ov_phi3.kv.entry import KVEntry
    from ov_phi3.kv.sizing import KVCachePlan
    from ov_phi3.model.info import ModelInfo
    from ov_phi3.text.tokenizer import Tokenizer

__all__ = ["Engine", "Submission"]

_ONE_TOKEN = GenerationConfig.one_token()


@dataclass(frozen=True)
class Submission:
    """A request to the engine.

    Attributes:
        ids: the prompt, int64, shape [tokens].
        config: the options as the caller gave them.
        reply: how the reply is run and reported.
        streamed: the reply is read as a stream, which rules out beams and samples.
        continued: ids of the conversation that it continues; 0 outside of a chat, and in a first turn.
    """

    ids: NDArray[np.int64]
    config: GenerationConfig
    reply: ReplyOptions
    streamed: bool = True
    continued: int = 0


class Engine:
    """One loaded model, used by any number of threads.

    Args:
        info: the model.
        tokenizer: decodes replies.
        runner: runs requests on the backend.
        limits: what a request may ask for.
        kv: size of the KV cache.
        concurrency: requests that run at once.
        idle_unload: seconds without a request after which the model leaves memory; None for never.
        parking: the chats whose keys and values outlive an unload.

    Attributes:
        info: see above.
        concurrency: see above.
        parking: see above.
        used: whether it has had a request, so that the next one does not pay for the first inference.
    """

    def __init__(
        self,
        info: ModelInfo,
        tokenizer: Tokenizer,
        runner: Runner,
        limits: Limits,
        kv: KVCachePlan,
        *,
        concurrency: int = 1,
        idle_unload: float | None = None,
        parking: Parking | None = None,
    ) -> None:
        self.info, self.concurrency, self.used = info, concurrency, False
        self.parking = parking or Parking(None)
        self._runner, self._tokenizer, self._limits, self._kv = runner, tokenizer, limits, kv
        self._backend: ResidentBackend | None = runner.backend
        self._process = os.getpid()
        self._queue = RequestQueue(concurrency)
        self._state = threading.Lock()
        # The interpreter holds a thread for as long as it runs, so the threads in here have not ended yet.
        self._live: weakref.WeakKeyDictionary[threading.Thread, Channel] = weakref.WeakKeyDictionary()
        self._idle: IdleWatch | None = None
        if idle_unload is not None:
            self._idle = idle = IdleWatch(idle_unload, weakref.WeakMethod(self._unload_unused))
            backend = runner.backend
            self._queue.on_empty = lambda: idle.touch() if backend.loaded else None
            idle.touch()

    # -- what it is --------------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._backend is None

    @property
    def capabilities(self) -> Capabilities:
        """What the backend can do."""
        return self._runner.backend.capabilities

    @property
    def context_length(self) -> int:
        """Tokens that prompt and reply share."""
        return self._limits.context_length

    @property
    def defaults(self) -> GenerationConfig:
        """The model's own generation options."""
        return self._limits.defaults

    @property
    def kv_plan(self) -> KVCachePlan:
        """Size and layout of the KV cache."""
        return self._kv

    @property
    def prefill_chunk(self) -> int:
        """Prompt tokens per chunk of the prefill; 0 for whole prompts."""
        return self._runner.chunk

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory: neither unloaded nor closed."""
        return self._backend is not None and self._backend.loaded

    def check_open(self) -> ResidentBackend:
        """The backend.

        Raises:
            ClosedError: it was closed, or this process is a fork of the one that loaded it.
        """
        backend = self._backend
        if self._process != os.getpid():
            raise ClosedError(forked(f"the pipeline for {self.info.path}", self._process))
        if backend is None:
            raise ClosedError(f"the pipeline for {self.info.path} was closed; load the model again.")
        return backend

    def require(self, capability: str, what: str) -> ResidentBackend:
        """The backend, if it has a capability.

        Args:
            capability: a field of `Capabilities`.
            what: what needs it, for the message.

        Raises:
            ClosedError: it was closed.
            ConfigError: it does not have the capability; the message names the backends that do.
        """
        backend = self.check_open()
        if not getattr(self.capabilities, capability):
            names = " or ".join(f"backend={name!r}" for name in backends_with(capability))
            raise ConfigError(f"{what} needs a pipeline loaded with {names}.")
        return backend

    # -- limits and the cache ----------------------------------------------------------------------------------------

    def check_room(self, config: GenerationConfig, prompt_tokens: int) -> None:
        """Refuse a prompt, or a requested length, past the context window.

        Raises:
            ContextOverflowError: they do not fit.
        """
        self._limits.check_room(config, prompt_tokens)

    def overflow(self, problem: str, prompt_tokens: int, new: int | None, advice: str) -> Error:
        """The error for a request that does not fit the context window."""
        return self._limits.overflow(problem, prompt_tokens, new, advice)

    def cached_tokens(self, ids: NDArray[np.int64]) -> int:
        """How many of these tokens a prompt that continues them would find in the cache."""
        return self._runner.cached_tokens(ids)

    def kv_bytes(self, tokens: int) -> int:
        """Bytes that this many cached tokens take."""
        return round(tokens * self._kv.layout.bytes_per_token(self.info))

    # -- replies -----------------------------------------------------------------------------------------------------

    def submit(self, submission: Submission) -> TokenStream:
        """Queue a request; it runs in a thread of its own.

        Raises:
            ClosedError: the engine was closed.
            ConfigError: an option that contradicts another, or that the backend does not support.
            ContextOverflowError: prompt and reply do not fit the context window.
            StreamError: called from inside a callback of a running request.
        """
        backend = self.check_open()
        config = self._limits.resolve(submission.config, len(submission.ids), streamed=submission.streamed)
        control = self._tokenizer.control_ids(config.stop or ())  # special tokens give no text to search
        if control:
            config = config.replace(stop_token_ids=(*(config.stop_token_ids or ()), *control))
        if (problem := backend.unsupported(config)) is not None:
            tools = submission.reply.tools
            enforced = tools is not None and tools.schema is not None
            raise ConfigError(f"tool_choice is enforced by a JSON schema: {problem}" if enforced else problem)
        seeded, continued = submission.config.seed is not None, submission.continued
        request = Request(
            submission.ids,
            config,
            self.info.eos_token_ids,
            streamed=submission.streamed,
            isolated=seeded and not continued,
            most_reused=continued - 1 if seeded and continued else None,  # the last id was never fed back
        )
        channel = Channel()
        worker = ReplyWorker(request, self._runner, self._tokenizer, channel, submission.reply)
        self._start(worker, channel)
        return TokenStream(channel)

    def _start(self, worker: ReplyWorker, channel: Channel) -> None:
        """Queue a worker and start its thread."""
        queue, ticket = self._queue, Ticket()
        try:
            queue.join(ticket)  # here and not in the thread, so that the order of arrival is the callers'
            with self._state:
                self.check_open()
                thread = new_worker_thread(channel, lambda: worker.run(queue, ticket, self._load))
                self._live[thread] = channel
                self.used = True
                thread.start()
        except BaseException:
            # Closed meanwhile, no more threads, or Ctrl-C: no caller will ever hold the stream.
            channel.cancel()
            queue.withdraw(ticket)
            raise

    # -- keys and values ---------------------------------------------------------------------------------------------

    def prefill(self, ids: NDArray[np.int64], on_prefill: OnPrefill | None = None) -> KVEntry:
        """Compute the keys and values of these ids, those that are not cached yet, and return a copy.

        Raises:
            ConfigError: the backend cannot read its cache.
            ClosedError: the engine was closed.
            GenerationError: the backend failed.
        """
        self.require("saves_kv", "prefill")

        def on_progress(done: int, total: int) -> bool:
            if on_prefill is not None and done >= 0:
                try:
                    on_prefill(done, total)
                except BaseException as exc:
                    raise CallbackFailed from exc
            return not self.closed

        with self._turn():
            return self._runner.compute_kv(Request(ids, _ONE_TOKEN, ()), on_progress)

    def export_kv(self, ids: NDArray[np.int64]) -> KVEntry | None:
        """The keys and values of a conversation's ids; None if the backend cannot read its cache.

        Raises:
            ClosedError: the engine was closed.
            GenerationError: the backend failed.
        """
        self.check_open()
        return self.prefill(ids) if self.capabilities.saves_kv and len(ids) else None

    def fits(self, entry: KVEntry) -> bool:
        """Whether the backend can use an entry of its memory layout; True for one of another layout.

        Raises:
            ClosedError: the engine was closed.
        """
        backend = self.check_open()
        return not entry.tensors.arrays or entry.tensors.layout != backend.kv_layout or backend.fits(entry)

    def import_kv(self, entry: KVEntry) -> bool:
        """Let requests reuse an entry for as long as the caller holds it.

        Returns:
            False if the backend cannot write its cache, or its cache has another memory layout.

        Raises:
            ClosedError: the engine was closed.
        """
        backend = self.check_open()
        if not self.capabilities.saves_kv or entry.tensors.layout != backend.kv_layout:
            return False
        backend.import_kv(entry)
        return True

    def score(self, ids: NDArray[np.int64], start: int) -> list[float]:
        """Log-probabilities of these ids from `start` on, each given all ids before it.

        Raises:
            ConfigError: the backend returns no logits.
            ClosedError: the engine was closed.
            GenerationError: the backend failed.
        """
        self.require("scores", "score")
        with self._turn():
            return self._runner.score(Request(ids, _ONE_TOKEN, ()), start, lambda *_: not self.closed)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Run in this thread when it is its turn, with the backend's exceptions translated."""
        try:
            with self._queue.turn():
                self._load()
                self.used = True
                yield
        except Cancelled:
            self.check_open()  # it was closed meanwhile
            raise
        except CallbackFailed as exc:
            raise exc.__cause__ or exc from None
        except (Error, TypeError):
            raise
        except RuntimeError as exc:
            raise to_generation_error(exc) from exc

    # -- the end -----------------------------------------------------------------------------------------------------

    def _load(self) -> float | None:
        """Load the model again if it was unloaded; the milliseconds that this took, or None.

        Raises:
            ClosedError: the engine was closed.
            ConfigError, DeviceError, ModelError: it does not load.
        """
        return self.check_open().load()

    def unload(self) -> None:
        """Wait for all requests that were made before, and free weights and KV cache until the next request.

        Raises:
            ClosedError: the engine was closed.
            StreamError: called from inside a callback of a running request.
        """
        unload_in_turn(self.check_open(), self._queue, before=self._park)

    def _unload_unused(self) -> None:
        """Unload if nothing runs or waits; whatever does is followed by another look."""
        if (backend := self._backend) is not None:
            unload_in_turn(backend, self._queue, only_if_empty=True, before=self._park)

    def _park(self) -> None:
        self.parking.park(self._runner, lambda: not self.closed)

    def close(self) -> None:
        """Cancel the running requests, wait for them, and free the model. Can be called again.

        Ctrl-C while it waits does not keep the model: it is freed as soon as the last request has ended.

        Raises:
            StreamError: called from inside a callback of a running request.
        """
        if self._process != os.getpid():
            return  # a fork has nothing to free: see `system.core`
        self._queue.check_not_inside("close()")
        with self._state:
            backend, self._backend = self._backend, None
            live = list(self._live.items())
        if backend is None:
            return
        if self._idle is not None:
            self._idle.cancel()
        try:
            for _, channel in live:
                channel.cancel()
            for thread, _ in live:
                if thread.ident is not None:
                    thread.join()
            unload_in_turn(backend, self._queue)  # behind a prefill or score in another thread, which ends early
        except BaseException:
            # Interrupted: the wait goes on in the background.
            late = functools.partial(unload_in_turn, backend, self._queue)
            threading.Thread(target=late, name="ov_phi3-close", daemon=True).start()
            raise
