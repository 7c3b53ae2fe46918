"""What the library adds to raw OpenVINO GenAI: first-token and per-token latency of both on the same ids, in one run.

    python benchmarks/overhead.py MODEL --device CPU --json overhead.json

Both run `openvino_genai.LLMPipeline` with the same properties. The raw one is given a streamer that does nothing but
take the time; `ov_phi3` decodes, looks for stop strings and hands every chunk to a consumer in another thread. Each
pair of replies has a prompt of its own, drawn anew, and its order is swapped from pair to pair, so that neither a
prefix cache nor a drift of the machine's speed favours one side. The ratio of a pair is compared, and the median of
the ratios told.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from importlib import metadata
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import openvino as ov
import openvino_genai

import ov_phi3


class Stamps(openvino_genai.StreamerBase):  # type: ignore[misc]
    """Takes the time of every token."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def write(self, token: Any) -> Any:
        """One step's tokens."""
        self.times += [time.perf_counter()] * (len(token) if isinstance(token, list) else 1)
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        """Nothing is left to do."""


def raw(pipe: Any, ids: list[int], new_tokens: int) -> tuple[float, float, list[int]]:
    """TTFT and TPOT in milliseconds, and the ids, of raw GenAI."""
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.apply_chat_template = new_tokens, True, False
    stamps = Stamps()
    begun = time.perf_counter()
    out = pipe.generate(ov.Tensor([ids]), config, stamps)
    t = stamps.times
    return (t[0] - begun) * 1000, (t[-1] - t[0]) * 1000 / (len(t) - 1), list(out.tokens[0])


def ours(pipe: ov_phi3.Pipeline, ids: list[int], new_tokens: int) -> tuple[float, float, list[int]]:
    """The same of `ov_phi3`, read as a user reads it."""
    stream = pipe.stream(ids, max_new_tokens=new_tokens, ignore_eos=True, do_sample=False)
    for _ in stream:
        pass
    metrics = stream.result.metrics
    assert metrics.ttft_ms is not None
    assert metrics.tpot_ms is not None
    return metrics.ttft_ms, metrics.tpot_ms, stream.result.token_ids


def main() -> None:
    """Measure, print, and write the samples if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="CPU")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--json", type=Path, help="write every sample here")
    args = parser.parse_args()

    mine = ov_phi3.load(args.model, device=args.device)
    theirs = openvino_genai.LLMPipeline(str(args.model), mine.device.name, **mine.load_report.ov_config)
    rng = random.Random(0)
    special = set(mine.tokenizer.control_tokens.values())
    ordinary = [i for i in range(mine.tokenizer.vocab_size) if i not in special]
    samples = []
    for pair in range(-2, args.pairs):  # two pairs of warm-up
        ids = rng.choices(ordinary, k=args.prompt_tokens)
        sides = [("ov_phi3", lambda i=ids: ours(mine, i, args.new_tokens))]
        sides.append(("raw", lambda i=ids: raw(theirs, i, args.new_tokens)))
        results = {name: run() for name, run in (sides if pair % 2 else reversed(sides))}
        assert results["ov_phi3"][2] == results["raw"][2], "the two gave different ids"
        if pair >= 0:
            samples.append({name: {"ttft_ms": r[0], "tpot_ms": r[1]} for name, r in results.items()})
    print(f"{mine.device}, {args.prompt_tokens} prompt tokens, {args.new_tokens} new, {args.pairs} pairs, equal ids")
    for key in ("ttft_ms", "tpot_ms"):
        ratios = [s["ov_phi3"][key] / s["raw"][key] for s in samples]
        low, _, high = quantiles(ratios, n=4)
        a, b = (median(s[name][key] for s in samples) for name in ("ov_phi3", "raw"))
        print(f"{key:8} ov_phi3 {a:8.2f}  raw {b:8.2f}  ratio {median(ratios):.3f} (quartiles {low:.3f} to {high:.3f})")
    if args.json:
        about = {"device": mine.device.full_name, "platform": platform.platform(), "versions": _versions()}
        args.json.write_text(
            json.dumps({**about, "arguments": {k: str(v) for k, v in vars(args).items()}, "samples": samples})
        )
    mine.close()


def _versions() -> dict[str, str]:
    return {n: metadata.version(n) for n in ("ov-phi3", "openvino", "openvino-genai", "openvino-tokenizers")}


if __name__ == "__main__":
    main()
