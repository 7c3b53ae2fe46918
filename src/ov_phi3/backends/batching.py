"""Several requests at once in one `openvino_genai.ContinuousBatchingPipeline`: each step computes a token for all.

No thread of its own runs the steps. A caller that waits for a token takes its turn in a queue; at its turn it reads the
tokens that have arrived, or runs a step, after which there are tokens for every caller. The queue is first in, first
out, so that no caller starves.

GenAI's `step` holds the interpreter's lock (2026.4.1), so other Python threads run between steps only. Its `generate`
releases the lock, but accepts no requests that arrive later.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import TYPE_CHECKING, Any

from ov_phi3.backends.protocol import Cancelled, Hypothesis
from ov_phi3.backends.request_queue import RequestQueue

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ov_phi3.backends.protocol import Request, TokenSink

__all__ = ["Batch"]


class Batch:
    """The requests that run in one pipeline.

    Args:
        pipeline: a `ContinuousBatchingPipeline`.
        genai: the `openvino_genai` module.
    """

    def __init__(self, pipeline: Any, genai: Any) -> None:
        self._pipeline = pipeline
        self._status = genai.GenerationStatus
        self._reason = genai.GenerationFinishReason
        self._queue = RequestQueue()
        self._numbers = itertools.count()

    def generate(self, request: Request, ids: Any, config: Any, sink: TokenSink) -> tuple[list[int], bool]:
        """Stream one reply; returns every generated id, and whether the reply ended at its length limit.

        Raises:
            Cancelled: `request.should_continue` returned False before the first token.
            RuntimeError: the pipeline failed, or its cache had no room.
        """
        generated: list[int] = []
        with self._running(ids, config) as handle:
            while self._has_more(handle):
                if not generated and request.should_continue is not None and not request.should_continue():
                    raise Cancelled
                for output in self._next(handle):
                    new = list(output.generated_ids)
                    generated += new
                    if new and not sink(new):
                        return generated, False
                    if output.finish_reason != self._reason.NONE:
                        return generated, output.finish_reason == self._reason.LENGTH
        raise RuntimeError("the KV cache had no room for this request.")

    def generate_n(self, request: Request, ids: Any, config: Any) -> list[Hypothesis]:
        """Several replies to one prompt, best first; as far as they have come if they are stopped.

        Raises:
            Cancelled: `request.should_continue` returned False before the first token.
            RuntimeError: see `generate`.
        """
        stopped = False
        with self._running(ids, config) as handle:
            while handle.get_status() == self._status.RUNNING and not stopped:
                stopped = request.should_continue is not None and not request.should_continue()
                if not stopped:
                    self._step(handle)
            if stopped:
                outputs = self._stop(handle)
            else:
                outputs = handle.read_all() if handle.get_status() == self._status.FINISHED else []
        if not outputs:
            if stopped:
                raise Cancelled
            raise RuntimeError("the KV cache had no room for this request.")
        outputs.sort(key=lambda output: output.score, reverse=True)
        count, limit = request.config.num_return_sequences or 1, self._reason.LENGTH
        return [Hypothesis(list(o.generated_ids), float(o.score), o.finish_reason == limit) for o in outputs[:count]]

    def _stop(self, handle: Any) -> list[Any]:
        """Stop a request; its outputs so far, which the pipeline returns after the next step."""
        with self._queue.turn():
            if handle.get_status() == self._status.RUNNING:
                handle.stop()
                self._pipeline.step()
        outputs: list[Any] = []
        while handle.can_read():
            outputs += handle.read().values()
        return outputs

    @contextlib.contextmanager
    def _running(self, ids: Any, config: Any) -> Iterator[Any]:
        with self._queue.turn():
            handle = self._pipeline.add_request(next(self._numbers), ids, config)
        try:
            yield handle
        finally:
            with self._queue.turn():
                if handle.get_status() == self._status.RUNNING:
                    handle.stop()
                    with contextlib.suppress(RuntimeError):
                        self._pipeline.step()  # frees its blocks

    def _has_more(self, handle: Any) -> bool:
        return bool(handle.can_read() or handle.get_status() == self._status.RUNNING)

    def _next(self, handle: Any) -> list[Any]:
        """The outputs since the last call; runs a step first if there are none yet."""
        self._step(handle)
        outputs = []
        while handle.can_read():
            outputs += handle.read().values()
        return outputs

    def _step(self, handle: Any) -> None:
        with self._queue.turn():
            if not handle.can_read() and handle.get_status() == self._status.RUNNING:
                self._pipeline.step()
