"""Pipelines on a scripted backend."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from scripted import MakePipe, ScriptedBackend

from ov_phi3 import GenerationConfig, ModelInfo, Pipeline, Tokenizer
from ov_phi3.loading import LoadReport
from ov_phi3.system.devices import DeviceInfo


@pytest.fixture(scope="module")
def tokenizer(demo_int4: Path) -> Tokenizer:
    return Tokenizer(demo_int4)


@pytest.fixture
def make(demo_int4: Path, tokenizer: Tokenizer) -> Iterator[MakePipe]:
    made: list[Pipeline] = []

    def build(
        steps: Sequence[Sequence[int]] = (), *, window: int = 200, **options: Any
    ) -> tuple[Pipeline, ScriptedBackend]:
        backend = ScriptedBackend(steps, **options)
        pipe = Pipeline(
            info=ModelInfo.from_dir(demo_int4),
            tokenizer=tokenizer,
            device=DeviceInfo("CPU", "scripted", "CPU"),
            backend=backend,
            context_length=window,
            defaults=GenerationConfig(),
            load_report=LoadReport(0.0, 0.0, 0.0, "off", None, {}, "llm_pipeline"),
        )
        made.append(pipe)
        return pipe, backend

    yield build
    for pipe in made:
        pipe.close()
    assert not [t for t in threading.enumerate() if t.name == "ov_phi3-stream"]
