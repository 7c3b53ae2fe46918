"""From the ids of a prompt to the ids of a reply: prefix match, prefill in chunks, and the LongRoPE crossing.

The runner does for every backend what the backend does not do itself:

- *Chunks.* A long prompt is prefilled in chunks. Each chunk is a request of its own, which the next one finds in the
  prefix cache. Between two chunks the reply can be cancelled and progress is reported.
- *LongRoPE.* A reply that crosses the boundary (`engine/longrope.py`) stops there and continues after a second prefill.
- *Prefix index.* The contents of the prefix cache are recorded, so that a prompt's prefix match is known.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from ov_phi3.backends.protocol import BackendReport, Cancelled, Hypothesis, Request, TokenSink
from ov_phi3.engine.longrope import LongRope
from ov_phi3.errors import ContextOverflowError
from ov_phi3.generation.config import GenerationConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ov_phi3.engine.residency import ResidentBackend
    from ov_phi3.generation.results import TokenLogprob
    from ov_phi3.kv.entry import KVEntry
    from ov_phi3.kv.prefix_index import PrefixIndex

__all__ = ["LARGE_MODEL_CHUNK", "PREFILL_CHUNK", "ProgressCallback", "Runner"]

PREFILL_CHUNK = 2048
"""Prompt tokens per chunk. `benchmarks/prefix_cache.py` measures what a chunk costs."""

LARGE_MODEL_CHUNK = 256
"""The same on a CPU for a model of over a gigabyte, which needs seconds for this many tokens; one more pass over its
weights is a small addition."""

ProgressCallback = Callable[[int, int], bool]
"""Receives the number of prefilled prompt tokens and their total, or -1 for a mere check; returns False to stop."""

_ONE_TOKEN = GenerationConfig.one_token()


@dataclass(frozen=True)
class Runner:
    """Runs requests on a backend. Used by one thread at a time, unless the backend schedules.

    Attributes:
        backend: what runs the model.
        long_rope: the LongRoPE policy.
        chunk: prompt tokens per chunk; 0 for whole prompts. Needs a prefix index.
    """

    backend: ResidentBackend
    long_rope: LongRope = field(default_factory=LongRope)
    chunk: int = PREFILL_CHUNK

    def cached_tokens(self, ids: NDArray[np.int64]) -> int:
        """How many of these tokens a prompt that continues them would find in the cache."""
        index = self.backend.prefix_index
        if index is None or not len(ids):
            return 0
        continued = np.append(ids, -1)  # the last token of a prompt is always computed: let that be the next one
        return index.match(continued, self.long_rope.namespace(self.long_rope.is_long(len(ids) + 1)))

    def generate(self, request: Request, sink: TokenSink, on_progress: ProgressCallback) -> BackendReport:
        """Stream one reply.

        Raises:
            Cancelled: `on_progress` returned False before the first token.
        """
        request = _observed(request, on_progress)
        if self.backend.capabilities.schedules:
            return self.backend.generate(request, sink)
        room = self.long_rope.reply_room(len(request.ids))
        limit = request.config.max_new_tokens or 0
        if room is None or limit <= room:
            return self._run_segment(request, sink, on_progress)
        return self._run_across_boundary(request, room, sink, on_progress)

    def _run_across_boundary(
        self, request: Request, room: int, sink: TokenSink, on_progress: ProgressCallback
    ) -> BackendReport:
        """Stream a reply that may cross the LongRoPE boundary, after `room` tokens."""
        first = _Recorder(sink)
        report = self._run_segment(self.long_rope.until_boundary(request, room), first, on_progress)
        if first.stopped or len(first.ids) < room or first.ids[-1] in request.stop_ids:
            return replace(report, hit_limit=False)
        whole = np.concatenate([request.ids, np.array(first.ids, dtype=np.int64)])
        rest = _Recorder(sink)
        prompt = len(request.ids)
        try:
            remaining = self.long_rope.past_boundary(request, whole, room)
            second = self._run_segment(remaining, rest, lambda *_: on_progress(prompt, prompt))
        except Cancelled:
            return replace(report, hit_limit=False)
        return _join_reports(report, second, len(first.ids), len(rest.ids), len(whole) - (second.reused_tokens or 0))

    def compute_kv(self, request: Request, on_progress: ProgressCallback) -> KVEntry:
        """A copy of the keys and values of a request's ids; those that are not cached are computed first.

        Raises:
            Cancelled: `on_progress` returned False.
        """
        return self.backend.compute_kv(_observed(request, on_progress))

    def score(self, request: Request, start: int, on_progress: ProgressCallback) -> list[float]:
        """Log-probabilities of a request's ids from `start` on, with the rotary factors of each sequence length.

        Raises:
            Cancelled: `on_progress` returned False.
        """
        total = len(request.ids)
        request = _observed(request, on_progress)
        logprobs: list[float] = []
        for first, end in self.long_rope.score_spans(start, total):
            part = replace(request, ids=request.ids[:end], long_rope=self.long_rope.is_long(end - 1))
            with self._invalidate_on_failure():
                logprobs += self.backend.score(part, first, lambda done: on_progress(done, total), self.chunk)
            if len(logprobs) < end - start:
                raise Cancelled
        return logprobs

    def generate_n(self, request: Request, on_progress: ProgressCallback) -> tuple[list[Hypothesis], int | None]:
        """Several replies, and the number of prompt tokens that were found in the cache.

        Raises:
            Cancelled: `on_progress` returned False before there was a reply.
        """
        request, index = self._resolve_cache(_observed(request, on_progress))
        if self.backend.capabilities.schedules:
            reused = None if index is None else index.match(request.ids, isolated=request.isolated)
            return self.backend.generate_n(request), reused
        request, reused, _ = self._prefill_chunks(request, index, on_progress)
        if index is None:
            hypotheses = self.backend.generate_n(request)
            reused = None if self.backend.uses_prefix_cache(request) else 0
        else:
            hypotheses = self._generate_n_cached(request, index)
        if not hypotheses:
            raise Cancelled
        return hypotheses, reused

    def _generate_n_cached(self, request: Request, index: PrefixIndex) -> list[Hypothesis]:
        longest, sequences = request.config.max_new_tokens or 0, request.config.num_sequences
        with self._invalidate_on_failure():
            try:
                hypotheses = self.backend.generate_n(request)
            except RuntimeError as exc:
                if "cache budget" not in str(exc):
                    raise
                raise ContextOverflowError(
                    f"{sequences} replies of up to {longest} tokens at once did not fit the KV cache of "
                    f"{index.capacity} tokens. Ask for fewer or shorter ones, or load with a larger kv_cache_gb.",
                    prompt_tokens=len(request.ids),
                    max_new_tokens=longest,
                    context_length=index.capacity,
                ) from exc
        index.commit(
            request.ids,
            (),
            longest=longest,
            exact=False,
            namespace=self.long_rope.namespace(request.long_rope),
            extra_blocks=_extra_blocks(request.config, longest, index.block_size),
        )
        return hypotheses

    # -- one segment of a reply, with one set of rotary factors ------------------------------------------------------

    def _run_segment(self, request: Request, sink: TokenSink, on_progress: ProgressCallback) -> BackendReport:
        request, index = self._resolve_cache(request)
        request, reused, prefill_ms = self._prefill_chunks(request, index, on_progress)
        if index is None:
            return self.backend.generate(request, sink)
        recorder = _Recorder(sink)
        with self._invalidate_on_failure():
            report = self.backend.generate(request, recorder)
        self._commit(index, request, recorder, report)
        ttft = None if report.ttft_ms is None else report.ttft_ms + prefill_ms
        return replace(report, reused_tokens=reused, ttft_ms=ttft)

    def _resolve_cache(self, request: Request) -> tuple[Request, PrefixIndex | None]:
        """Set `long_rope`; return the request and the prefix index that it uses, or None."""
        request = replace(request, long_rope=self.long_rope.is_long(len(request.ids)))
        index = self.backend.prefix_index
        return request, index if index is not None and self.backend.uses_prefix_cache(request) else None

    def _prefill_chunks(
        self, request: Request, index: PrefixIndex | None, on_progress: ProgressCallback
    ) -> tuple[Request, int | None, float]:
        """Prefill a long prompt up to its last chunk.

        Returns:
            The request as it continues, the prompt tokens that were cached, and the backend's milliseconds.
        """
        total, prefill_ms = len(request.ids), 0.0
        if index is None:
            _check_cancelled(on_progress, 0, total)
            return request, None, prefill_ms
        namespace = self.long_rope.namespace(request.long_rope)
        reused = done = index.match(request.ids, namespace, isolated=request.isolated)
        _check_cancelled(on_progress, done, total)
        if self.chunk:
            # Chunks end at block boundaries; the last one may grow by a half rather than leave a small remainder.
            step = max(1, self.chunk // index.block_size) * index.block_size
            while total - done > step + step // 2:
                done = done - done % index.block_size + step
                prefill_ms += self._compute_kv(replace(request, ids=request.ids[:done]), index)
                request = replace(request, isolated=False)  # the cached part was computed for this request
                _check_cancelled(on_progress, done, total)
        return request, reused, prefill_ms

    def _compute_kv(self, request: Request, index: PrefixIndex) -> float:
        """Compute the keys and values of all ids of a request; returns the backend's milliseconds."""
        part = replace(request, config=_ONE_TOKEN, end_ids=())
        recorder = _Recorder(lambda *_: True)
        with self._invalidate_on_failure():
            report = self.backend.generate(part, recorder)
        self._commit(index, part, recorder, report)
        return report.ttft_ms or 0.0

    def _commit(self, index: PrefixIndex, request: Request, recorder: _Recorder, report: BackendReport) -> None:
        generated = recorder.ids if report.generated is None else report.generated
        index.commit(
            request.ids,
            generated[:-1],  # the last token is never fed back
            longest=request.config.max_new_tokens or 0,
            exact=report.generated is not None,
            namespace=self.long_rope.namespace(request.long_rope),
            extra_blocks=1 if report.generated is None else 0,
        )

    @contextlib.contextmanager
    def _invalidate_on_failure(self) -> Iterator[None]:
        """After a failure of the backend the contents of its cache are unknown."""
        try:
            yield
        except BaseException:
            if (index := self.backend.prefix_index) is not None:
                index.invalidate()
            raise


