"""Batches of prompts over a fleet: one engine in each actor of a Ray Data pool."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ov_phi3.backends.registry import concurrency_on
from ov_phi3.errors import ConfigError, Error
from ov_phi3.generation.config import GenerationConfig
from ov_phi3.loading import load
from ov_phi3.many import row_seed
from ov_phi3.serving.properties import EXACT
from ov_phi3.serving.ray.model_source import fetch_model
from ov_phi3.system.devices import devices

if TYPE_CHECKING:
    from ov_phi3.generation.results import GenerationResult

__all__ = ["BatchGenerator"]

_PROMPTS = ("messages", "prompt")
_CONCURRENCY = 16


class BatchGenerator:
    """Replies to batches of rows; a class for `ray.data.Dataset.map_batches`, with one engine in each actor.

    A row has the column "prompt" (a text) or "messages" (a conversation, as in OpenAI's API), or both, of which one is
    None; and perhaps "options", a dict of options of its own. Its columns are passed on, and these are added:

    - "text": the reply; "" if it failed.
    - "finish_reason": why it ended; "" if it failed.
    - "tool_calls": the calls of tools as a JSON list of names and arguments; "" for none.
    - "prompt_tokens" and "generated_tokens".
    - "error": "" or what went wrong, such as "ConfigError: ...". One row never ends the others.

    Args:
        model_dir: directory of the model, on every node or shared; with `manifest_sha256`, where to copy it from.
        config: options of the replies, or a dict of them. With a seed, each row has the seed that `row_seed` makes of
            it and the row's id, so that neither the number of actors nor a second try changes a draw.
        manifest_sha256: copy the model to the node's own disk first, see `fetch_model`.
        cache_dir: where these copies are kept.
        prefixes: files that `Prefix.save` or `ov-phi3 cache build` wrote, in shared storage: the cached beginnings of
            prompts. Rows that begin with their ids do not prefill them.
        system: a system message in front of all rows that have none.
        id_column: the rows' ids, for the seeds; any unique numbers or texts.
        concurrency: replies at once in each actor; default: 16, or 1 with `backend="llm_pipeline"`.
        exact: compute in float32, so that a reply does not depend on what runs beside it.
        metrics: also add "reused_tokens" (prompt tokens that were found in the cache), "ttft_ms" and "total_ms", which
            differ from run to run.
        **load_options: of `ov_phi3.load`; the backend is "infer_request" by default. On a CPU, `INFERENCE_NUM_THREADS`
            is the actor's `num_cpus` unless given.

    Raises:
        Error: what `load` and `load_prefix` raise.
    """

    def __init__(
        self,
        model_dir: str | os.PathLike[str],
        config: GenerationConfig | Mapping[str, Any] | None = None,
        *,
        manifest_sha256: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        prefixes: Sequence[str | os.PathLike[str]] = (),
        system: str | None = None,
        id_column: str = "id",
        concurrency: int | None = None,
        exact: bool = True,
        metrics: bool = False,
        **load_options: Any,
    ) -> None:
        if config is not None and not isinstance(config, GenerationConfig):
            config = GenerationConfig(**config)
        self._config = config or GenerationConfig()
        self._system = system
        self._id_column = id_column
        self._metrics = metrics
        path = model_dir if manifest_sha256 is None else fetch_model(model_dir, manifest_sha256, cache_dir)
        properties = actor_properties(load_options, exact=exact)
        options = {"backend": "infer_request", **load_options, "ov_config": properties}
        self._pipe = load(path, concurrency=concurrency_on(options["backend"], concurrency, _CONCURRENCY), **options)
        self._prefixes = [self._pipe.load_prefix(file) for file in prefixes]  # kept: every request may use them

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with the columns of the replies, in the same order.

        Raises:
            ConfigError: no column with prompts, or a seed but no column of ids.
            ClosedError: the engine was closed.
        """
        columns = [name for name in _PROMPTS if name in batch]
        if not columns:
            raise ConfigError(f"the rows have the columns {sorted(batch)}; expected 'prompt' or 'messages'.")
        if self._config.seed is not None and self._id_column not in batch:
            raise ConfigError(
                f"a seed needs ids of the rows, but there is no column {self._id_column!r}: add it, or name another "
                "one with id_column."
            )
        count = len(batch[columns[0]])
        rows = [self._row(batch, columns, at) for at in range(count)]
        with self._pipe.generate_many(rows, self._config) as replies:
            outcomes = replies.results()
        if any(isinstance(outcome, Error) for outcome in outcomes):
            self._pipe.engine.check_open()  # a closed engine is not the row's error
        added = [self._columns(outcome) for outcome in outcomes]
        return {**batch, **{name: _column([row[name] for row in added]) for name in self._columns(None)}}

    def _row(self, batch: Mapping[str, Any], columns: Sequence[str], at: int) -> Any:
        """A row as `generate_many` takes it, or what is wrong with it."""
        given = {name: value for name in columns if (value := _plain(batch[name][at])) is not None}
        if len(given) != 1:
            return ConfigError(f"a row needs one of {list(_PROMPTS)}; this one has {sorted(given) or 'none'}.")
        prompt = given.get("messages", given.get("prompt"))
        if self._system is not None:
            if isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt}]
            if isinstance(prompt, list) and prompt and _role(prompt[0]) not in ("system", "developer"):
                prompt = [{"role": "system", "content": self._system}, *prompt]
        options = _plain(batch["options"][at]) if "options" in batch else None
        if not isinstance(options, (dict, type(None))):
            return ConfigError(f"options={options!r}; expected an object.")
        own = {str(name): value for name, value in (options or {}).items()}
        if self._config.seed is not None:
            own.setdefault("seed", row_seed(self._config.seed, _plain(batch[self._id_column][at])))
        return prompt, own

    def _columns(self, outcome: GenerationResult | Error | None) -> dict[str, Any]:
        """What is added to a row."""
        row: dict[str, Any] = {"text": "", "finish_reason": "", "tool_calls": ""}
        row |= {"prompt_tokens": 0, "generated_tokens": 0, "error": ""}
        if self._metrics:
            row |= {"reused_tokens": 0, "ttft_ms": 0.0, "total_ms": 0.0}
        if outcome is None:
            return row
        if isinstance(outcome, Error):
            return {**row, "error": f"{type(outcome).__name__}: {outcome}"}
        row |= {"text": outcome.text, "finish_reason": outcome.finish_reason}
        row |= {"prompt_tokens": len(outcome.prompt_token_ids), "generated_tokens": len(outcome.token_ids)}
        if outcome.tool_calls:  # without their ids, which are drawn at random
            calls = [{"name": call.name, "arguments": call.arguments} for call in outcome.tool_calls]
            row["tool_calls"] = json.dumps(calls, ensure_ascii=False)
        if self._metrics:
            times = outcome.metrics
            row |= {"reused_tokens": times.reused_tokens or 0, "ttft_ms": times.ttft_ms or 0.0}
            row["total_ms"] = times.total_ms
        return row


