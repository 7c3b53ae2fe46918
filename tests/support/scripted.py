"""An engine that follows a script, for what a real one cannot be made to do on demand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ov_phi3 import GenerationConfig, Pipeline
from ov_phi3.backends.protocol import Emit, EngineReport, Hypothesis, PrefixCache, Request


@dataclass
class ScriptedBackend:
    """Emits `steps`; where there is a `gate`, each step waits until the test lets it pass."""

    steps: Sequence[Sequence[int]] = ()
    gate: threading.Semaphore | None = None
    failure: BaseException | None = None
    before_step: Callable[[int], None] | None = None
    requests: list[Request] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    closed: bool = False
    prefix_cache: PrefixCache | None = None

    def lacks(self, config: GenerationConfig) -> str | None:
        return None

    def caches(self, request: Request) -> bool:
        return self.prefix_cache is not None

    def generate(self, request: Request, emit: Emit) -> EngineReport:
        self.requests.append(request)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            for index, step in enumerate(self.steps):
                if self.gate is not None:
                    assert self.gate.acquire(timeout=30), "the test never let the step pass"
                if self.before_step is not None:
                    self.before_step(index)
                if not emit(list(step)):
                    return EngineReport(hit_limit=False)
            if self.failure is not None:
                raise self.failure
            return EngineReport(hit_limit=True)
        finally:
            self.running -= 1

    def search(self, request: Request) -> list[Hypothesis]:
        self.requests.append(request)
        return [Hypothesis([i for step in self.steps for i in step], -0.5, False)]

    def render(self, chat_template: str, messages: Sequence[Mapping[str, str]]) -> str | None:
        return None

    def close(self) -> None:
        self.closed = True


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


WORD = 9690
"""An ordinary token of the demo model's vocabulary."""

MakePipe = Callable[..., tuple[Pipeline, ScriptedBackend]]
