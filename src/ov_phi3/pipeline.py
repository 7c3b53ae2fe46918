"""The facade: a loaded model that takes prompts and returns replies."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ov_phi3.chat import Chat
from ov_phi3.engine.engine import Engine, Submission
from ov_phi3.engine.limits import seconds
from ov_phi3.engine.worker import OnPrefill, ReplyOptions, now
from ov_phi3.errors import PromptError
from ov_phi3.generation.config import GenerationConfig
from ov_phi3.generation.options import GenerationOptions, OnCancel, Overflow, Speculation
from ov_phi3.generation.results import GenerationResult, Score
from ov_phi3.generation.tool_choice import constrained
from ov_phi3.loaded_model import LoadedModel
from ov_phi3.many import REQUEST_OPTIONS, OnProgress, ReplyBatch, RequestOptions, Row
from ov_phi3.prefix import Prefix, encode_after, load_prefix, prefill
from ov_phi3.saved import load_chat
from ov_phi3.signatures import naming_options
from ov_phi3.text.tokenizer import Tokenizer, as_ids
from ov_phi3.text.tools import Tools
from ov_phi3.warmup import warm_up

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Unpack

    from ov_phi3.engine.stream import TokenStream
    from ov_phi3.load_report import LoadReport
    from ov_phi3.model.info import ModelInfo
    from ov_phi3.system.devices import DeviceInfo
    from ov_phi3.text.messages import Message
    from ov_phi3.text.prompt import Prompt
    from ov_phi3.text.tools import ToolChoice

__all__ = ["Pipeline"]


class Pipeline:
    """A loaded model. Made by `load`; also a context manager. Any number of threads may use it.

    Requests run in order of arrival, one at a time or `concurrency` at once.

    Attributes:
        info: the model directory's `ModelInfo`.
        tokenizer: its `Tokenizer`.
        device: the `DeviceInfo` it runs on, with its full name.
        engine: the running model that the other methods use.
        context_length: tokens that prompt and reply share here.
        defaults: the model's own generation options.
        load_report: what loading took and found.
        concurrency: requests that run at once.
    """

    def __init__(self, *, engine: Engine, tokenizer: Tokenizer, device: DeviceInfo, load_report: LoadReport) -> None:
        self.engine = engine
        self.info: ModelInfo = engine.info
        self.tokenizer, self.device = tokenizer, device
        self.context_length = engine.context_length
        self.defaults = engine.defaults
        self.load_report = load_report
        self.concurrency = engine.concurrency
        self._model = LoadedModel(engine.info, tokenizer, engine, load_report.adapters)

    def __repr__(self) -> str:
        state = "closed" if self.engine.closed else f"{self.device}{'' if self.loaded else ', unloaded'}"
        return f"<Pipeline {self.info.path.name!r} ({self.info.family}, {self.info.quantization}) on {state}>"

    # -- generating --------------------------------------------------------------------------------------------------

    @naming_options(GenerationOptions)
    def generate(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        *,
        on_prefill: OnPrefill | None = None,
        prefix: Prefix | None = None,
        timeout: float | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: ToolChoice | None = None,
        **options: Unpack[GenerationOptions],
    ) -> GenerationResult:
        """Generate a whole reply to a prompt.

        Args:
            prompt: a string (one user message), a list of messages, `Raw` text, or token ids.
            config: how to generate; `options` override it.
            on_prefill: called with the number of prefilled prompt tokens and their total: at the start (those that are
                cached), after every chunk, and with the first token. An exception from it is raised here.
            prefix: what the prompt follows, prefilled (`prefill`, `load_prefix`). A string is the next user message;
                other prompts are appended, or are the whole prompt if they begin with all ids of the prefix.
            timeout: seconds for the whole request, waiting in the queue included. The reply then ends with the tokens
                that have come, and finish reason "timeout": within one token or one chunk of the prefill. Beam search
                on "llm_pipeline" cannot be interrupted.
            continue_final_message: the reply continues the assistant's message at the end, and holds new text only.
            tools: functions that the reply may call, in the form of OpenAI's API, or the inner dicts with `name`,
                `description` and `parameters` alone. The prompt, a string or messages, describes them.
            tool_choice: "auto" (default) leaves it to the model; "none" describes the tools and takes the reply as
                text; "required", or `{"type": "function", "function": {"name": ...}}`, enforces calls by a JSON schema.
            **options: fields of `GenerationConfig`.

        Raises:
            ConfigError: an unknown option, an option that contradicts another, one that this backend does not have, or
                `tools` or a `tool_choice` that are not as above.
            ContextOverflowError: prompt and reply do not fit the context window.
            PromptError, TemplateError: a prompt that cannot become token ids.
            SnapshotError: a prefix of another model.
            StreamError: called from inside a callback of a running request.
            GenerationError: the engine failed.
            ClosedError: the pipeline was closed.
        """
        how = (prefix, on_prefill, timeout, continue_final_message, Tools.of(tools, tool_choice))
        return self._submit(prompt, config, options, *how, streamed=False).result

    @naming_options(GenerationOptions)
    def stream(
        self,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        *,
        on_prefill: OnPrefill | None = None,
        prefix: Prefix | None = None,
        timeout: float | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: ToolChoice | None = None,
        **options: Unpack[GenerationOptions],
    ) -> TokenStream:
        """Stream a reply; generation starts at once. Arguments and errors are those of `generate`."""
        how = (prefix, on_prefill, timeout, continue_final_message, Tools.of(tools, tool_choice))
        return self._submit(prompt, config, options, *how, streamed=True)

    @naming_options(RequestOptions)
    def generate_many(
        self,
        prompts: Iterable[Row],
        config: GenerationConfig | None = None,
        *,
        on_progress: OnProgress | None = None,
        **options: Unpack[RequestOptions],
    ) -> ReplyBatch:
        """Generate the replies to many prompts, `concurrency` at once.

        Iterate over the batch for (index, outcome) pairs as they finish, or call its `results` for a list in order. An
        outcome is a `GenerationResult`, or the `Error` of that row: one row never ends the others.

        Prompts with a common beginning (256 characters, or 64 token ids) run one after another, and the first one's
        prefill ends before the others start, so that they find it in the prefix cache.

        Args:
            prompts: any iterable. A row is a prompt as for `generate`; a pair of a prompt and a dict of its options; or
                a dict with "prompt" or "messages", and options. A row's options override those of the call, and can
                also be `prefix`, `timeout` (counted from when the row joins the queue), `continue_final_message`,
                `tools` and `tool_choice`.
            config: how to generate; `options` override it.
            on_progress: called with the number of finished rows and the number of all rows (None for an iterable
                without a length), in the thread that iterates. An exception from it cancels the rest and is raised.
            **options: as for a row. With `seed`, each row has the seed that `row_seed` makes of it and the row's index,
                so that neither the order nor `concurrency` matters; a row's own seed is used as it is. As for
                `generate`, a request with a seed takes nothing from the prefix cache.

        Raises:
            ConfigError: an option of the call is unknown, or contradicts another.
            TypeError: `prompts` is one text, or one conversation.
            ClosedError: the pipeline was closed.
        """
        self.engine.check_open()
        if isinstance(prompts, (str, bytes, Mapping)):
            raise TypeError(f"prompts must be a list of prompts, not one {type(prompts).__name__}: [prompt]")
        if on_progress is not None and not callable(on_progress):
            raise TypeError(f"on_progress must be a function of two numbers, not {on_progress!r}")
        given: dict[str, Any] = dict(options)
        request = {name: given.pop(name) for name in REQUEST_OPTIONS if name in given}

        def start(
            prompt: Prompt, config: GenerationConfig, on_prefill: OnPrefill | None, request: Mapping[str, Any]
        ) -> TokenStream:
            how = (request.get("prefix"), on_prefill, request.get("timeout"))
            continues = request.get("continue_final_message", False)
            tools = Tools.of(request.get("tools"), request.get("tool_choice"))
            return self._submit(prompt, config, {}, *how, continues, tools, streamed=False)

        config = GenerationConfig.of(config, given)
        width = 2 * self.concurrency  # the next rows are encoded and queued while these run
        return ReplyBatch(prompts, config, request, start=start, width=width, on_progress=on_progress)

    def _submit(
        self,
        prompt: Prompt,
        config: GenerationConfig | None,
        options: Mapping[str, Any],
        prefix: Prefix | None,
        on_prefill: OnPrefill | None,
        timeout: float | None,
        continue_final_message: bool,
        tools: Tools | None,
        *,
        streamed: bool,
    ) -> TokenStream:
        requested = now()
        self.engine.check_open()
        if on_prefill is not None and not callable(on_prefill):
            raise TypeError(f"on_prefill must be a function of two numbers, not {on_prefill!r}")
        deadline = None if timeout is None else requested + seconds("timeout", timeout)
        config = constrained(GenerationConfig.of(config, options), tools)
        ids = encode_after(self._model, prompt, prefix, continue_final_message=continue_final_message, tools=tools)
        reply = ReplyOptions(requested, deadline, on_prefill, tools=tools)
        return self.engine.submit(Submission(ids, config, reply, streamed))

    def score(
        self,
        prompt: Prompt,
        continuation: str | Sequence[int] | NDArray[np.integer[Any]],
        *,
        prefix: Prefix | None = None,
    ) -> Score:
        """Compute how likely the model finds a continuation of a prompt (`backend="infer_request"`).

        Args:
            prompt: as for `generate`.
            continuation: a text, encoded without a chat template, or token ids. Pass a reply as its own `token_ids`.
            prefix: as for `generate`.

        Raises:
            Error: what `generate` raises; a ConfigError with another backend.
        """
        self.engine.require("scores", "score")
        ids = encode_after(self._model, prompt, prefix)
        if isinstance(continuation, str):
            new = self.tokenizer.encode(continuation)
        else:
            new = as_ids(continuation, self.info.vocab_size)
        if not len(new):
            raise PromptError("the continuation is empty; give a text or token ids.")
        self.engine.check_room(GenerationConfig(max_new_tokens=len(new)), len(ids))
        return Score(new.tolist(), self.engine.score(np.concatenate([ids, new]), len(ids)))

    # -- prefixes and chats ------------------------------------------------------------------------------------------

    def prefill(self, prompt: Prompt, *, on_prefill: OnPrefill | None = None) -> Prefix:
        """Compute the keys and values of the beginning of prompts now (`backend="infer_request"`).

        Args:
            prompt: messages, such as a system message, `Raw` text, or token ids; a string is one user message.
                Messages get no generation prompt, so that others can follow.
            on_prefill: receives the progress, see `generate`; an exception from it is raised here.

        Raises:
            ConfigError: another backend.
            Error: what `generate` raises.
        """
        return prefill(self._model, prompt, on_prefill)

    def load_prefix(self, path: str | os.PathLike[str]) -> Prefix:
        """Load a prefix that `Prefix.save` wrote, with the same model (`backend="infer_request"`).

        The whole file is checked first. Its keys and values stay in the file until a request needs them.

        Raises:
            ConfigError: another backend. SnapshotError: no file, damaged, of a newer format, or of another model,
            tokenizer, chat template or release, or of other adapters.
        """
        return load_prefix(self._model, path)

    def load_chat(self, path: str | os.PathLike[str]) -> Chat:
        """Load a chat that `Chat.save` wrote.

        With `backend="infer_request"` its keys and values are loaded too, if they are of this OpenVINO release and the
        same adapters. Otherwise the first turn computes them.

        Raises:
            SnapshotError: no file, damaged, of a newer format, or of another model, tokenizer or chat template.
        """
        self.engine.check_open()
        return load_chat(self._model, path)

    def chat(
        self,
        *,
        system: str | None = None,
        messages: Sequence[Message] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        overflow: Overflow = "error",
        on_cancel: OnCancel = "keep",
    ) -> Chat:
        """Start a conversation that keeps the exact token ids of every turn, so that its KV cache is reused.

        Args:
            system: a system message.
            messages: a conversation that began elsewhere, instead of `system`. Messages behind the assistant's last one
                have no reply yet: the first turn begins with them.
            tools: functions that replies may call, see `generate`; each turn can give its own `tool_choice`.
            overflow: what to do with a turn that no longer fits the context window. "error" raises
                `ContextOverflowError` and leaves the conversation as it was. "drop_oldest" drops whole turns, oldest
                first, until half of the window is free; never the system message and never the new message.
            on_cancel: what happens to a turn whose reply is cancelled: "keep" keeps the part that has come, "drop"
                leaves the conversation as it was before the turn. Each turn can choose for itself.

        Raises:
            ConfigError: another `overflow` or `on_cancel`, both `system` and `messages`, or `tools` as for `generate`.
            TemplateError: messages that the chat template has no form for.
            ContextOverflowError: the system message alone, or the conversation, fills the context window.
            ClosedError: the pipeline was closed.
        """
        self.engine.check_open()
        return Chat(
            self._model,
            system=system,
            messages=messages,
            tools=Tools.of(tools),
            overflow=overflow,
            on_cancel=on_cancel,
        )

    def encode(
        self,
        prompt: Prompt,
        *,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> NDArray[np.int64]:
        """Encode a prompt as the engine receives it: token ids, int64, shape [tokens]; templated exactly once.

        Args:
            prompt: as for `generate`.
            continue_final_message: as for `generate`.
            tools: as for `generate`.

        Raises:
            ConfigError: `continue_final_message` or `tools` with a prompt that is not messages, or wrong `tools`.
            PromptError, TemplateError: a prompt that cannot become token ids.
            TypeError: none of the kinds of prompt.
        """
        return self._model.encode(prompt, continue_final_message=continue_final_message, tools=Tools.of(tools))

    def count_tokens(
        self,
        prompt: Prompt,
        *,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> int:
        """Number of tokens that a prompt has for the engine, chat template included. Arguments and errors: `encode`."""
        return len(self.encode(prompt, continue_final_message=continue_final_message, tools=tools))

    # -- life --------------------------------------------------------------------------------------------------------

    @property
    def unused(self) -> bool:
        """Whether it has had no request yet, so that the next one pays for the first inference."""
        return not self.engine.used

    def warmup(self, *, speculation: Speculation | None = None) -> float:
        """Run one short inference now, so that the first request does not pay for it; returns its milliseconds.

        Args:
            speculation: "auto", the default with a draft model, also generates a reply that repeats its prompt, so that
                no later one has to measure what steps with drafts cost.
        """
        return warm_up(self.generate, self.encode("Hi"), self.info.vocab_size, speculation)

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory: neither unloaded nor closed."""
        return self.engine.loaded

    def unload(self) -> None:
        """Wait for what runs; free weights and KV cache until the next request, which loads them: `metrics.load_ms`.

        Chats keep their ids, and their keys and values with `load(unload_dir=)`; prefixes that are held keep theirs.

        Raises:
            ClosedError: the pipeline was closed.
            StreamError: called from inside a callback of a running request.
        """
        self.engine.unload()

    def close(self) -> None:
        """Cancel the running requests, wait for them, and free the model. Can be called again.

        A running reply ends within one token or one chunk of its prefill; beam search on "llm_pipeline" by itself.

        Raises:
            StreamError: called from inside a callback of a running request.
        """
        self.engine.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