def actor_properties(load_options: Mapping[str, Any], *, exact: bool) -> dict[str, Any]:
    """OpenVINO properties of an engine in an actor: float32 if `exact`, and as many threads as the actor has CPUs."""
    given: Mapping[str, Any] = load_options.get("ov_config") or {}
    threads: dict[str, Any] = {}
    if (cpus := _assigned_cpus()) is not None and _is_cpu(str(load_options.get("device") or "AUTO")):
        threads["INFERENCE_NUM_THREADS"] = max(1, int(cpus))  # Ray pins nothing; OpenVINO would take every core
    return {**(EXACT if exact else {}), **threads, **given}


def _assigned_cpus() -> float | None:
    """CPUs that Ray gave this actor; None outside of Ray, and for an actor that asked for none."""
    if "ray" not in sys.modules:
        return None
    import ray

    if not ray.is_initialized():
        return None
    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU")
    return float(cpus) if cpus else None


def _is_cpu(device: str) -> bool:
    if device.upper() == "AUTO":
        return all(found.kind == "CPU" for found in devices())
    return device.upper().startswith("CPU")


def _plain(value: Any) -> Any:
    """A value of a column without numpy's types. What a row or a struct lacks is None or NaN there: None, left out."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    elif isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain for key, item in value.items() if (plain := _plain(item)) is not None}
    return None if isinstance(value, float) and math.isnan(value) else value


def _role(message: object) -> object:
    return message.get("role") if isinstance(message, dict) else None


def _column(values: list[Any]) -> np.ndarray[Any, Any]:
    """A column of texts or numbers."""
    return np.array(values, dtype=object if values and isinstance(values[0], str) else None)
