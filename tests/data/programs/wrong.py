"""Mistakes that mypy --strict and pyright find: one on each line that is marked, and none elsewhere."""

from __future__ import annotations

from typing import Literal

import ov_phi3


def options(pipe: ov_phi3.Pipeline, chat: ov_phi3.Chat) -> None:
    pipe.generate("Hello", temprature=0.5)  # wrong
    pipe.generate("Hello", max_new_tokens="12")  # wrong
    pipe.stream("Hello", speculation="always")  # wrong
    pipe.generate_many(["Hello"], timeout="5")  # wrong
    pipe.generate_many(["Hello"], on_prefill=print)  # wrong
    pipe.generate("Hello", streamer=print)  # wrong
    chat.send("Hello", top_k=0.5)  # wrong
    chat.stream("Hello", on_cancel="keeps")  # wrong
    ov_phi3.GenerationConfig(temprature=0.5)  # wrong
    ov_phi3.GenerationConfig(stop_criteria="soon")  # wrong
    ov_phi3.GenerationConfig().replace(seed="one")  # wrong
    ov_phi3.GenerationOptions(max_tokens=12)  # wrong


def arguments(pipe: ov_phi3.Pipeline) -> None:
    ov_phi3.load("model", backend="lm_pipeline")  # wrong
    ov_phi3.load("model", "CPU", "infer_request")  # wrong
    ov_phi3.export("source", "model", "int5")  # wrong
    ov_phi3.export("source", "model", group_siz=64)  # wrong
    ov_phi3.export("source", "model", weight_format="int3")  # wrong
    pipe.chat(overflow="drop_newest")  # wrong
    pipe.generate("Hello", tool_choice="always")  # wrong
    pipe.generate(12)  # wrong
    ov_phi3.measure(pipe, ends="later")  # wrong


def results(pipe: ov_phi3.Pipeline) -> None:
    result = pipe.generate("Hello")
    print(result.tokens)  # wrong
    print(result.metrics.ttft)  # wrong
    reason: Literal["eos"] = result.finish_reason  # wrong
    print(reason)
    print(ov_phi3.nosuch)  # wrong
    print(ov_phi3.backend)  # wrong
    for chunk in pipe.stream("Hello"):
        print(chunk.upper())  # wrong
