"""A backend that follows a script, and pipelines on it, for events that a real backend does not produce on demand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ov_phi3 import GenerationConfig, ModelInfo, Pipeline, Tokenizer
from ov_phi3.backends.protocol import BackendReport, Capabilities, Hypothesis, Request, TokenSink
from ov_phi3.engine.engine import Engine
from ov_phi3.engine.limits import Limits
from ov_phi3.engine.longrope import LongRope
from ov_phi3.engine.residency import ResidentBackend
from ov_phi3.engine.runner import Runner
from ov_phi3.kv.layout import KVLayout
from ov_phi3.kv.prefix_index import PrefixIndex
from ov_phi3.kv.sizing import KVCachePlan
from ov_phi3.load_report import LoadReport
from ov_phi3.system.devices import DeviceInfo

WORD = 9690
"""An ordinary token of the demo model's vocabulary."""


@dataclass
class ScriptedBackend:
    """Sends `steps` to the sink; with a `gate`, each step waits until the test releases it."""

    steps: Sequence[Sequence[int]] = ()
    gate: threading.Semaphore | None = None
    failure: BaseException | None = None
    before_step: Callable[[int], None] | None = None
    requests: list[Request] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    closed: bool = False
    prefix_index: PrefixIndex | None = None
    capabilities: Capabilities = field(default_factory=lambda: Capabilities("llm_pipeline"))
    needs_whole_prompts: bool = False
    kv_layout: str = ""
    warnings: list[str] = field(default_factory=list)
    draft_ms: float | None = None

    def unsupported(self, config: GenerationConfig) -> str | None:
        return None

    def uses_prefix_cache(self, request: Request) -> bool:
        return self.prefix_index is not None

    def generate(self, request: Request, sink: TokenSink) -> BackendReport:
        self.requests.append(request)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            for index, step in enumerate(self.steps):
                if self.gate is not None:
                    assert self.gate.acquire(timeout=30), "the test never released the step"
                if self.before_step is not None:
                    self.before_step(index)
                if not sink(list(step)):
                    return BackendReport(hit_limit=False)
            if self.failure is not None:
                raise self.failure
            return BackendReport(hit_limit=True)
        finally:
            self.running -= 1

    def generate_n(self, request: Request) -> list[Hypothesis]:
        self.requests.append(request)
        return [Hypothesis([i for step in self.steps for i in step], -0.5, False)]

    def score(self, request: Request, start: int, on_progress: Callable[[int], bool], chunk: int) -> list[float]:
        raise NotImplementedError

    def fits(self, entry: Any) -> bool:
        return False

    def compute_kv(self, request: Request) -> Any:
        raise NotImplementedError

    def import_kv(self, entry: Any) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.closed = True


def scripted_pipeline(
    model_dir: Path,
    tokenizer: Tokenizer,
    backend: ScriptedBackend,
    *,
    window: int = 200,
    long_rope: LongRope | None = None,
    chunk: int = 0,
    concurrency: int = 1,
) -> Pipeline:
    """A pipeline on a scripted backend, built as `load` builds one.

    Args:
        model_dir: the model whose `ModelInfo` it has.
        tokenizer: the tokenizer.
        backend: the backend.
        window: context length in tokens.
        long_rope: the LongRoPE policy; default: no boundary.
        chunk: prompt tokens per chunk of the prefill.
        concurrency: requests that run at once.
    """
    info = ModelInfo.from_dir(model_dir)
    policy = long_rope or LongRope()
    engine = Engine(
        info,
        tokenizer,
        Runner(ResidentBackend(backend, lambda: backend), policy, chunk),
        Limits(GenerationConfig(), window, "", info.vocab_size, policy, backend.prefix_index),
        KVCachePlan(KVLayout(32), 0, window, paged=False),
        concurrency=concurrency,
    )
    report = LoadReport(0.0, 0.0, 0.0, "off", None, {}, backend.capabilities.name)
    return Pipeline(engine=engine, tokenizer=tokenizer, device=DeviceInfo("CPU", "scripted", "CPU"), load_report=report)


def steps_of(tokenizer: Tokenizer, text: str) -> list[list[int]]:
    """Steps of one token each that spell a text."""
    return [[token] for token in tokenizer.encode(text).tolist()]


def forever(ids: Sequence[int]) -> Sequence[Sequence[int]]:
    """Steps without an end."""

    class Endless(Sequence[Sequence[int]]):
        def __len__(self) -> int:
            return 1_000_000

        def __getitem__(self, index: object) -> Sequence[int]:  # type: ignore[override]
            return ids

        def __iter__(self) -> Iterator[Sequence[int]]:
            while True:
                yield ids

    return Endless()


MakePipe = Callable[..., tuple[Pipeline, ScriptedBackend]]


class Clock:
    """The clock of all time stamps, which stands still until a test sets it.

    Args:
        monkeypatch: undoes it at the end of the test.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        for name in ("ov_phi3.engine.worker.now", "ov_phi3.pipeline.now", "ov_phi3.chat.now"):
            monkeypatch.setattr(name, lambda: self.now)
