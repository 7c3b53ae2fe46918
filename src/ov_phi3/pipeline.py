"""A loaded model: prompts in, replies out, one at a time."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ov_phi3.backends.infer_request import InferRequestBackend
from ov_phi3.backends.protocol import Backend, Request
from ov_phi3.chat import Chat
from ov_phi3.engine.limits import Limits, seconds
from ov_phi3.engine.queue import Turn, Turns
from ov_phi3.engine.runner import Cancelled, Generator
from ov_phi3.engine.stream import Channel, TokenStream, new_worker, now
from ov_phi3.engine.worker import OnEnd, OnPrefill, Reply
from ov_phi3.errors import ClosedError, ConfigError, Error, PromptError, forked
from ov_phi3.generation.config import GenerationConfig
from ov_phi3.generation.results import GenerationResult, Score
from ov_phi3.kv.cache import KVLayout
from ov_phi3.kv.sizing import KVPool
from ov_phi3.kv.snapshot import identity_of
from ov_phi3.prefix import Prefix, as_messages, loaded_prefix, prefilled, prompt_ids, restored, score
from ov_phi3.system.failures import to_generation_error
from ov_phi3.text.template import Message, Raw
from ov_phi3.text.tokenizer import Tokenizer, as_ids

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ov_phi3.loading import LoadReport
    from ov_phi3.model.info import ModelInfo
    from ov_phi3.system.devices import DeviceInfo

    Prompt: TypeAlias = str | Raw | Sequence[Message] | Sequence[int] | NDArray[np.integer[Any]]

__all__ = ["Pipeline"]


class Pipeline:
    """A loaded model. Made by `load`; also a context manager. Any number of threads may use one.

    Requests are served in order of arrival, one at a time or `concurrency` at once.

    Attributes:
        info: the model directory's `ModelInfo`.
        tokenizer: its `Tokenizer`.
        device: the `DeviceInfo` it runs on, with its full name.
        context_length: tokens that prompt and reply share here.
        defaults: the model's own generation options.
        load_report: what loading took.
        concurrency: requests that run at once.
    """

    def __init__(
        self,
        *,
        info: ModelInfo,
        tokenizer: Tokenizer,
        device: DeviceInfo,
        backend: Backend,
        context_length: int,
        defaults: GenerationConfig,
        load_report: LoadReport,
        generator: Generator | None = None,
        pool: KVPool | None = None,
        concurrency: int = 1,
    ) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self.device = device
        self.context_length = context_length
        self.defaults = defaults
        self.load_report = load_report
        self.concurrency = concurrency
        self._generator = generator or Generator()
        self._pool = pool or KVPool(KVLayout(block_size=32), 0, context_length, scheduler=False)
        self._limits = Limits(info, defaults, context_length, self._generator, self._pool)
        self._backend: Backend | None = backend
        self._asked = False
        self._process = os.getpid()
        self._turns = Turns(concurrency)
        self._state = threading.Lock()
        # The interpreter holds a thread for as long as it runs, so what is in here has not ended yet.
        self._live: weakref.WeakKeyDictionary[threading.Thread, Channel] = weakref.WeakKeyDictionary()

    def __repr__(self) -> str:
        state = "closed" if self._backend is None else str(self.device)
        return f"<Pipeline {self.info.path.name!r} ({self.info.family}, {self.info.quantization}) on {state}>"

    # -- generating --------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        *,
        on_prefill: OnPrefill | None = None,
        prefix: Prefix | None = None,
        timeout: float | None = None,
        **options: Any,
    ) -> GenerationResult:
        """The whole reply to a prompt.

        Args:
            prompt: a string (one user message), a list of messages, `Raw` text, or token ids.
            config: how to generate; `options` are laid over it.
            on_prefill: called with the prompt tokens that are prefilled and their total: at the start (what the cache
                had), after every piece of a long prompt, and with the first token. It runs in the reply's own thread;
                what it raises ends the reply and is raised here.
            prefix: what the prompt follows, prefilled (`prefill`, `load_prefix`). A string is the user message that
                comes next. Messages, `Raw` text and ids come next too, unless they begin with all of the prefix's ids:
                then they are the whole prompt.
            timeout: seconds for the whole request, waiting for its turn included; then the reply ends with what came,
                and finish reason "timeout": within one token, or at the end of a piece of the prefill. Beam search and
                several sequences at once cannot be ended in the engine.
            **options: fields of `GenerationConfig`.

        Raises:
            ConfigError: an unknown option, one that contradicts another, or one that this backend does not have.
            ContextOverflowError: prompt and reply do not fit the context window.
            PromptError, TemplateError: a prompt that cannot become token ids.
            SnapshotError: a prefix of another model.
            GenerationError: the engine failed.
            ClosedError: the pipeline was closed.
        """
        return self._start(
            prompt, config, options, streams=False, on_prefill=on_prefill, prefix=prefix, timeout=timeout
        ).result

    def stream(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        *,
        on_prefill: OnPrefill | None = None,
        prefix: Prefix | None = None,
        timeout: float | None = None,
        **options: Any,
    ) -> TokenStream:
        """The reply as it comes; generation starts at once. Arguments and errors are those of `generate`."""
        return self._start(prompt, config, options, streams=True, on_prefill=on_prefill, prefix=prefix, timeout=timeout)

    def score(
        self,
        prompt: Prompt,
        continuation: str | Sequence[int] | NDArray[np.integer[Any]],
        *,
        prefix: Prefix | None = None,
    ) -> Score:
        """How likely the model finds a continuation of a prompt (`backend="infer_request"`).

        Args:
            prompt: as for `generate`.
            continuation: a text, encoded as it stands, or token ids. A reply is best given as its own `token_ids`.
            prefix: as for `generate`.

        Raises:
            ConfigError: another backend.
            Error: what `generate` raises.
        """
        return score(self, prompt, continuation, prefix)

    # -- prefixes and saved conversations ----------------------------------------------------------------------------

    def prefill(self, prompt: Prompt, *, on_prefill: OnPrefill | None = None) -> Prefix:
        """The keys and values of the beginning of prompts, computed now (`backend="infer_request"`).

        Args:
            prompt: messages, such as a system message, `Raw` text, or token ids; a string is one user message.
                Messages are laid out without a generation prompt, so that others can follow.
            on_prefill: told the progress, see `generate`; what it raises is raised here.

        Raises:
            ConfigError: another backend.
            Error: what `generate` raises.
        """
        return prefilled(self, prompt, on_prefill)

    def load_prefix(self, path: str | os.PathLike[str]) -> Prefix:
        """A prefix that `Prefix.save` wrote, by a pipeline with the same model (`backend="infer_request"`).

        Everything is checked before it is used. Its keys and values stay in the file until a request needs them.

        Raises:
            ConfigError: another backend.
            SnapshotError: no file, damaged, of a newer format, or of another model, tokenizer, layout or release.
        """
        return loaded_prefix(self, path)

    def load_chat(self, path: str | os.PathLike[str]) -> Chat:
        """A conversation that `Chat.save` wrote.

        With `backend="infer_request"` its keys and values come with it, if they are of this OpenVINO release. Otherwise
        they are computed by the first turn.

        Raises:
            SnapshotError: no file, damaged, of a newer format, or of another model, tokenizer or layout.
        """
        self._engine()
        return restored(self, path)

    def chat(self, *, system: str | None = None, overflow: str = "error", on_cancel: str = "keep") -> Chat:
        """A conversation that keeps the exact token ids of every turn, so that its KV cache is used again.

        Args:
            system: a system message.
            overflow: what to do with a turn that no longer fits the context window. "error" raises
                `ContextOverflowError` and leaves the conversation as it was. "drop_oldest" drops whole turns, oldest
                first, until half of the window is free; never the system message and never the new message.
            on_cancel: what becomes of a turn whose reply is cancelled: "keep" keeps the part that came, "drop" leaves
                the conversation as it was before the turn. Each turn can choose for itself.

        Raises:
            ConfigError: another `overflow` or `on_cancel`.
            TemplateError: a system message for a layout that has no system turn.
            ContextOverflowError: the system message alone fills the context window.
            ClosedError: the pipeline was closed.
        """
        self._engine()
        return Chat(self, system=system, overflow=overflow, on_cancel=on_cancel)

    def encode(self, prompt: Prompt) -> NDArray[np.int64]:
        """The prompt as it goes to the engine: token ids, int64, shape [tokens]; the template is applied exactly once.

        Raises:
            PromptError, TemplateError: a prompt that cannot become token ids.
            TypeError: none of the kinds of prompt.
        """
        if (messages := as_messages(prompt)) is not None:
            ids = self.tokenizer.encode_messages(messages)
        elif isinstance(prompt, Raw):
            ids = self.tokenizer.encode(prompt)
        elif isinstance(prompt, Mapping):
            raise TypeError("prompt is a dict; a conversation is a list of {'role', 'content'} dicts")
        elif isinstance(prompt, Sequence) or hasattr(prompt, "__array__"):
            ids = as_ids(prompt, self.info.vocab_size)
        else:
            raise TypeError(
                "a prompt is a string, a list of {'role', 'content'} dicts, Raw text, or token ids, "
                f"not {type(prompt).__name__}"
            )
        if not ids.size:
            raise PromptError("the prompt is empty; give a text, messages or token ids.")
        return ids

    @property
    def unused(self) -> bool:
        """Whether nothing was asked of it yet, so that the next request pays for the first inference."""
        return not self._asked

    def warmup(self) -> float:
        """Run one short inference now, so that the first request does not pay for it; returns its milliseconds."""
        begun = time.perf_counter()
        self.generate(self.encode("Hi"), max_new_tokens=2, ignore_eos=True, do_sample=False)
        return (time.perf_counter() - begun) * 1000.0

    # -- ending ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Cancel what runs, wait for it, and free the model. Can be called again.

        What runs ends within one token, or at the end of its prefill. Beam search and several sequences at once cannot
        be cancelled in the engine: they are waited for.
        """
        if self._process != os.getpid():
            return  # a fork has nothing to free: see `_core`
        with self._state:
            backend, self._backend = self._backend, None
            live = list(self._live.items())
        for _, channel in live:
            channel.cancel()
        for thread, _ in live:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join()
        if backend is not None:
            last = Turn(alone=True)
            try:
                self._turns.join(last)  # behind a prefill, a score or a save in another thread, which ends early
                self._turns.begin(last)
                backend.close()
            finally:
                self._turns.leave(last)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # -- inside ------------------------------------------------------------------------------------------------------

    def _engine(self) -> Backend:
        backend = self._backend
        if self._process != os.getpid():
            raise ClosedError(forked(f"the pipeline for {self.info.path}", self._process))
        if backend is None:
            raise ClosedError(f"the pipeline for {self.info.path} was closed; load the model again.")
        return backend

    def _start(
        self,
        prompt: Prompt,
        config: GenerationConfig | None,
        options: Mapping[str, Any],
        *,
        streams: bool,
        on_end: OnEnd | None = None,
        on_prefill: OnPrefill | None = None,
        prefix: Prefix | None = None,
        timeout: float | None = None,
        turns_before: int | None = None,
    ) -> TokenStream:
        """Begin a reply; `turns_before` is how many turns a chat has had, None for what is not one's."""
        requested = now()
        backend = self._engine()
        if on_prefill is not None and not callable(on_prefill):
            raise TypeError(f"on_prefill must be a function of two numbers, not {on_prefill!r}")
        deadline = None if timeout is None else requested + seconds("timeout", timeout)
        wanted = self._config(config, options)
        ids = prompt_ids(self, prompt, prefix)
        resolved = self._limits.resolve(wanted, len(ids), streams=streams)
        if (why := backend.lacks(resolved)) is not None:
            raise ConfigError(why)
        request = Request(
            ids,
            resolved,
            self.info.eos_token_ids,
            alone=wanted.seed is not None and not turns_before,
            keep=turns_before is not None,
        )
        channel = Channel()
        reply = Reply(request, self._generator, self.tokenizer, channel, requested, on_end, on_prefill, deadline)
        engine, turns = self._engine, self._turns
        turn = Turn(alone=wanted.seed is not None and bool(resolved.do_sample))  # random numbers are the engine's
        try:
            turns.join(turn)  # here and not in the thread, so that the order of arrival is the callers'
            with self._state:
                self._engine()
                thread = new_worker(channel, lambda: reply.run(engine, turns, turn))
                self._live[thread] = channel
                self._asked = True
                thread.start()
            return TokenStream(channel)
        except BaseException:
            # Closed meanwhile, no more threads, or Ctrl-C: nobody would ever hold the stream, or leave the line.
            channel.cancel()
            turns.abandon(turn)
            raise

    @staticmethod
    def _config(config: GenerationConfig | None, options: Mapping[str, Any]) -> GenerationConfig:
        if config is None:
            return GenerationConfig(**options)
        if not isinstance(config, GenerationConfig):
            raise TypeError(f"config must be a GenerationConfig, not {type(config).__name__}")
        return config.replace(**options) if options else config

    def _own_loop(self, what: str) -> InferRequestBackend:
        engine = self._engine()
        if not isinstance(engine, InferRequestBackend):
            raise ConfigError(f"{what} needs a pipeline loaded with backend='infer_request'.")
        return engine

    def _still_open(self, *_: int) -> bool:
        return self._backend is not None

    @contextlib.contextmanager
    def _turn(self) -> Iterator[InferRequestBackend]:
        """The engine, for this thread, when it is free; its failures in our words.

        Raises:
            ClosedError: the pipeline was closed meanwhile.
            GenerationError: the engine failed.
        """
        try:
            with self._turns.mine():
                self._asked = True
                yield self._own_loop("this")
        except Cancelled:
            self._engine()  # says that it was closed
            raise
        except (Error, TypeError):
            raise
        except RuntimeError as exc:
            raise to_generation_error(exc) from exc

    @functools.cached_property
    def _identity(self) -> dict[str, str]:
        return identity_of(self.info, self.tokenizer.template)