class _Recorder:
    """A `TokenSink` that records the ids, and whether the backend was asked to stop."""

    def __init__(self, sink: TokenSink) -> None:
        self._sink = sink
        self.ids: list[int] = []
        self.stopped = False

    def __call__(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob] = ()) -> bool:
        self.ids += ids
        if not (self._sink(ids, logprobs) if logprobs else self._sink(ids)):
            self.stopped = True
        return not self.stopped


def _extra_blocks(config: GenerationConfig, longest: int, block: int) -> int:
    """The most blocks that several sequences at once may fill, besides the prompt's.

    Samples copy the block in which they diverge, and continue. A beam may copy its last block at every token.
    """
    own = longest if (config.num_beams or 1) > 1 else -(-longest // block)
    return config.num_sequences * (own + 1)


def _observed(request: Request, on_progress: ProgressCallback) -> Request:
    """A request that reports its progress, and asks whether to continue without a report."""
    return replace(request, should_continue=lambda: on_progress(-1, 0), on_progress=on_progress)


def _check_cancelled(on_progress: ProgressCallback, done: int, total: int) -> None:
    if not on_progress(done, total):
        raise Cancelled


def _join_reports(
    first: BackendReport, second: BackendReport, before: int, after: int, recomputed: int
) -> BackendReport:
    """The report of a reply in two segments of `before` and `after` tokens."""
    tpot = None
    if first.ttft_ms is not None and second.ttft_ms is not None and before + after > 1:
        gaps = (before - 1) * (first.tpot_ms or 0.0) + second.ttft_ms + (after - 1) * (second.tpot_ms or 0.0)
        tpot = gaps / (before + after - 1)
    return BackendReport(
        hit_limit=second.hit_limit,
        ttft_ms=first.ttft_ms,
        tpot_ms=tpot,
        reused_tokens=first.reused_tokens,
        recomputed_tokens=recomputed,
    )
