"""Files of prompts: JSON lines in, JSON lines out, resumable after a kill.

While the replies are computed, complete lines are appended to the output in the order in which they finish. At the end
the output is replaced, in one step, by the same lines in the order of the prompts. A line holds nothing that differs
from run to run, such as a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ov_phi3.errors import ConfigError, Error
from ov_phi3.files import lock_file, write_atomically
from ov_phi3.generation.config import GenerationConfig
from ov_phi3.loaded_model import LoadedModel
from ov_phi3.many import REQUEST_OPTIONS, row_seed, split_row
from ov_phi3.serving import openai_format, openai_requests

if TYPE_CHECKING:
    from ov_phi3.generation.results import GenerationResult
    from ov_phi3.pipeline import Pipeline

__all__ = ["BatchSummary", "run_batch"]

_CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class BatchSummary:
    """What a run did.

    Attributes:
        total: rows of the input.
        kept: rows whose replies an earlier run had written.
        errors: rows with an error, those of earlier runs included.
        generated_tokens: tokens of the replies of this run.
    """

    total: int
    kept: int
    errors: int
    generated_tokens: int


@dataclass(frozen=True)
class _Row:
    """A line of the input."""

    index: int
    value: Any
    key: str

    @property
    def is_openai(self) -> bool:
        return isinstance(self.value, Mapping) and "custom_id" in self.value and "body" in self.value

    @property
    def name(self) -> str:
        """What the output calls it, to find it again."""
        return f"custom_id {self.value['custom_id']}" if self.is_openai else f"index {self.index}"


def run_batch(
    pipe: Pipeline,
    prompts: Path,
    replies: Path,
    config: GenerationConfig | None = None,
    *,
    model_name: str = "phi-3",
    on_progress: Callable[[int, int], object] | None = None,
) -> BatchSummary:
    """Write the replies to a file of prompts.

    Args:
        pipe: the model.
        prompts: JSON lines: a text, or an object with "prompt" or "messages", perhaps an "id", and options; or lines
            of OpenAI's batch format, for /v1/chat/completions.
        replies: the output. If it has lines of an earlier run, the complete ones are kept.
        config: options under those of the rows.
        model_name: the name in OpenAI's responses.
        on_progress: called with the number of finished rows, those kept included, and of all rows.

    Raises:
        ConfigError: a line of the input is not JSON, two have one custom_id, or the output has replies to other
            prompts, or of another model, other options, another device or other properties.
        ClosedError: the pipeline was closed.
        OSError: a file cannot be read or written, or another run writes the output.
    """
    config = config or GenerationConfig()
    rows = _read_rows(prompts, _conditions(pipe, config, model_name))
    lock = replies.with_name(f".{replies.name}.lock")
    with closing(lock_file(lock)):
        offsets = _kept_lines(replies, rows)
        kept, tokens = len(offsets), 0
        missing = [row for row in rows if row.index not in offsets]
        writer = _Writer(pipe, model_name)
        if on_progress is not None:
            on_progress(kept, len(rows))
        prompts_left = [_prompt_of(row, config) for row in missing]
        with replies.open("ab", buffering=0) as out, pipe.generate_many(prompts_left) as batch:
            for done, (at, outcome) in enumerate(batch, kept + 1):
                row = missing[at]
                if isinstance(outcome, Error):
                    pipe.engine.check_open()  # a closed pipeline is not the row's error
                else:
                    tokens += len(outcome.token_ids)
                line = writer.line(row, outcome)
                offsets[row.index] = (out.seek(0, 2), len(line))
                out.write(line)
                if on_progress is not None:
                    on_progress(done, len(rows))
        errors = _sort_lines(replies, [offsets[row.index] for row in rows])
    with suppress(OSError):
        lock.unlink()
    return BatchSummary(len(rows), kept, errors, tokens)


def _conditions(pipe: Pipeline, config: GenerationConfig, model_name: str) -> str:
    """All that a reply depends on besides its row. Replies of two of them are not mixed in one output."""
    report = pipe.load_report
    properties = sorted((name, str(value)) for name, value in report.ov_config.items() if name != "CACHE_DIR")
    conditions = {
        **LoadedModel(pipe.info, pipe.tokenizer, pipe.engine, report.adapters).fingerprint,
        "backend": report.backend,
        "device": pipe.device.full_name,
        "properties": properties,
        "window": pipe.context_length,
        "config": repr(config.to_dict()),
        "name": model_name,
    }
    return json.dumps(conditions, sort_keys=True)


# -- the input --------------------------------------------------------------------------------------------------------


def _read_rows(path: Path, salt: str) -> list[_Row]:
    rows: list[_Row] = []
    names: set[str] = set()
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as exc:
                raise ConfigError(f"{path}, line {number}, is not JSON: {exc}.") from exc
            index = len(rows)
            digest = hashlib.sha256(f"{salt}\n{index}\n".encode() + line.strip()).hexdigest()[:24]
            row = _Row(index, value, digest)
            if row.name in names:
                raise ConfigError(f"{path}, line {number}: {row.name} occurs twice; give every row its own.")
            names.add(row.name)
            rows.append(row)
    return rows


def _prompt_of(row: _Row, config: GenerationConfig) -> Any:
    """A row as `generate_many` takes it, or what is wrong with it."""
    try:
        prompt, options = _openai_row(row) if row.is_openai else split_row(row.value)
        own = {name: value for name, value in options.items() if name != "id"}
        request: dict[str, Any] = {name: own.pop(name) for name in REQUEST_OPTIONS if name in own}
        merged = GenerationConfig(**own).merged_over(config)
    except Error as exc:
        return exc
    except TypeError as exc:
        return ConfigError(str(exc))
    given = merged.given
    if config.seed is not None and "seed" not in own:
        given["seed"] = row_seed(config.seed, row.index)  # by the row's place in the file, not among the missing ones
    return prompt, {**given, **request}


def _openai_row(row: _Row) -> tuple[Any, dict[str, Any]]:
    url, method = row.value.get("url"), row.value.get("method", "POST")
    if url != _CHAT or method != "POST":
        raise ConfigError(f"{method} {url!r} is not a request that can be answered here; expected POST {_CHAT!r}.")
    body = row.value["body"]
    if not isinstance(body, Mapping):
        raise ConfigError(f"body must be an object, not {type(body).__name__}.")
    request = openai_requests.chat_request(body)
    if request.stream or request.n != 1:
        raise ConfigError("stream and n are not for batches: each row has one reply.")
    return request.prompts[0], {**request.config.given, **(request.tools or {})}


# -- the output -------------------------------------------------------------------------------------------------------


class _Writer:
    """Makes the lines of the output."""

    def __init__(self, pipe: Pipeline, model_name: str) -> None:
        self._pipe = pipe
        self._model_name = model_name

    def line(self, row: _Row, outcome: GenerationResult | Error) -> bytes:
        if not isinstance(outcome, Error):  # the ids of calls are drawn at random
            calls = [replace(call, id=f"call_{row.key}_{at}") for at, call in enumerate(outcome.tool_calls)]
            outcome = replace(outcome, tool_calls=tuple(calls))
        value = self._openai(row, outcome) if row.is_openai else self._own(row, outcome)
        return json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"

    def _own(self, row: _Row, outcome: GenerationResult | Error) -> dict[str, Any]:
        head: dict[str, Any] = {"index": row.index, "key": row.key}
        if isinstance(row.value, Mapping) and "id" in row.value:
            head["id"] = row.value["id"]
        if isinstance(outcome, Error):
            return {**head, "error": {"type": type(outcome).__name__, "message": str(outcome)}}
        reply: dict[str, Any] = {"text": outcome.text, "finish_reason": outcome.finish_reason}
        if outcome.tool_calls:
            reply["tool_calls"] = [call.to_dict() for call in outcome.tool_calls]
        if outcome.alternatives:
            reply["alternatives"] = [a.text for a in outcome.alternatives]
        if outcome.logprobs:
            reply["logprobs"] = [entry.to_dict() for entry in outcome.logprobs]
        counts = {"prompt_tokens": len(outcome.prompt_token_ids), "generated_tokens": len(outcome.token_ids)}
        return {**head, **reply, **counts}

    def _openai(self, row: _Row, outcome: GenerationResult | Error) -> dict[str, Any]:
        if isinstance(outcome, Error):
            status, body = openai_format.error_of(outcome)
        else:
            status = 200
            usage = openai_format.usage([outcome], 1)
            del usage["prompt_tokens_details"]  # what is cached depends on what ran before
            choice = openai_format.chat_choice(outcome, 0, self._pipe.tokenizer, self._pipe.info.eos_token_ids)
            body = {
                "id": f"chatcmpl-{row.key}",
                "object": "chat.completion",
                "created": 0,  # a time would differ from run to run
                "model": self._model_name,
                "choices": [choice],
                "usage": usage,
            }
        response = {"status_code": status, "request_id": f"req_{row.key}", "body": body}
        custom_id = row.value["custom_id"]
        return {"id": f"batch_req_{row.key}", "custom_id": custom_id, "response": response, "error": None}


def _kept_lines(path: Path, rows: list[_Row]) -> dict[int, tuple[int, int]]:
    """Where the complete lines of an earlier run are, by the row's index; what is behind the last one is cut off.

    Raises:
        ConfigError: a line is not the reply to one of these rows.
    """
    if not path.exists():
        return {}
    by_name = {row.name: row for row in rows}
    found: dict[int, tuple[int, int]] = {}
    end = 0
    for offset, line in _lines(path):
        if not line.endswith(b"\n"):
            break
        end = offset + len(line)
        name, key = _identity(line)
        if name is None:  # left by a machine that went down: computed again
            continue
        row = by_name.get(name)
        if row is None or row.key != key:
            raise ConfigError(
                f"{path} has replies to other prompts, or of another model, other options or other properties "
                f"({name}). Give another output file, or remove it."
            )
        found.setdefault(row.index, (offset, len(line)))
    if end != path.stat().st_size:
        with path.open("r+b") as file:
            file.truncate(end)
    return found


def _identity(line: bytes) -> tuple[str | None, str]:
    """The name and the key of the row that a line of the output answers; None if it is not such a line."""
    try:
        value = json.loads(line)
        if "custom_id" in value:
            return f"custom_id {value['custom_id']}", str(value["id"]).removeprefix("batch_req_")
        return f"index {value['index']}", str(value["key"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None, ""


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    offset = 0
    with path.open("rb") as file:
        for line in file:
            yield offset, line
            offset += len(line)


def _sort_lines(path: Path, places: list[tuple[int, int]]) -> int:
    """Write the lines at these places, in this order, and return how many of them are errors."""
    errors = 0
    with path.open("rb") as file, write_atomically(path) as out:
        for offset, length in places:
            file.seek(offset)
            line = file.read(length)
            value = json.loads(line)
            errors += value.get("error") is not None or value.get("response", {}).get("status_code", 200) != 200
            out.write(line)
    return errors
