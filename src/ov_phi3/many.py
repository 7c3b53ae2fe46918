"""Many prompts: the replies as they finish or in order, with errors as values."""

from __future__ import annotations

import hashlib
import queue
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias

from ov_phi3.errors import ConfigError, Error, GenerationError, PromptError
from ov_phi3.generation.config import GenerationConfig
from ov_phi3.generation.options import GenerationOptions
from ov_phi3.generation.results import GenerationResult
from ov_phi3.text.prompt import Prompt, as_messages

if TYPE_CHECKING:
    from ov_phi3.engine.stream import TokenStream
    from ov_phi3.engine.worker import OnPrefill
    from ov_phi3.prefix import Prefix
    from ov_phi3.text.tools import ToolChoice

__all__ = ["REQUEST_OPTIONS", "OnProgress", "Outcome", "ReplyBatch", "RequestOptions", "Row", "row_seed", "split_row"]

Row: TypeAlias = Prompt | tuple[Prompt, Mapping[str, Any]] | Mapping[str, Any] | Error
"""A prompt; a pair of a prompt and its options; a dict with "prompt" or "messages", and options; or the error of a row
that could not be read, which is its outcome."""

Outcome: TypeAlias = GenerationResult | Error
"""What came of a row."""

OnProgress = Callable[[int, "int | None"], object]
"""Receives the number of finished rows, and the number of all rows if it is known."""

Start = Callable[["Prompt", GenerationConfig, "OnPrefill | None", Mapping[str, Any]], "TokenStream"]
"""Starts the reply to one row: prompt, options of the reply, progress of its prefill, options of the request."""


class RequestOptions(GenerationOptions, total=False):
    """The keyword arguments `**options` of `generate_many`: options of a reply, and of `generate`."""

    prefix: Prefix | None
    timeout: float | None
    continue_final_message: bool
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: ToolChoice | None


REQUEST_OPTIONS = tuple(n for n in RequestOptions.__annotations__ if n not in GenerationOptions.__annotations__)
"""Options of a row that are not fields of `GenerationConfig`."""

_WINDOW = 1024  # rows that are read ahead and grouped
_COMMON = 256  # characters, or token ids / 4: a shorter common beginning is computed faster than it is waited for
_WAIT_S = 0.1 if sys.platform == "win32" else None  # on Windows, Ctrl-C does not end a wait without a timeout


