"""The reply of one stack, in a process for ``edge.py``: prints when the first text arrives, and the memory in use.

    python edge_stacks.py ov_phi3 MODEL DEVICE

Only the modules of the stack are imported. All stacks do the same: a chat message in the template of the model, and a
greedy reply of 64 tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

QUESTION = "Explain in a few words what a lighthouse is, who looks after it, and why ships need it at night. " * 10
NEW_TOKENS = 64
PROPERTIES = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1", "CACHE_DIR": ""}

_first = True


def emit(text: str) -> None:
    """Receive a part of the reply; report the first one to the parent process at once."""
    global _first
    if _first and text:
        print("first", flush=True)
        _first = False


def ov_phi3(model: str, device: str, backend: str = "llm_pipeline") -> tuple[int, object]:
    """Reply with this library; return the number of tokens, and the object that keeps the model loaded."""
    import ov_phi3

    pipe = ov_phi3.load(model, device=device, backend=backend)
    stream = pipe.stream(QUESTION, max_new_tokens=NEW_TOKENS, do_sample=False, ignore_eos=True)
    for chunk in stream:
        emit(chunk.text)
    return len(stream.result.token_ids), pipe


def ov_phi3_own_loop(model: str, device: str) -> tuple[int, object]:
    """The same on the library's own engine."""
    return ov_phi3(model, device, "infer_request")


def openvino_genai(model: str, device: str) -> tuple[int, object]:
    """The same with OpenVINO GenAI, without this library."""
    import openvino_genai as genai

    pipe = genai.LLMPipeline(model, device, **PROPERTIES)
    config = pipe.get_generation_config()
    config.max_new_tokens, config.do_sample, config.ignore_eos = NEW_TOKENS, False, True

    def streamer(text: str) -> Any:
        emit(text)
        return genai.StreamingStatus.RUNNING

    result = pipe.generate(genai.ChatHistory([{"role": "user", "content": QUESTION}]), config, streamer)
    return int(result.perf_metrics.get_num_generated_tokens()), pipe


def cookbook(model: str, device: str) -> tuple[int, object]:
    """The same with the cookbook's stack: optimum-intel, transformers and torch."""
    from optimum.intel import OVModelForCausalLM
    from transformers import AutoTokenizer
    from transformers.generation.streamers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002
            emit(text)

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = OVModelForCausalLM.from_pretrained(model, device=device, ov_config=PROPERTIES)
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    bounds = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    out = network.generate(**prompt, **bounds, streamer=Streamer(tokenizer, skip_prompt=True))
    return int(out.shape[1] - prompt["input_ids"].shape[1]), network


def memory() -> dict[str, int] | None:
    """Current and peak memory of this process in bytes; None without /proc (on other systems than Linux)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
    return {"steady": int(lines["VmRSS"].split()[0]) * 1024, "peak": int(lines["VmHWM"].split()[0]) * 1024}


if __name__ == "__main__":
    stack = {"ov_phi3": ov_phi3, "own_loop": ov_phi3_own_loop, "openvino_genai": openvino_genai, "cookbook": cookbook}
    tokens, loaded = stack[sys.argv[1]](sys.argv[2], sys.argv[3])
    print(json.dumps({"tokens": tokens, "memory": memory()}), flush=True)
