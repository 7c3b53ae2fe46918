"""One reply from request to result: the work of a stream's thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ov_phi3.backends.protocol import BackendReport, CallbackFailed, Cancelled, Hypothesis, Request
from ov_phi3.engine.structured import parsed_reply
from ov_phi3.errors import Error
from ov_phi3.generation.metrics import Metrics
from ov_phi3.generation.results import Alternative, FinishReason, GenerationResult, StreamChunk, TokenLogprob
from ov_phi3.system.failures import to_generation_error
from ov_phi3.text.stop_strings import StopMatcher, StopWatch
from ov_phi3.text.tool_calls import ToolCall

if TYPE_CHECKING:
    from ov_phi3.backends.request_queue import RequestQueue, Ticket
    from ov_phi3.engine.channel import Channel
    from ov_phi3.engine.runner import Runner
    from ov_phi3.text.stream_decoder import StreamDecoder
    from ov_phi3.text.tokenizer import Tokenizer
    from ov_phi3.text.tool_calls import ToolCallParser
    from ov_phi3.text.tools import Tools

__all__ = ["OnEnd", "OnPrefill", "ReplyOptions", "ReplyWorker", "now"]

OnEnd = Callable[[GenerationResult | None], GenerationResult | None]
"""Receives the result, or None after a failure, before the consumer does; returns what the consumer gets."""

OnPrefill = Callable[[int, int], object]
"""Receives the number of prefilled prompt tokens and their total, in the thread that runs the model."""


def now() -> float:
    """The clock of all time stamps, in seconds."""
    return time.perf_counter()


@dataclass(frozen=True)
class ReplyOptions:
    """How a reply is run and reported, besides what is generated.

    Attributes:
        requested: when the caller made the request, by `now`.
        deadline: when the reply must have ended, by `now`; None for no limit.
        on_prefill: receives the progress of the prefill; an exception from it ends the reply and is raised to the
            consumer.
        on_end: records the result before the consumer gets it.
        tools: the tools that the reply may call.
    """

    requested: float
    deadline: float | None = None
    on_prefill: OnPrefill | None = None
    on_end: OnEnd | None = None
    tools: Tools | None = None


class ReplyWorker:
    """Builds one reply from a backend's ids and delivers it to a channel.

    Args:
        request: the request to the backend.
        runner: runs the request.
        tokenizer: decodes the ids.
        channel: receives chunks, and the result or the error.
        options: see `ReplyOptions`.
    """

    def __init__(
        self, request: Request, runner: Runner, tokenizer: Tokenizer, channel: Channel, options: ReplyOptions
    ) -> None:
        self._request = request
        self._runner = runner
        self._tokenizer = tokenizer
        self._channel = channel
        self._options = options
        self._queued = now()
        self._started: float | None = None
        self._load_ms: float | None = None
        self._first_text: float | None = None
        self._timed_out = False
        self._prefilled = -1
        self._decoder, self._stops = self._new_decoder(), self._new_matcher()
        self._tool_calls = self._new_parser()
        self._control_stops = tokenizer.control_ids(request.config.stop or ())
        self._ids: list[int] = []
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._stamps: list[float] = []
        self._failure: BaseException | None = None
        self._last: StreamChunk | None = None
        self._limit = request.config.max_new_tokens or 0

    def run(self, queue: RequestQueue, ticket: Ticket, load: Callable[[], float | None]) -> None:
        """Wait for the engine, generate, and end the channel, whatever happens.

        Args:
            queue: the queue of the engine.
            ticket: this reply's ticket, which has joined the queue.
            load: loads the model again if it was unloaded, and returns the milliseconds that this took, or None; raises
                if the engine was closed while this reply waited.
        """
        self._channel.attach_worker()
        self._channel.on_cancel(lambda: queue.abandon(ticket))
        try:
            deadline = self._options.deadline
            started = queue.start(ticket, None if deadline is None else deadline - now())
            if not started and not self._channel.cancelled:
                self._timed_out = True  # by the wait's own clock, which may be a little ahead of ours
            if started:
                self._load_ms = load()
            result = self._generate() if started and not self._should_stop() else self._empty_result()
        except Error as exc:
            self._end(None, exc)
        except CallbackFailed as exc:
            self._end(None, exc.__cause__)
        except BaseException as exc:  # noqa: BLE001 - a thread must not die while its consumer waits
            error = self._to_error(exc)
            error.__cause__ = exc
            self._end(None, error)
        else:
            self._end(result, None)
        finally:
            queue.leave(ticket)

    def _new_decoder(self) -> StreamDecoder:
        """A decoder of what follows the prompt. A structure asks for exact text, a space at its start included."""
        structured = self._request.config.structure is not None
        return self._tokenizer.stream_decoder(keep_space=structured, after=self._request.ids)

    def _new_matcher(self) -> StopMatcher:
        config = self._request.config
        return StopMatcher(config.stop or (), include=bool(config.include_stop))

    def _new_parser(self) -> ToolCallParser | None:
        return None if self._options.tools is None else self._options.tools.parser()

    def _control_stop(self, ids: Sequence[int]) -> str | None:
        """The stop string that is the control token which ended these ids."""
        return self._control_stops.get(ids[-1]) if ids else None

    def _to_error(self, exc: BaseException) -> Error:
        """The error for an exception of the backend."""
        return to_generation_error(exc, None if self._ids else self._request.config.structure)

    def _end(self, result: GenerationResult | None, error: BaseException | None) -> None:
        try:
            if self._options.on_end is not None:
                result = self._options.on_end(result)
        finally:
            self._channel.end(result, error, last=self._last if result is not None else None)

    def _generate(self) -> GenerationResult:
        self._channel.on_cancel(None)
        self._started = now()
        try:
            if self._request.config.is_multi_sequence:
                return self._generate_n()
            report = self._runner.generate(self._request, self._guarded_sink, self._on_progress)
        except Cancelled:
            return self._empty_result()
        if self._failure is not None:
            raise self._failure
        return self._finish(report)

    def _on_progress(self, done: int, total: int) -> bool:
        """Report the progress of the prefill, each figure once; returns whether to continue."""
        on_prefill = self._options.on_prefill
        if on_prefill is not None and done > self._prefilled and not self._should_stop():
            self._prefilled = done
            try:
                on_prefill(done, total)
            except BaseException as exc:
                raise CallbackFailed from exc
        return not self._should_stop()

    def _should_stop(self) -> bool:
        """Whether the rest of the reply is not wanted: it was cancelled, or its time is up."""
        if self._channel.cancelled:
            return True
        deadline = self._options.deadline
        self._timed_out = self._timed_out or (deadline is not None and now() >= deadline)
        return self._timed_out

    def _guarded_sink(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob] = ()) -> bool:
        """`_deliver`, whose exceptions stop the backend instead of reaching it: that would abort the process."""
        try:
            return self._deliver(ids, logprobs)
        except BaseException as exc:  # noqa: BLE001
            self._failure = exc
            return False

    def _deliver(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> bool:
        """Stamp, decode and deliver one step of the backend; returns whether to continue. Runs in its thread."""
        if self._should_stop() or self._stops.matched is not None or len(self._ids) >= self._limit:
            return False
        stamp = now()
        if not self._ids:
            self._on_progress(len(self._request.ids), len(self._request.ids))
        # Steps with speculation can bring more tokens than the limit allows.
        step = list(ids[: self._limit - len(self._ids)])
        self._ids += step
        self._stamps += [stamp] * len(step)
        text, calls = self._without_calls(self._stops.add(self._decoder.add(step)))
        named = [entry.with_bytes(self._tokenizer.token_bytes) for entry in logprobs[: len(step)]]
        self._logprobs += named
        self._channel.put(StreamChunk(text, step, logprobs=named, tool_calls=calls))
        return self._stops.matched is None

    def _without_calls(self, text: str, *, final: bool = False) -> tuple[str, tuple[ToolCall, ...]]:
        """Note the next part of the text, without tool calls; also returns the calls that it completed."""
        calls: tuple[ToolCall, ...] = ()
        if self._tool_calls is not None:
            before = len(self._tool_calls.calls)
            text = self._tool_calls.add(text) + (self._tool_calls.flush() if final else "")
            calls = tuple(self._tool_calls.calls[before:])
        if text:
            self._texts.append(text)
        if (text or calls) and self._first_text is None:
            self._first_text = now()
        return text, calls

    # -- the result --------------------------------------------------------------------------------------------------

    def _finish(self, report: BackendReport | None) -> GenerationResult:
        rest, reason = "", self._finish_reason(report)
        if self._stops.matched is None:
            # What was cut off can be continued: then an incomplete character at its end belongs to the rest.
            rest = self._stops.end(self._decoder.flush(final=reason == "stop"), self._control_stop(self._ids))
            if self._stops.matched is not None:
                reason = "stop"
        rest, calls = self._without_calls(rest, final=True)
        all_calls = () if self._tool_calls is None else tuple(self._tool_calls.calls)
        reason = _with_calls(reason, all_calls)
        self._last = StreamChunk(rest, [], reason, tool_calls=calls)
        return replace(self._result(reason, report), tool_calls=all_calls)

    def _finish_reason(self, report: BackendReport | None) -> FinishReason:
        if self._stops.matched is not None:
            return "stop"
        if self._ids and self._ids[-1] in self._request.stop_ids:
            return "stop"
        if self._channel.cancelled:
            return "cancelled"
        if self._timed_out:
            return "timeout"
        if report is not None and report.in_loop:
            return "loop"
        if (report is not None and report.hit_limit) or len(self._ids) >= self._limit:
            return "length"
        return "stop"

    def _empty_result(self) -> GenerationResult:
        """The result of a request that was cancelled, or timed out, before its first token."""
        self._should_stop()
        return self._finish(None)

    def _result(
        self, reason: FinishReason, report: BackendReport | None, alternatives: tuple[Alternative, ...] = ()
    ) -> GenerationResult:
        from_backend: dict[str, Any] = {}
        if report is not None:
            from_backend = {
                "reused_tokens": report.reused_tokens,
                "recomputed_tokens": report.recomputed_tokens,
                "engine_ttft_ms": report.ttft_ms,
                "engine_tpot_ms": report.tpot_ms,
                "steps": report.steps,
                "drafted_tokens": report.drafted_tokens,
                "accepted_tokens": report.accepted_tokens,
                "forced_tokens": report.forced_tokens,
            }
        metrics = Metrics.from_stamps(
            requested=self._options.requested,
            queued=self._queued + (self._load_ms or 0.0) / 1000.0,  # loading is no waiting for other requests
            started=self._started,
            tokens=self._stamps,
            first_text=self._first_text,
            ended=now(),
            prompt_tokens=len(self._request.ids),
            load_ms=self._load_ms,
            **from_backend,
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
            parsed=self._parsed("".join(self._texts), self._ids, reason, self._stops.matched),
        )

    def _parsed(self, text: str, ids: Sequence[int], reason: FinishReason, stop_string: str | None) -> Any:
        """The value of a structured reply, which is checked unless something cut it off."""
        request = self._request
        by_caller = stop_string is not None or bool(ids and ids[-1] in set(request.stop_ids) - set(request.end_ids))
        return parsed_reply(request.config, text, whole=reason == "stop" and not by_caller)

    # -- several replies to one prompt -------------------------------------------------------------------------------

    def _generate_n(self) -> GenerationResult:
        """Beams or samples: nothing is streamed, so the first token is delivered with the last."""
        watch = StopWatch(self._new_decoder(), self._new_matcher()) if self._request.config.stop else None
        hypotheses, reused = self._runner.generate_n(replace(self._request, stop_watch=watch), self._on_progress)
        replies = [self._alternative(hypothesis) for hypothesis in hypotheses]
        best, self._stops.matched = replies[0]
        self._ids, self._texts = best.token_ids, [best.text]
        self._first_text = now()
        self._stamps = [self._first_text] * len(best.token_ids)
        self._last = StreamChunk(best.text, best.token_ids, best.finish_reason, tool_calls=best.tool_calls)
        report = BackendReport(hypotheses[0].hit_limit, reused_tokens=reused)
        result = self._result(best.finish_reason, report, tuple(reply for reply, _ in replies))
        return replace(result, tool_calls=best.tool_calls)

    def _alternative(self, hypothesis: Hypothesis) -> tuple[Alternative, str | None]:
        """One reply, cut at a stop string, and that stop string."""
        ids, stops, decoder = hypothesis.ids, self._new_matcher(), self._new_decoder()
        text = stops.add(decoder.add(ids))
        reason: FinishReason = "length"
        if stops.matched is not None or (ids and ids[-1] in self._request.stop_ids):
            reason = "stop"
        elif self._should_stop():
            reason = "cancelled" if self._channel.cancelled else "timeout"
        elif not hypothesis.hit_limit:
            reason = "loop" if hypothesis.in_loop else "stop"
        text += stops.end(decoder.flush(final=reason == "stop"), self._control_stop(ids))
        reason, calls = "stop" if stops.matched else reason, list[ToolCall]()
        if (parser := self._new_parser()) is not None:
            text, calls = parser.add(text) + parser.flush(), parser.calls
        reason = _with_calls(reason, calls)
        parsed = self._parsed(text, ids, reason, stops.matched)
        return Alternative(text, ids, reason, hypothesis.score, tuple(calls), parsed), stops.matched


def _with_calls(reason: FinishReason, calls: Sequence[ToolCall]) -> FinishReason:
    """The finish reason of a reply with these calls: OpenAI's clients look for "tool_calls"."""
    return "tool_calls" if calls and reason == "stop" else reason
