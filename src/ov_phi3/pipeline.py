"""A loaded model: prompts in, replies out, one at a time."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

from ov_phi3.backends import Backend, Request
from ov_phi3.chat import Chat
from ov_phi3.errors import ClosedError, ConfigError, ContextOverflowError, PromptError
from ov_phi3.generation_config import GenerationConfig
from ov_phi3.generator import Generator
from ov_phi3.kv_cache import KVLayout
from ov_phi3.kv_pool import KVPool
from ov_phi3.results import GenerationResult
from ov_phi3.stream import Channel, TokenStream, new_worker, now
from ov_phi3.template import Message, Raw
from ov_phi3.tokenizer import Tokenizer, as_ids
from ov_phi3.turns import Turn, Turns
from ov_phi3.worker import OnEnd, OnPrefill, Reply

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ov_phi3.device import DeviceInfo
    from ov_phi3.loading import LoadReport
    from ov_phi3.model_info import ModelInfo

    Prompt: TypeAlias = str | Raw | Sequence[Message] | Sequence[int] | NDArray[np.integer[Any]]

__all__ = ["Pipeline"]


class Pipeline:
    """A loaded model. Made by `load`; also a context manager. Any number of threads may use one.

    Requests are served one at a time, in order of arrival.

    Attributes:
        info: the model directory's `ModelInfo`.
        tokenizer: its `Tokenizer`.
        device: the `DeviceInfo` it runs on, with its full name.
        context_length: tokens that prompt and reply share here.
        defaults: the model's own generation options.
        load_report: what loading took.
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
    ) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self.device = device
        self.context_length = context_length
        self.defaults = defaults
        self.load_report = load_report
        self._generator = generator or Generator()
        self._pool = pool or KVPool(KVLayout(block_size=32), 0, context_length, scheduler=False)
        self._backend: Backend | None = backend
        self._asked = False
        self._turns = Turns()
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
        **options: Any,
    ) -> GenerationResult:
        """The whole reply to a prompt.

        Args:
            prompt: a string (one user message), a list of messages, `Raw` text, or token ids.
            config: how to generate; `options` are laid over it.
            on_prefill: called with the prompt tokens that are prefilled and their total: at the start (what the cache
                had), after every piece of a long prompt, and with the first token. It runs in the reply's own thread;
                what it raises ends the reply and is raised here.
            **options: fields of `GenerationConfig`.

        Raises:
            ConfigError: an unknown option or one that contradicts another.
            ContextOverflowError: prompt and reply do not fit the context window.
            PromptError, TemplateError: a prompt that cannot become token ids.
            GenerationError: the engine failed.
            ClosedError: the pipeline was closed.
        """
        return self._start(prompt, config, options, streams=False, on_prefill=on_prefill).result

    def stream(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        *,
        on_prefill: OnPrefill | None = None,
        **options: Any,
    ) -> TokenStream:
        """The reply as it comes; generation starts at once. Arguments and errors are those of `generate`."""
        return self._start(prompt, config, options, streams=True, on_prefill=on_prefill)

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
        if isinstance(prompt, Raw):
            ids = self.tokenizer.encode(prompt)
        elif isinstance(prompt, str):
            ids = self.tokenizer.encode_messages([{"role": "user", "content": prompt}])
        elif isinstance(prompt, Sequence) and len(prompt) and isinstance(prompt[0], Mapping):
            ids = self.tokenizer.encode_messages(prompt)  # type: ignore[arg-type]
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
        self.generate(self._probe_ids(), max_new_tokens=2, ignore_eos=True, do_sample=False)
        return (time.perf_counter() - begun) * 1000.0

    # -- ending ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Cancel what runs, wait for it, and free the model. Can be called again.

        What runs ends within one token, or at the end of its prefill. Beam search and several sequences at once cannot
        be cancelled in the engine: they are waited for.
        """
        with self._state:
            backend, self._backend = self._backend, None
            live = list(self._live.items())
        for _, channel in live:
            channel.cancel()
        for thread, _ in live:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join()
        if backend is not None:
            backend.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # -- inside ------------------------------------------------------------------------------------------------------

    def _engine(self) -> Backend:
        backend = self._backend
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
    ) -> TokenStream:
        requested = now()
        self._engine()
        if on_prefill is not None and not callable(on_prefill):
            raise TypeError(f"on_prefill must be a function of two numbers, not {on_prefill!r}")
        wanted = self._config(config, options)
        ids = self.encode(prompt)
        request = Request(ids, self._resolve(wanted, len(ids), streams=streams), self.info.eos_token_ids)
        channel = Channel()
        reply = Reply(request, self._generator, self.tokenizer, channel, requested, on_end, on_prefill)
        engine, turns = self._engine, self._turns
        turn = Turn()
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

    def _resolve(self, wanted: GenerationConfig, prompt_tokens: int, *, streams: bool) -> GenerationConfig:
        """Every option filled in and checked against the room that the prompt leaves."""
        room = self.context_length - prompt_tokens
        self._check_room(wanted, prompt_tokens, room)
        resolved = wanted.resolve(self.defaults, room=room, prompt_tokens=prompt_tokens)
        for name in ("num_beams", "num_return_sequences"):
            if streams and getattr(resolved, name) > 1:
                raise ConfigError(
                    f"{name}={getattr(resolved, name)} cannot be streamed: which reply wins is known at the end only. "
                    f"Use generate(), or {name}=1."
                )
        if resolved._is_search() and wanted.max_new_tokens is None and wanted.max_length is None:
            most = self._generator.search_room(prompt_tokens, resolved)
            if most is not None and most < (resolved.max_new_tokens or 0):
                least = min(resolved.min_new_tokens or 0, most)
                resolved = resolved.replace(max_new_tokens=most, min_new_tokens=least)
        wrong = [i for i in resolved.stop_token_ids or () if i >= self.info.vocab_size]
        if wrong:
            raise ConfigError(f"stop_token_ids holds {wrong[0]}; ids go from 0 to {self.info.vocab_size - 1}.")
        return self._before_boundary(wanted, resolved, prompt_tokens)

    def _before_boundary(
        self, wanted: GenerationConfig, resolved: GenerationConfig, prompt_tokens: int
    ) -> GenerationConfig:
        """End a reply at the LongRoPE boundary where an option of it could not be carried across."""
        room = self._generator.reply_room(prompt_tokens)
        limit = resolved.max_new_tokens or 0
        if room is None or limit <= room or (why := self._cannot_cross(resolved)) is None:
            return resolved
        if self._generator.assisted_tokens:  # candidates are computed together with the token before them
            room -= max(self._generator.assisted_tokens, resolved.num_assistant_tokens or 0)
        if room < 1 or wanted.max_new_tokens is not None or wanted.max_length is not None:
            raise ConfigError(
                f"{why} cannot be carried past {self.info.rope_boundary} tokens, where this LongRoPE model is computed "
                f"afresh: the prompt has {prompt_tokens} tokens and the reply may have {limit}. "
                + (f"Ask for at most {room} new tokens, or leave the option out." if room > 0 else "Leave it out.")
            )
        return resolved.replace(max_new_tokens=room, min_new_tokens=min(resolved.min_new_tokens or 0, room))

    def _cannot_cross(self, config: GenerationConfig) -> str | None:
        """The option whose state the engine keeps from the reply's first token on, if there is one."""
        if self._generator.assisted_tokens:
            return "speculative decoding"
        for name in ("json_schema", "regex", "grammar"):
            if getattr(config, name) is not None:
                return name
        for name, idle in (
            ("presence_penalty", 0.0),
            ("frequency_penalty", 0.0),
            ("num_beams", 1),
            ("num_return_sequences", 1),
        ):
            if getattr(config, name) != idle:
                return f"{name}={getattr(config, name)}"
        return None

    def _check_room(self, wanted: GenerationConfig, prompt_tokens: int, room: int) -> None:
        if room < 1:
            problem = f"the prompt has {prompt_tokens} tokens, which leaves no room for a reply"
        elif (wanted.max_new_tokens or 0) > room:
            problem = f"the prompt has {prompt_tokens} tokens and max_new_tokens is {wanted.max_new_tokens}"
        elif (wanted.min_new_tokens or 0) > room:
            problem = f"the prompt has {prompt_tokens} tokens and min_new_tokens is {wanted.min_new_tokens}"
        elif wanted.max_length is not None and not prompt_tokens < wanted.max_length <= self.context_length:
            problem = f"the prompt has {prompt_tokens} tokens and max_length is {wanted.max_length}"
        else:
            return
        advice = "Shorten the prompt" + (f", or ask for at most {room} new tokens." if room > 0 else ".")
        raise self._overflow(problem, prompt_tokens, wanted.max_new_tokens, advice)

    def _overflow(self, problem: str, prompt_tokens: int, new: int | None, advice: str) -> ContextOverflowError:
        return ContextOverflowError(
            f"{problem}; prompt and reply share a context window of {self.context_length} tokens"
            f"{self._pool.because}. {advice}",
            prompt_tokens=prompt_tokens,
            max_new_tokens=new,
            context_length=self.context_length,
        )

    def _probe_ids(self) -> NDArray[np.int64]:
        return self.encode("Hi")
