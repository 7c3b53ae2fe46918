"""What tests see of our own engine: its passes, its blocks, and copies between them."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from ov_phi3 import Pipeline
from ov_phi3.backends.paged.block_manager import BlockManager
from ov_phi3.backends.paged.kv_tensors import KVTensorPool
from ov_phi3.backends.paged.model_runner import ModelRunner


def blocks_of(pipe: Pipeline) -> BlockManager:
    """The block manager of a pipeline, which no sequence uses at the moment."""
    for thread in threading.enumerate():
        if thread.name == "ov_phi3-engine":
            thread.join()
    backend: Any = pipe.engine.check_open()
    blocks: BlockManager = backend._backend._engine.blocks
    blocks.check([])
    return blocks


def evict_all(pipe: Pipeline) -> None:
    """Empty the prefix cache."""
    blocks = blocks_of(pipe)
    blocks.forget(list(blocks._cached))


class Copies:
    """Counts the blocks that are written: copied from another one, or from an entry.

    Attributes:
        written: number of blocks.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.written = 0
        real = KVTensorPool.write

        def write(pool: KVTensorPool, blocks: Any, contents: Any) -> None:
            self.written += len(blocks)
            real(pool, blocks, contents)

        monkeypatch.setattr(KVTensorPool, "write", write)


class Passes:
    """Records the passes over the model.

    Attributes:
        tokens: number of tokens of each pass.
        rows: rows of logits of each pass.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens: list[int] = []
        self.rows: list[int] = []
        real = ModelRunner.run

        def run(runner: ModelRunner, step: Any, *args: Any) -> Any:
            self.tokens.append(sum(part.count for part in step))
            logits = real(runner, step, *args)
            self.rows.append(len(logits))
            return logits

        monkeypatch.setattr(ModelRunner, "run", run)