def row_seed(seed: int, index: int) -> int:
    """The seed of a row: the first 32 bits of SHA-256 of "seed:index".

    It depends on nothing but these two numbers, and is in the range of both backends.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:4], "big")


def split_row(row: object) -> tuple[Any, Mapping[str, Any]]:
    """The prompt of a row, and its options.

    Raises:
        PromptError: a dict without "prompt" and "messages", or with both.
    """
    if isinstance(row, tuple) and len(row) == 2 and isinstance(row[1], Mapping) and not isinstance(row[0], Mapping):
        return row[0], row[1]
    if not isinstance(row, Mapping):
        return row, {}
    names = [name for name in ("prompt", "messages") if name in row]
    if len(names) != 1:
        problem = "both 'prompt' and 'messages'" if names else "neither 'prompt' nor 'messages'"
        hint = " A conversation is a list of messages: put it in a list of its own." if "role" in row else ""
        raise PromptError(f"a row that is a dict has one of them; this one has {problem}.{hint}")
    return row[names[0]], {name: value for name, value in row.items() if name != names[0]}


@dataclass
class _Pending:
    """A row that has not started."""

    index: int
    row: object
    beginning: str = ""
    followers: list[_Pending] = field(default_factory=list)


class ReplyBatch:
    """The replies to many prompts: iterate over it for (index, outcome) pairs as they finish, or take `results`.

    Made by `Pipeline.generate_many`. An outcome is a `GenerationResult`, or the `Error` of that row. Leaving a `with`
    block, `close`, or dropping the batch cancels the replies that have not finished. Rows are started while the batch
    is iterated over: twice as many as run at once are under way.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        config: GenerationConfig,
        request: Mapping[str, Any],
        *,
        start: Start,
        width: int,
        on_progress: OnProgress | None,
    ) -> None:
        self._rows = enumerate(rows)
        self._total = len(rows) if isinstance(rows, Sized) else None
        self._config = config
        self._request = request
        self._start = start
        self._width = width
        self._on_progress = on_progress
        self._ready: deque[_Pending] = deque()
        self._waiting: dict[int, list[_Pending]] = {}  # for the prefill of the row with this index
        self._running: dict[int, TokenStream] = {}
        self._failed: deque[tuple[int, Error]] = deque()
        self._events: queue.SimpleQueue[tuple[int, bool]] = queue.SimpleQueue()  # index, ended
        self._done = 0
        self._closed = False

    def __repr__(self) -> str:
        total = "" if self._total is None else f" of {self._total}"
        return f"<ReplyBatch, {self._done}{total} finished>"

    def __iter__(self) -> Iterator[tuple[int, Outcome]]:
        return self

    def __next__(self) -> tuple[int, Outcome]:
        try:
            finished = self._next()
            if finished is None:
                raise StopIteration
            self._done += 1
            if self._on_progress is not None:
                self._on_progress(self._done, self._total)
        except BaseException as exc:
            if not isinstance(exc, StopIteration):
                self._cancel()
            raise
        return finished

    def results(self) -> list[Outcome]:
        """All outcomes that have not been iterated over yet, in the order of the prompts; waits for them."""
        outcomes = dict(self)
        return [outcomes[index] for index in sorted(outcomes)]

    def close(self) -> None:
        """Cancel the replies that have not finished, and wait until they have ended. Can be called again."""
        self._cancel()
        for stream in self._running.values():
            stream.channel.wait_ended()
        self._running.clear()

    def __enter__(self) -> ReplyBatch:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _cancel(self) -> None:
        self._closed = True
        for stream in self._running.values():
            stream.cancel()

    def _next(self) -> tuple[int, Outcome] | None:
        """The next outcome, waiting for it; None if there is none left."""
        while not self._closed:
            self._start_rows()
            if self._failed:
                return self._failed.popleft()
            if not self._running:
                return None
            index, ended = self._wait()
            self._release_followers(index)
            if ended:
                return index, _outcome(self._running.pop(index))
        return None

    def _wait(self) -> tuple[int, bool]:
        while True:
            try:
                return self._events.get(timeout=_WAIT_S)
            except queue.Empty:
                continue

    # -- starting rows -----------------------------------------------------------------------------------------------

    def _start_rows(self) -> None:
        while len(self._running) < self._width and not self._failed:
            if not self._ready:
                self._ready.extend(self._read_rows())
            if not self._ready:
                return
            pending = self._ready.popleft()
            try:
                self._start_row(pending)
            except Error as exc:
                self._failed.append((pending.index, exc))
                self._release(pending.followers)

    def _read_rows(self) -> list[_Pending]:
        """The next rows: those that begin alike behind each other, of each such group the first one only."""
        rows = [_Pending(index, row) for index, row in islice(self._rows, _WINDOW)]
        if self._config.seed is not None:  # then no request uses what others left in the cache
            return rows
        for pending in rows:
            pending.beginning = _beginning(pending.row)
        rows.sort(key=lambda pending: pending.beginning)
        leaders: list[_Pending] = []
        for pending in rows:
            if leaders and _share(leaders[-1].beginning, pending.beginning):
                leaders[-1].followers.append(pending)
            else:
                leaders.append(pending)
        return leaders

    def _start_row(self, pending: _Pending) -> None:
        if isinstance(pending.row, Error):
            raise pending.row
        index, events = pending.index, self._events  # not self: a batch that is dropped must be freed
        prompt, options = split_row(pending.row)
        names = GenerationConfig.__dataclass_fields__
        request = {**self._request, **{name: options[name] for name in REQUEST_OPTIONS if name in options}}
        given = {str(name): value for name, value in options.items() if name not in REQUEST_OPTIONS}
        config = self._config
        if config.seed is not None:
            config = config.replace(seed=row_seed(config.seed, index))

        def on_prefill(done: int, total: int) -> None:
            if done >= total:
                events.put((index, False))

        try:
            own = GenerationConfig(**given)  # refuses what contradicts itself, before it is put over the rest
            config = own.merged_over(config) if any(name in names for name in given) else config
            stream = self._start(prompt, config, on_prefill if pending.followers else None, request)
        except TypeError as exc:
            raise _as_error(exc) from exc
        self._running[index] = stream
        if pending.followers:
            self._waiting[index] = pending.followers
        if not stream.channel.listen(lambda: events.put((index, True)), for_end=True):
            events.put((index, True))

    def _release_followers(self, index: int) -> None:
        self._release(self._waiting.pop(index, []))

    def _release(self, followers: Sequence[_Pending]) -> None:
        self._ready.extendleft(reversed(followers))


def _outcome(stream: TokenStream) -> Outcome:
    try:
        return stream.result
    except Error as exc:
        return exc
    except Exception as exc:  # noqa: BLE001 - of the caller's logits processor
        error = GenerationError(f"a callback of this row raised {type(exc).__name__}: {exc}")
        error.__cause__ = exc
        return error


def _as_error(exc: TypeError) -> Error:
    """A wrong type in one row as an error of that row."""
    return PromptError(str(exc)) if "prompt" in str(exc) or "messages" in str(exc) else ConfigError(str(exc))


def _beginning(row: object) -> str:
    """What a row's prompt is compared by; "" for one that cannot be read, whose error comes when it is started."""
    try:
        prompt = split_row(row)[0]
        messages = as_messages(prompt)
        if messages is not None:
            return "m" + "\x00".join(f"{m.get('role')}\x00{m.get('content')}" for m in messages)
        if isinstance(prompt, str):
            return "r" + prompt
        return "i" + "".join(chr(int(token)) * 4 for token in prompt)
    except (Error, AttributeError, OverflowError, TypeError, ValueError):
        return ""


def _share(one: str, other: str) -> bool:
    """Whether two prompts have a beginning in common that is worth waiting for."""
    return len(one) >= _COMMON and one[:_COMMON] == other[:_COMMON]
