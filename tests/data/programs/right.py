"""Programs that use the library as its pages say: mypy --strict and pyright find nothing here."""

from __future__ import annotations

import asyncio
import typing
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np

import ov_phi3
from ov_phi3 import GenerationConfig, GenerationOptions, Prompt


def ask(pipe: ov_phi3.Pipeline, prompt: Prompt, **options: typing.Any) -> str:
    config = GenerationConfig(max_new_tokens=64, temperature=0.5, stop=["\n\n"], stop_criteria="early")
    result = pipe.generate(prompt, config.replace(top_p=0.9), timeout=3, **options)
    reason: ov_phi3.FinishReason = result.finish_reason
    first_token: float | None = result.metrics.ttft_ms
    print(reason, first_token, [call.arguments for call in result.tool_calls])
    return result.text


def shared_options(pipe: ov_phi3.Pipeline) -> None:
    options: GenerationOptions = {"max_new_tokens": 12, "seed": 1, "speculation": "auto"}
    pipe.generate("Hello", **options)
    pipe.chat().send("Hello", **options)


def every_kind_of_prompt(pipe: ov_phi3.Pipeline) -> None:
    messages: list[ov_phi3.Message] = [{"role": "user", "content": "Hello"}]
    prompts: list[Prompt] = ["Hello", ov_phi3.Raw("<|user|>Hello<|end|>"), messages, [1, 2, 3], np.arange(4)]
    for index, outcome in pipe.generate_many(prompts, max_new_tokens=8, timeout=5.0):
        if isinstance(outcome, ov_phi3.Error):
            print(index, outcome)
        else:
            print(index, outcome.text)
    rows: list[ov_phi3.Row] = [("Hello", {"seed": 1}), {"prompt": "Hello", "max_new_tokens": 2}]
    pipe.generate_many(rows).results()
    pipe.generate([{"role": "user", "content": "Hello"}])


def stream(pipe: ov_phi3.Pipeline, prompt: Prompt) -> Iterator[str]:
    for chunk in pipe.stream(prompt, on_prefill=lambda done, total: print(done, total), top_logprobs=2):
        print([entry.logprob for entry in chunk.logprobs])
        yield chunk.text


async def stream_in_a_loop(pipe: ov_phi3.Pipeline, prompt: Prompt) -> AsyncIterator[str]:
    async with pipe.stream(prompt, logit_bias={1: -1.0}) as chunks:
        async for chunk in chunks:
            yield chunk.text


def chat(pipe: ov_phi3.Pipeline, overflow: ov_phi3.Overflow) -> int:
    conversation = pipe.chat(system="Be brief.", overflow=overflow, on_cancel="drop")
    conversation.send("Hello", tool_choice="none")
    return pipe.load_chat(Path("chat.kv")).save("chat.kv") + conversation.kv.cached_tokens


def structured(pipe: ov_phi3.Pipeline) -> object:
    schema = {"type": "object", "properties": {"name": {"type": "string"}}}
    return pipe.generate("Invent a name.", json_schema=schema, json_whitespace=True).parsed


def export(recipe: ov_phi3.RecipeName | None = None) -> ov_phi3.ModelInfo:
    return ov_phi3.export("source", Path("model"), recipe or "int4", group_size=64, awq=True, dataset="wikitext2")


def last_word(ids: ov_phi3.Ids, logits: np.ndarray[typing.Any, np.dtype[np.float32]]) -> object:
    logits[ids[-1]] = -np.inf
    return logits


def run(model_dir: str) -> None:
    backend: ov_phi3.BackendName = "infer_request"
    with ov_phi3.load(model_dir, device="CPU", backend=backend, ov_config={"NUM_STREAMS": 1}) as pipe:
        print(ask(pipe, "Hello", logits_processors=[last_word]), pipe.info.family, list(stream(pipe, "Hello")))
        report = ov_phi3.measure(pipe, prompt_tokens=[32], repeat=3)
        print(report.measurements[0].ttft_ms)

        async def collect() -> list[str]:
            return [text async for text in stream_in_a_loop(pipe, "Hello")]

        print(asyncio.run(collect()))


def checked() -> None:
    for check in ov_phi3.diagnose():
        status: ov_phi3.CheckStatus = check.status
        print(status, [device.name for device in ov_phi3.devices()], ov_phi3.__version__)
