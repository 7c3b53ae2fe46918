"""A conversation that keeps the exact token ids of every turn.

A reply's ids are kept as they were generated and never made from text again: text decoded and encoded again can give
other ids, and then the engine's prefix cache no longer matches.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from ov_phi3.errors import StreamError
from ov_phi3.generation_config import GenerationConfig
from ov_phi3.results import GenerationResult

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ov_phi3.pipeline import Pipeline
    from ov_phi3.stream import Channel, TokenStream

__all__ = ["Chat"]


class Chat:
    """One conversation on a pipeline. Made by `Pipeline.chat`. Several can take turns on one pipeline.

    A turn that fails leaves the conversation as it was. A turn that is cancelled keeps the part of the reply that came.
    """

    def __init__(self, pipeline: Pipeline, *, system: str | None = None) -> None:
        self._pipeline = pipeline
        self._messages: list[dict[str, str]] = []
        self._ids: list[int] = []
        self._lock = threading.Lock()  # of what is below, for one moment
        self._turn = threading.Lock()  # of starting a turn
        self._running: Channel | None = None
        if system is not None:
            self._messages.append({"role": "system", "content": system})
            pipeline.tokenizer.template.segments(self._messages)  # a layout without a system turn says so now

    def __repr__(self) -> str:
        return f"<Chat of {len(self._messages)} messages, {len(self._ids)} tokens>"

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation so far, as a copy."""
        with self._lock:
            return [dict(m) for m in self._messages]

    @property
    def token_ids(self) -> NDArray[np.int64]:
        """Every id of the conversation so far, generated ones as they were generated; shape [tokens]."""
        with self._lock:
            return np.array(self._ids, dtype=np.int64)

    def send(self, text: str, config: GenerationConfig | None = None, **options: Any) -> GenerationResult:
        """One turn; returns the whole reply. Arguments and errors are those of `Pipeline.generate`."""
        return self.stream(text, config, **options).result

    def stream(self, text: str, config: GenerationConfig | None = None, **options: Any) -> TokenStream:
        """One turn, as it comes. The turn is part of the conversation once the stream has ended.

        Raises:
            StreamError: the stream of the turn before is still running.
        """
        if not isinstance(text, str):
            raise TypeError(f"a turn is a string, not {type(text).__name__}")
        message = {"role": "user", "content": text}
        with self._turn:
            self._await_turn_before()
            stream = self._pipeline._start(
                self._prompt(message), config, options, streams=True, on_end=lambda r: self._end(message, r)
            )
            # The channel and not the stream: a stream that its reader drops must still cancel itself.
            self._running = stream._channel
            return stream

    def _await_turn_before(self) -> None:
        """A reply that was cancelled ends within one token and is waited for; one that still comes is in the way."""
        before = self._running
        if before is None or before.ended:
            return
        if not before.cancelled:
            raise StreamError("the reply to the turn before is still coming; read it to its end or cancel it first.")
        before.wait_ended()

    def _prompt(self, message: dict[str, str]) -> NDArray[np.int64]:
        """The ids of the conversation with a new message: what was generated stays, only the new text is encoded."""
        tokenizer = self._pipeline.tokenizer
        with self._lock:
            history = list(self._ids)
        if not history:
            return tokenizer.encode_messages([*self._messages, message])
        new = tokenizer.encode_segments(tokenizer.template.continuation(message)).tolist()
        if history[-1] in self._pipeline.info.eos_token_ids:
            history.pop()  # the reply's own end token, which need not be the one that the layout writes after a reply
        return np.array(history + new, dtype=np.int64)

    def _end(self, message: dict[str, str], result: GenerationResult | None) -> None:
        """Take in a turn that ended with a result; one that failed, or was cancelled before its first token, never
        was.
        """
        with self._lock:
            if result is not None and result.token_ids:
                self._messages += [message, {"role": "assistant", "content": result.text}]
                self._ids = [*result.prompt_token_ids, *result.token_ids]
