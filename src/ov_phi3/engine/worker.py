"""One reply from request to result: what runs in a stream's thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ov_phi3.backends.protocol import Backend, CallbackFailed, EngineReport, Request
from ov_phi3.engine.runner import Cancelled, Generator
from ov_phi3.engine.stream import Channel, never_raises, now
from ov_phi3.errors import Error
from ov_phi3.generation.metrics import Metrics
from ov_phi3.generation.results import Alternative, FinishReason, GenerationResult, StreamChunk, TokenLogprob
from ov_phi3.system.failures import to_generation_error
from ov_phi3.text.stop_strings import StopMatcher

if TYPE_CHECKING:
    from ov_phi3.engine.queue import Turn, Turns
    from ov_phi3.text.tokenizer import Tokenizer

__all__ = ["OnEnd", "OnPrefill", "Reply"]

OnEnd = Callable[[GenerationResult | None], GenerationResult | None]

OnPrefill = Callable[[int, int], object]
"""Told how many prompt tokens are prefilled, of how many; runs in the reply's own thread."""


class Reply:
    """Builds one reply from an engine's ids, and hands it to a channel.

    Args:
        request: what is asked of the engine.
        generator: asks it.
        tokenizer: makes text of ids.
        channel: where chunks, the result or the error go.
        requested: when the caller asked, by `stream.now`.
        on_end: given the result, or None after a failure, before the consumer is, and gives back what the consumer
            gets; for who keeps a record of the conversation.
        on_prefill: told the progress of the prefill; what it raises ends the reply and reaches the consumer.
        deadline: when the reply must have ended, by `stream.now`; None for never.
    """

    def __init__(
        self,
        request: Request,
        generator: Generator,
        tokenizer: Tokenizer,
        channel: Channel,
        requested: float,
        on_end: OnEnd | None = None,
        on_prefill: OnPrefill | None = None,
        deadline: float | None = None,
    ) -> None:
        self._request = request
        self._deadline = deadline
        self._timed_out = False
        self._generator = generator
        self._tokenizer = tokenizer
        self._channel = channel
        self._requested = requested
        self._on_end = on_end
        self._on_prefill = on_prefill
        self._prefilled = -1
        self._decoder = tokenizer.stream_decoder()
        self._stops = StopMatcher(request.config.stop or (), include=bool(request.config.include_stop))
        self._ids: list[int] = []
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._stamps: list[float] = []
        self._started: float | None = None
        self._first_text: float | None = None
        self._failure: BaseException | None = None
        self._last: StreamChunk | None = None
        self._limit = request.config.max_new_tokens or 0

    def run(self, backend: Callable[[], Backend], turns: Turns, turn: Turn) -> None:
        """Wait for the engine, generate, and end the channel, whatever happens."""
        self._channel.on_cancel(lambda: turns.give_up(turn))
        try:
            left = None if self._deadline is None else self._deadline - now()
            begun = turns.begin(turn, left)
            result = self._generate(backend()) if begun and not self._over() else self._unbegun()
        except Error as exc:
            self._end(None, exc)
        except CallbackFailed as exc:
            self._end(None, exc.__cause__)
        except BaseException as exc:  # noqa: BLE001 - a thread must not die with the consumer waiting
            error = self._explained(exc)
            error.__cause__ = exc
            self._end(None, error)
        else:
            self._end(result, None)
        finally:
            turns.leave(turn)

    def _explained(self, exc: BaseException) -> Error:
        """An exception of the engine in our words."""
        structure = [n for n in ("json_schema", "regex", "grammar") if getattr(self._request.config, n) is not None]
        return to_generation_error(exc, structure[0] if structure and not self._ids else None)

    def _end(self, result: GenerationResult | None, error: BaseException | None) -> None:
        try:
            if self._on_end is not None:
                result = self._on_end(result)
        finally:
            self._channel.end(result, error, last=self._last if result is not None else None)

    def _generate(self, backend: Backend) -> GenerationResult:
        self._channel.on_cancel(None)
        self._started = now()
        try:
            if self._request.config._is_search():
                return self._search(backend)
            emit = never_raises(self._emit, self._failed)
            report = self._generator.generate(backend, self._request, emit, self._watch)
        except Cancelled:
            return self._unbegun()
        if self._failure is not None:
            raise self._failure
        return self._finish(report)

    def _watch(self, done: int, total: int) -> bool:
        """Hand on the progress of the prefill, each figure once."""
        if self._on_prefill is not None and done > self._prefilled and not self._over():
            self._prefilled = done
            try:
                self._on_prefill(done, total)
            except BaseException as exc:
                raise CallbackFailed from exc
        return not self._over()

    def _over(self) -> bool:
        """Whether nobody wants the rest: it was cancelled, or its time is up."""
        if self._channel.cancelled:
            return True
        self._timed_out = self._timed_out or (self._deadline is not None and now() >= self._deadline)
        return self._timed_out

    def _failed(self, exc: BaseException) -> None:
        self._failure = exc

    def _emit(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob] = ()) -> bool:
        """One step of the engine: stamp, decode, hand over. Runs in the engine's thread."""
        if self._over() or self._stops.matched is not None or len(self._ids) >= self._limit:
            return False
        stamp = now()
        if not self._ids:
            self._watch(len(self._request.ids), len(self._request.ids))
        # Speculative steps can bring more tokens than were asked for.
        step = list(ids[: self._limit - len(self._ids)])
        self._ids += step
        self._stamps += [stamp] * len(step)
        text = self._stops.add(self._decoder.add(step))
        if text:
            self._texts.append(text)
            if self._first_text is None:
                self._first_text = now()
        self._logprobs += logprobs
        self._channel.put(StreamChunk(text, step, logprobs=list(logprobs)))
        return self._stops.matched is None

    def _finish(self, report: EngineReport | None) -> GenerationResult:
        if self._stops.matched is None:
            rest = self._stops.add(self._decoder.flush()) + self._stops.flush()
            if rest:
                self._texts.append(rest)
                self._first_text = self._first_text or now()
        else:
            rest = ""
        reason = self._reason(report)
        self._last = StreamChunk(rest, [], reason)
        return self._result(reason, report)

    def _reason(self, report: EngineReport | None) -> FinishReason:
        if self._stops.matched is not None:
            return "stop"
        if self._ids and self._ids[-1] in self._request.ends:
            return "stop"
        if self._channel.cancelled:
            return "cancelled"
        if self._timed_out:
            return "timeout"
        if (report is not None and report.hit_limit) or len(self._ids) >= self._limit:
            return "length"
        return "stop"

    def _unbegun(self) -> GenerationResult:
        """The result of a request that was cancelled, or whose time was up, before its turn or first token came."""
        self._over()
        return self._finish(None)

    def _result(
        self, reason: FinishReason, report: EngineReport | None, alternatives: tuple[Alternative, ...] = ()
    ) -> GenerationResult:
        metrics = Metrics.from_stamps(
            requested=self._requested,
            started=self._started,
            tokens=self._stamps,
            first_text=self._first_text,
            ended=now(),
            prompt_tokens=len(self._request.ids),
            reused_tokens=report.reused_tokens if report else None,
            recomputed_tokens=report.recomputed_tokens if report else 0,
            engine_ttft_ms=report.ttft_ms if report else None,
            engine_tpot_ms=report.tpot_ms if report else None,
        )
        return GenerationResult(
            text="".join(self._texts),
            token_ids=self._ids,
            finish_reason=reason,
            metrics=metrics,
            config=self._request.config,
            prompt_token_ids=self._request.ids.tolist(),
            stop_string=self._stops.matched,
            alternatives=alternatives,
            logprobs=self._logprobs,
        )

    # -- several replies at once -------------------------------------------------------------------------------------

    def _search(self, backend: Backend) -> GenerationResult:
        """Beams or several samples: nothing is streamed, so the first token comes with the last."""
        hypotheses, reused = self._generator.search(backend, self._request, self._watch)
        found = [self._alternative(h.ids, h.score, h.hit_limit) for h in hypotheses]
        best, self._stops.matched = found[0]
        self._ids, self._texts = best.token_ids, [best.text]
        self._first_text = now()
        self._stamps = [self._first_text] * len(best.token_ids)
        self._last = StreamChunk(best.text, best.token_ids, best.finish_reason)
        report = EngineReport(hypotheses[0].hit_limit, reused_tokens=reused)
        return self._result(best.finish_reason, report, tuple(a for a, _ in found))

    def _alternative(self, ids: list[int], score: float, hit_limit: bool) -> tuple[Alternative, str | None]:
        config = self._request.config
        stops = StopMatcher(config.stop or (), include=bool(config.include_stop))
        text = stops.add(self._tokenizer.decode(ids)) + stops.flush()
        stopped = stops.matched is not None or not hit_limit
        return Alternative(text, ids, "stop" if stopped else "length", score), stops.matched
