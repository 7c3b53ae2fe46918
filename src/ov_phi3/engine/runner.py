"""From a prompt's ids to a reply's: what to prefill, in which pieces, and when a sequence must be computed afresh.

Three things are done here for every engine that cannot do them itself.

*Chunks.* A long prompt is prefilled piece by piece, each a request of its own that the next finds in the prefix cache.
Between two of them the reply can be cancelled, and progress is told.

*LongRoPE.* A model with `rope_boundary` rotates keys with one set of factors up to that many tokens, and with another
past it, in the whole sequence. A reply that grows past it stops there, and goes on from all of its ids computed afresh.
The reference is the model recomputed without a cache; transformers' `Phi3ForCausalLM.prepare_inputs_for_generation`
drops its cache at the same length.

*Books.* What the prefix cache holds is noted, so that it is known what a prompt will find there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ov_phi3.backends.protocol import Backend, Cancelled, Emit, EngineReport, Hypothesis, Request
from ov_phi3.errors import ContextOverflowError
from ov_phi3.generation.config import GenerationConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ov_phi3.backends.infer_request import InferRequestBackend
    from ov_phi3.generation.results import TokenLogprob
    from ov_phi3.kv.cache import Books

__all__ = ["LARGE_MODEL_CHUNK", "PREFILL_CHUNK", "Cancelled", "Generator", "Watch"]

PREFILL_CHUNK = 2048
"""Prompt tokens per piece. `benchmarks/prefix_cache.py` measures what a piece costs."""

LARGE_MODEL_CHUNK = 256
"""The same on a CPU for a model of over a gigabyte, which needs seconds for this many; one more pass over its weights
is little beside that."""

Watch = Callable[[int, int], bool]
"""Told how many prompt tokens are prefilled, of how many, or -1 for no news; False asks to stop."""

_PAST = b"past the LongRoPE boundary"
_SECOND_SEED = 0x9E3779B9  # 2**32 / golden ratio: the reply goes on with other random numbers than it began with


@dataclass
class Generator:
    """Asks a backend for replies. Used by one thread at a time.

    Attributes:
        ledger: the books of the backend's prefix cache; None where it has none, or none are known.
        rope_boundary: see `ModelInfo.rope_boundary`.
        chunk: prompt tokens per piece; 0 for whole prompts. Needs the prefix cache.
        assisted_tokens: most candidates per step of a pipeline with prompt lookup or a draft model; 0 for others.
    """

    ledger: Books | None = None
    rope_boundary: int | None = None
    chunk: int = PREFILL_CHUNK
    assisted_tokens: int = 0

    def cached_tokens(self, ids: NDArray[np.int64]) -> int:
        """Tokens of these that a prompt which goes on from them would find in the cache."""
        if self.ledger is None or not len(ids):
            return 0
        following = np.append(ids, -1)  # a prompt computes its last token in any case: let that be the one after these
        return self.ledger.find(following, self._salt(self.is_past(len(ids) + 1)))

    def reply_room(self, prompt_tokens: int) -> int | None:
        """Longest reply, in tokens, that ends before the sequence must be computed afresh; None for any length.

        The last token of a reply is never fed back, so a reply may be one longer than the boundary is away.
        """
        boundary = self.rope_boundary
        return None if boundary is None or prompt_tokens > boundary else boundary - prompt_tokens + 1

    def generate(self, backend: Backend, request: Request, emit: Emit, watch: Watch) -> EngineReport:
        """Stream one reply.

        Raises:
            Cancelled: `watch` asked to stop before the first token.
        """
        request = replace(request, wanted=_wanted(watch))
        room = self.reply_room(len(request.ids))
        limit = request.config.max_new_tokens or 0
        if room is None or limit <= room:
            return self._piece(backend, request, emit, watch)
        first = _Counted(emit)
        report = self._piece(backend, self._shorter(request, room), first, watch)
        if first.stopped or len(first.ids) < room or first.ids[-1] in request.ends:
            return replace(report, hit_limit=False)
        whole = np.concatenate([request.ids, np.array(first.ids, dtype=np.int64)])
        rest = _Counted(emit)
        prompt = len(request.ids)
        try:
            second = self._piece(backend, self._longer(request, whole, room), rest, lambda *_: watch(prompt, prompt))
        except Cancelled:
            return replace(report, hit_limit=False)
        return _joined(report, second, len(first.ids), len(rest.ids), len(whole) - (second.reused_tokens or 0))

    def fill(self, backend: Backend, request: Request, watch: Watch) -> None:
        """Have all of a request's ids in the cache, for an engine that `caches` by the token.

        Raises:
            Cancelled: `watch` asked to stop.
        """
        request, ledger = self._sided(backend, replace(request, wanted=_wanted(watch)))
        assert ledger is not None, "the engine has no cache"
        request, _, _ = self._prefill(backend, request, ledger, watch)
        if self.cached_tokens(request.ids) < len(request.ids):
            self._compute(backend, request, ledger)
        _ask(watch, len(request.ids), len(request.ids))

    def score(self, backend: InferRequestBackend, request: Request, start: int, watch: Watch) -> list[float]:
        """Log-probabilities of a request's ids from `start` on, each by the factors that a sequence of its length has.

        Raises:
            Cancelled: `watch` asked to stop.
        """
        total, boundary = len(request.ids), self.rope_boundary
        request = replace(request, wanted=_wanted(watch))
        cut = start
        if boundary is not None and start <= boundary < total - 1:
            cut = boundary + 1  # the last id that is predicted by the short factors has as many before it
        found: list[float] = []
        for first, end in ((start, cut), (cut, total)):
            if first < end:
                part = replace(request, ids=request.ids[:end], past_boundary=self.is_past(end - 1))
                with _forgetting(backend.slots):
                    found += backend.score(part, first, lambda done: watch(done, total), self.chunk)
                if len(found) < end - start:
                    raise Cancelled
        return found

    def search(self, backend: Backend, request: Request, watch: Watch) -> tuple[list[Hypothesis], int | None]:
        """Several replies at once; and the prompt tokens that were found in the cache."""
        request, ledger = self._sided(backend, request)
        request, reused, _ = self._prefill(backend, request, ledger, watch)
        if ledger is None:
            return backend.search(request), None if backend.caches(request) else 0
        longest, sequences = request.config.max_new_tokens or 0, _sequences(request.config)
        with _forgetting(ledger):
            try:
                found = backend.search(request)
            except RuntimeError as exc:
                if "cache budget" not in str(exc):
                    raise
                raise ContextOverflowError(
                    f"{sequences} replies of up to {longest} tokens at once did not fit the KV cache of "
                    f"{ledger.capacity} tokens. Ask for fewer or shorter ones, or load with a larger kv_cache_gb.",
                    prompt_tokens=len(request.ids),
                    max_new_tokens=longest,
                    context_length=ledger.capacity,
                ) from exc
        ledger.record(
            request.ids,
            (),
            longest=longest,
            exact=False,
            salt=self._salt(request.past_boundary),
            others=_others(request.config, longest, ledger.block_size),
        )
        return found, reused

    def search_room(self, prompt_tokens: int, config: GenerationConfig) -> int | None:
        """Longest replies, in tokens, that several at once can surely have; None where the cache grows."""
        if self.ledger is None or self.ledger.grows:
            return None
        block = self.ledger.block_size
        free = self.ledger.capacity // block - -(-prompt_tokens // block)
        return max(1, (free // _sequences(config) - 1) * block)

    # -- one stretch of a reply, with one set of factors -------------------------------------------------------------

    def _piece(self, backend: Backend, request: Request, emit: Emit, watch: Watch) -> EngineReport:
        request, ledger = self._sided(backend, request)
        request, reused, spent = self._prefill(backend, request, ledger, watch)
        if ledger is None:
            return backend.generate(request, emit)
        counted = _Counted(emit)
        with _forgetting(ledger):
            report = backend.generate(request, counted)
        self._note(ledger, request, counted, report)
        ttft = None if report.ttft_ms is None else report.ttft_ms + spent
        return replace(report, reused_tokens=reused, ttft_ms=ttft)

    def _sided(self, backend: Backend, request: Request) -> tuple[Request, Books | None]:
        """The request with the side of the boundary that it is on, and the books that it is in."""
        request = replace(request, past_boundary=self.is_past(len(request.ids)))
        return request, self.ledger if self.ledger is not None and backend.caches(request) else None

    def _prefill(
        self, backend: Backend, request: Request, ledger: Books | None, watch: Watch
    ) -> tuple[Request, int | None, float]:
        """Prefill all of a long prompt but its last piece; returns the request as it goes on, what was found in the
        cache, and the engine's milliseconds.
        """
        total, spent = len(request.ids), 0.0
        if ledger is None:
            _ask(watch, 0, total)
            return request, None, spent
        reused = done = ledger.find(request.ids, self._salt(request.past_boundary), alone=request.alone)
        _ask(watch, done, total)
        if self.chunk:
            # Pieces end where blocks do; the last one is let grow by a half rather than leave a small remainder.
            step = max(1, self.chunk // ledger.block_size) * ledger.block_size
            while total - done > step + step // 2:
                done = done - done % ledger.block_size + step
                spent += self._compute(backend, replace(request, ids=request.ids[:done]), ledger)
                request = replace(request, alone=False)  # what it needs was computed just now
                _ask(watch, done, total)
        return request, reused, spent

    def _compute(self, backend: Backend, request: Request, ledger: Books) -> float:
        """Have all of a request's ids in the cache; returns the engine's milliseconds."""
        part = replace(request, config=_ONE_TOKEN, end_ids=())
        counted = _Counted(lambda *_: True)
        with _forgetting(ledger):
            report = backend.generate(part, counted)
        self._note(ledger, part, counted, report)
        return report.ttft_ms or 0.0

    def _note(self, ledger: Books, request: Request, reply: _Counted, report: EngineReport) -> None:
        generated = reply.ids if report.generated is None else report.generated
        ledger.record(
            request.ids,
            generated[:-1],  # the last token is never fed back
            longest=request.config.max_new_tokens or 0,
            exact=report.generated is not None,
            salt=self._salt(request.past_boundary),
            others=1 if report.generated is None else 0,
        )

    def is_past(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens is past the LongRoPE boundary."""
        return self.rope_boundary is not None and tokens > self.rope_boundary

    @staticmethod
    def _salt(past: bool) -> bytes:
        return _PAST if past else b""

    @staticmethod
    def _shorter(request: Request, room: int) -> Request:
        config = request.config
        least = min(config.min_new_tokens or 0, room)
        return replace(request, config=config.replace(max_new_tokens=room, min_new_tokens=least))

    @staticmethod
    def _longer(request: Request, whole: NDArray[np.int64], done: int) -> Request:
        config = request.config
        changes: dict[str, Any] = {
            "max_new_tokens": (config.max_new_tokens or 0) - done,
            "min_new_tokens": max(0, (config.min_new_tokens or 0) - done),
        }
        if config.do_sample and config.seed is not None:
            changes["seed"] = config.seed ^ _SECOND_SEED
        return replace(request, ids=whole, config=config.replace(**changes))


