"""`Pipeline.score`: equal to the log-probabilities of the recomputed model."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from reference import Reference

import ov_phi3
from ov_phi3 import ContextOverflowError, Pipeline, PromptError


@pytest.fixture(scope="module")
def reference(demo_hf: Path) -> Reference:
    return Reference(demo_hf)


class TestScore:
    def test_equals_the_references(self, loop: Pipeline, reference: Reference) -> None:
        import torch

        ids = loop.encode("What is the capital of Japan?").tolist()
        new = loop.tokenizer.encode("The capital of Japan is Tokyo, a city of many millions.").tolist()
        with torch.no_grad():
            logits = reference._model(torch.tensor([[*ids, *new]]), use_cache=False).logits[0].double()
        rows = torch.log_softmax(logits, -1)[len(ids) - 1 : -1]
        expected = rows[torch.arange(len(new)), torch.tensor(new)].tolist()
        for prompt, continuation in ((ids, new), ("What is the capital of Japan?", new)):
            score = loop.score(prompt, continuation)
            assert score.logprobs == pytest.approx(expected, abs=2e-3)
            assert score.total == pytest.approx(sum(expected), abs=1e-2)
            assert score.perplexity == pytest.approx(math.exp(-sum(expected) / len(expected)), rel=1e-3)
        text = "The capital of Japan is Tokyo, a city of many millions."
        assert loop.score(ids, text).token_ids == new

    def test_in_chunks_and_after_a_prefix(self, demo_fp32: Path, device: str, loop: Pipeline) -> None:
        draw = np.random.default_rng(2)
        ids, new = draw.integers(100, 40_000, 150), draw.integers(100, 40_000, 130)
        expected = loop.score(ids, new)
        with ov_phi3.load(demo_fp32, device=device, backend="infer_request", prefill_chunk=40) as pipe:
            assert pipe.score(ids, new).logprobs == pytest.approx(expected.logprobs, abs=1e-3)
            prefix = pipe.prefill(ids[:100])
            assert pipe.score(ids[100:], new, prefix=prefix).logprobs == pytest.approx(expected.logprobs, abs=1e-3)
        assert loop.score(ids, new[:1]).logprobs == pytest.approx(expected.logprobs[:1], abs=1e-3)

    def test_across_the_longrope_boundary(self, longrope: tuple[Path, Path, int], device: str) -> None:
        import torch

        boundary = longrope[2]
        reference = Reference(longrope[1], boundary)
        ids = np.random.default_rng(4).integers(300, 31_000, boundary + 30).tolist()
        start = boundary - 20
        expected = []
        with torch.no_grad():
            for at in range(start, len(ids)):
                row = reference._model(torch.tensor([ids[:at]]), use_cache=False).logits[0, -1].double()
                expected.append(float(torch.log_softmax(row, -1)[ids[at]]))
        with ov_phi3.load(longrope[0], device=device, backend="infer_request", prefill_chunk=16) as pipe:
            assert pipe.score(ids[:start], ids[start:]).logprobs == pytest.approx(expected, abs=2e-3)

    def test_refusals(self, loop: Pipeline) -> None:
        with pytest.raises(PromptError, match="continuation is empty"):
            loop.score("x", "")
        with pytest.raises(ContextOverflowError):
            loop.score("x", np.full(loop.context_length, 100))
