"""Several requests at once in one `openvino_genai.ContinuousBatchingPipeline`: each step computes a token for all.

There is no thread that steps. Whoever waits for a token takes a place in a line, and at its turn reads what there is,
or computes a step, after which there is something to read for everyone. The line is fair, so nobody falls behind.

GenAI's `step` keeps the interpreter's lock (2026.4.1), so other threads of the program run between steps only. Its
`generate`, which gives that lock back, takes no requests that come later.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import TYPE_CHECKING, Any

from ov_phi3.backends.protocol import Cancelled, Hypothesis
from ov_phi3.engine.queue import Turns

if TYPE_CHECKING:
    from ov_phi3.backends.protocol import Emit, Request

__all__ = ["Batch"]


class Batch:
    """The requests that run in one pipeline.

    Args:
        pipeline: a `ContinuousBatchingPipeline`.
        genai: the module.
    """

    def __init__(self, pipeline: Any, genai: Any) -> None:
        self._pipeline = pipeline
        self._status = genai.GenerationStatus
        self._reason = genai.GenerationFinishReason
        self._line = Turns()
        self._numbers = itertools.count()

    def generate(self, request: Request, ids: Any, config: Any, emit: Emit) -> tuple[list[int], bool]:
        """Stream one reply; gives every id that was generated, and whether the reply ended at its length limit.

        Raises:
            Cancelled: it is no longer wanted, before the first token.
            RuntimeError: the engine failed, or its cache had no room.
        """
        seen: list[int] = []
        with self._running(ids, config) as handle:
            while self._waits(handle):
                if not seen and request.wanted is not None and not request.wanted():
                    raise Cancelled
                for output in self._next(handle):
                    new = list(output.generated_ids)
                    seen += new
                    if new and not emit(new):
                        return seen, False
                    if output.finish_reason != self._reason.NONE:
                        return seen, output.finish_reason == self._reason.LENGTH
        raise RuntimeError("the KV cache had no room for this request.")

    def search(self, ids: Any, config: Any, count: int) -> list[Hypothesis]:
        """Several replies to one prompt, best first.

        Raises:
            RuntimeError: see `generate`.
        """
        with self._running(ids, config) as handle:
            while handle.get_status() == self._status.RUNNING:
                self._step(handle)
            found = handle.read_all() if handle.get_status() == self._status.FINISHED else []
        if not found:
            raise RuntimeError("the KV cache had no room for this request.")
        found.sort(key=lambda output: output.score, reverse=True)
        limit = self._reason.LENGTH
        return [Hypothesis(list(o.generated_ids), float(o.score), o.finish_reason == limit) for o in found[:count]]

    @contextlib.contextmanager
    def _running(self, ids: Any, config: Any) -> Any:
        with self._line.mine():
            handle = self._pipeline.add_request(next(self._numbers), ids, config)
        try:
            yield handle
        finally:
            with self._line.mine():
                if handle.get_status() == self._status.RUNNING:
                    handle.stop()
                    with contextlib.suppress(RuntimeError):
                        self._pipeline.step()  # gives its places in the cache back

    def _waits(self, handle: Any) -> bool:
        return bool(handle.can_read() or handle.get_status() == self._status.RUNNING)

    def _next(self, handle: Any) -> list[Any]:
        """What came since the last time; at a turn that finds nothing, a step, which may bring something."""
        self._step(handle)
        found = []
        while handle.can_read():
            found += handle.read().values()
        return found

    def _step(self, handle: Any) -> None:
        with self._line.mine():
            if not handle.can_read() and handle.get_status() == self._status.RUNNING:
                self._pipeline.step()