_ONE_TOKEN = GenerationConfig(max_new_tokens=1, do_sample=False, ignore_eos=True).resolve(room=1)


class _Counted:
    """An `Emit` that notes what passed, and whether the engine was asked to stop."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self.ids: list[int] = []
        self.stopped = False

    def __call__(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob] = ()) -> bool:
        self.ids += ids
        if not (self._emit(ids, logprobs) if logprobs else self._emit(ids)):
            self.stopped = True
        return not self.stopped


@contextlib.contextmanager
def _forgetting(ledger: Books) -> Iterator[None]:
    """After a failure in the engine nothing is known of its cache."""
    try:
        yield
    except BaseException:
        ledger.forget()
        raise


def _sequences(config: GenerationConfig) -> int:
    return max(config.num_beams or 1, config.num_return_sequences or 1)


def _others(config: GenerationConfig, longest: int, block: int) -> int:
    """The most blocks that several sequences at once may take, besides the prompt's.

    Samples copy the block in which they part, and go on. A beam may copy its last block at every token.
    """
    own = longest if (config.num_beams or 1) > 1 else -(-longest // block)
    return _sequences(config) * (own + 1)


def _wanted(watch: Watch) -> Callable[[], bool]:
    """Whether a reply is still wanted; tells no progress."""
    return lambda: watch(-1, 0)


def _ask(watch: Watch, done: int, total: int) -> None:
    if not watch(done, total):
        raise Cancelled


def _joined(first: EngineReport, second: EngineReport, before: int, after: int, recomputed: int) -> EngineReport:
    """The report of a reply in two stretches."""
    tpot = None
    if first.ttft_ms is not None and second.ttft_ms is not None and before + after > 1:
        gaps = (before - 1) * (first.tpot_ms or 0.0) + second.ttft_ms + (after - 1) * (second.tpot_ms or 0.0)
        tpot = gaps / (before + after - 1)
    return EngineReport(
        hit_limit=second.hit_limit,
        ttft_ms=first.ttft_ms,
        tpot_ms=tpot,
        reused_tokens=first.reused_tokens,
        recomputed_tokens=recomputed,
    )
