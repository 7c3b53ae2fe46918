"""Replies, chats, saved caches and options on the emulated GPU.0: `python scripts/test.py --stage emulated`.

In float32 both devices give the same ids. With default settings the ids are those of the same calls without reuse.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lora import lora_tensors, write_adapter

import ov_phi3

pytestmark = pytest.mark.emulated

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
GREEDY = {"max_new_tokens": 8, "do_sample": False}
SYSTEM = "Answer in one word, and do not explain the answer."
BACKENDS = ["llm_pipeline", "infer_request"]
OWN = "infer_request"
LONG = "word " * 2500  # more than two chunks, and more than the cache has room for at first


@pytest.fixture(scope="module", autouse=True)
def gpu() -> None:
    if not os.environ.get("OV_PHI3_EMULATED_GPUS"):
        pytest.skip("needs the emulated GPU: python scripts/test.py --stage emulated")


@pytest.fixture(scope="module")
def load(gpu: None) -> Iterator[Callable[..., ov_phi3.Pipeline]]:
    """Load a model, or return the pipeline that an earlier call with the same arguments loaded."""
    with contextlib.ExitStack() as stack:
        loaded: dict[tuple[object, ...], ov_phi3.Pipeline] = {}

        def load(model: Path, device: str, backend: str, **config: Any) -> ov_phi3.Pipeline:
            key = (model, device, backend, *sorted(config.items()))
            if key not in loaded:
                pipe = ov_phi3.load(model, device=device, backend=backend, ov_config=config)
                loaded[key] = stack.enter_context(pipe)
            return loaded[key]

        yield load


def reply(pipe: ov_phi3.Pipeline, prompt: Any, **options: Any) -> list[int]:
    return list(pipe.generate(prompt, **{**GREEDY, **options}).token_ids)


def say(chat: ov_phi3.Chat, *texts: str) -> list[list[int]]:
    return [list(chat.send(text, **GREEDY).token_ids) for text in texts]


# -- the same ids as on the CPU ---------------------------------------------------------------------------------------


def a_long_prompt(pipe: ov_phi3.Pipeline) -> list[Any]:
    return [reply(pipe, "Hello"), reply(pipe, LONG), reply(pipe, LONG), reply(pipe, "Hello")]


def a_fork(pipe: ov_phi3.Pipeline) -> list[Any]:
    chat = pipe.chat(system=SYSTEM)
    first = say(chat, "First?", "Second?")
    branch = chat.fork()
    return [first, say(branch, "Third?"), say(chat, "Another third?"), say(branch, "Fourth?")]


def a_rewind(pipe: ov_phi3.Pipeline) -> list[Any]:
    chat = pipe.chat(system=SYSTEM)
    before = say(chat, "First?", "Second?")
    chat.rewind()
    return [before, say(chat, "Second, asked in another way?")]


def a_truncated_chat(pipe: ov_phi3.Pipeline) -> list[Any]:
    chat = pipe.chat(system=SYSTEM)
    before = say(chat, "First?", "Second?")
    kept = chat.truncate(len(chat.token_ids) - 5)
    return [before, kept, say(chat, "Third?")]


def two_chats(pipe: ov_phi3.Pipeline) -> list[Any]:
    return [say(pipe.chat(system=SYSTEM), question, "And then?") for question in ("First?", "Other first?", "First?")]


def switched_prefixes(pipe: ov_phi3.Pipeline) -> list[Any]:
    begins = [f"Text {number}: " + "some words " * 30 for number in range(3)]
    return [reply(pipe, begin + question) for question in ("Why?", "How?") for begin in begins]


REUSE = [a_fork, a_rewind, a_truncated_chat, two_chats, switched_prefixes]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("calls", [a_long_prompt, *REUSE])
def test_ids_are_those_of_the_cpu(
    load: Callable[..., ov_phi3.Pipeline],
    tiny_fp32: Path,
    backend: str,
    calls: Callable[[ov_phi3.Pipeline], list[Any]],
) -> None:
    assert calls(load(tiny_fp32, "GPU.0", backend, **EXACT)) == calls(load(tiny_fp32, "CPU", backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "seed": 7, "temperature": 0.9, "top_p": 0.95, "top_k": 40},
        {"repetition_penalty": 1.3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"regex": "[0-9]{3}-[0-9]{2}"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_give_the_ids_of_the_cpu(
    load: Callable[..., ov_phi3.Pipeline], tiny_fp32: Path, backend: str, options: dict[str, Any]
) -> None:
    if "regex" in options and backend == OWN:
        pytest.importorskip("llguidance")
    results = [
        load(tiny_fp32, *where, **config).generate("Count to ten.", **{**GREEDY, **options})
        for where, config in ((("GPU.0", backend), EXACT), (("CPU", backend), {}))
    ]
    assert results[0].token_ids == results[1].token_ids
    assert results[0].text == results[1].text


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("longrope", [64], indirect=True)
def test_longrope_on_both_sides_of_its_boundary_and_across(
    load: Callable[..., ov_phi3.Pipeline], longrope: tuple[Path, Path, int], backend: str
) -> None:
    path = longrope[0]

    def calls(pipe: ov_phi3.Pipeline) -> list[Any]:
        prompts = [list(range(5, 5 + length)) for length in (20, 50, 60, 64, 90)]
        options = {"max_new_tokens": 16, "ignore_eos": True}
        return [reply(pipe, prompt, **options) for prompt in prompts]

    assert calls(load(path, "GPU.0", backend, **EXACT)) == calls(load(path, "CPU", backend))


# -- default settings -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("calls", REUSE)
def test_default_settings_give_the_ids_of_the_same_calls_without_reuse(
    load: Callable[..., ov_phi3.Pipeline],
    tiny_fp32: Path,
    backend: str,
    calls: Callable[[ov_phi3.Pipeline], list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # In half precision later tokens of a model with random weights can be ties, which the size of a pass decides.
    monkeypatch.setitem(GREEDY, "max_new_tokens", 3)
    pipe = load(tiny_fp32, "GPU.0", backend)
    replies = calls(pipe)
    assert calls(pipe) == replies  # now everything is cached
    with ov_phi3.load(tiny_fp32, device="GPU.0", backend=backend) as fresh:
        assert calls(fresh) == replies


# -- saved caches -----------------------------------------------------------------------------------------------------


def in_a_process(code: str, *arguments: object) -> Any:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


CONTINUE = """
import json, sys, ov_phi3
model, device, config, chat, prefix = sys.argv[1:]
with ov_phi3.load(model, device=device, backend="infer_request", ov_config=json.loads(config)) as pipe:
    options = {"max_new_tokens": 8, "do_sample": False}
    turn = pipe.load_chat(chat).send("Third?", **options)
    after = pipe.generate("What follows?", prefix=pipe.load_prefix(prefix), **options)
    cached = [result.metrics.reused_tokens for result in (turn, after)]
    print(json.dumps([list(turn.token_ids), list(after.token_ids), cached]))
"""


@pytest.mark.parametrize("config", [{}, EXACT, *({"KV_CACHE_PRECISION": name} for name in ("i8", "u4"))], ids=str)
def test_saved_caches_in_another_process(
    load: Callable[..., ov_phi3.Pipeline], tiny_fp32: Path, tmp_path: Path, config: dict[str, Any]
) -> None:
    pipe = load(tiny_fp32, "GPU.0", OWN, **config)
    for words in (1, 4, 9):  # the last block is full to a different degree
        chat = pipe.chat(system="Answer" + " word" * words)
        say(chat, "First?")
        chat.save(tmp_path / "chat")
        turn = say(chat, "Third?")[0]
        prefix = pipe.prefill([{"role": "system", "content": "Answer" + " word" * words}])
        prefix.save(tmp_path / "prefix")
        after = reply(pipe, "What follows?", prefix=prefix)
        where = (tmp_path / "chat", tmp_path / "prefix")
        ids, prefixed, cached = in_a_process(CONTINUE, tiny_fp32, "GPU.0", json.dumps(config), *where)
        assert (ids, prefixed) == (turn, after)
        assert min(cached) > 0


def test_a_cache_of_the_other_device_is_refused_or_computed_again(
    load: Callable[..., ov_phi3.Pipeline], tiny_fp32: Path, tmp_path: Path
) -> None:
    pipes = [load(tiny_fp32, "GPU.0", OWN, **EXACT), load(tiny_fp32, "CPU", OWN)]
    for writer, reader in (pipes, pipes[::-1]):
        chat = writer.chat(system=SYSTEM)
        say(chat, "First?")
        chat.save(tmp_path / "chat")
        writer.prefill("A prefix").save(tmp_path / "prefix")
        assert say(reader.load_chat(tmp_path / "chat"), "Second?") == say(chat, "Second?")
        expected = reply(writer, "What follows?", prefix=writer.load_prefix(tmp_path / "prefix"))
        with pytest.warns(ov_phi3.ModelWarning, match="another memory layout"):
            prefix = reader.load_prefix(tmp_path / "prefix")
        assert reply(reader, "What follows?", prefix=prefix) == expected


# -- requests that end early, several at once, errors -----------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_cancel_and_timeout(load: Callable[..., ov_phi3.Pipeline], tiny_fp32: Path, backend: str) -> None:
    pipe = load(tiny_fp32, "GPU.0", backend, **EXACT)
    expected = reply(pipe, "Hello")
    stream = pipe.stream("Hello", max_new_tokens=2000, do_sample=False, ignore_eos=True)
    next(iter(stream))
    stream.cancel()
    assert stream.result.finish_reason == "cancelled"
    assert list(stream.result.token_ids[:8]) == expected[: len(stream.result.token_ids)]
    late = pipe.generate("Hello", timeout=0.2, max_new_tokens=2000, do_sample=False, ignore_eos=True)
    assert late.finish_reason == "timeout"
    prompts = [f"{number} {LONG}" for number in range(2)]
    stream = pipe.stream(prompts[0], **GREEDY)
    time.sleep(0.05)
    stream.cancel()  # within the prefill, unless it has ended by now
    assert stream.result.finish_reason in ("cancelled", "length", "stop")
    assert pipe.generate(prompts[1], timeout=0.01, **GREEDY).finish_reason == "timeout"
    cpu = load(tiny_fp32, "CPU", backend)
    assert [reply(pipe, prompt) for prompt in ("Hello", *prompts)] == [
        reply(cpu, prompt) for prompt in ("Hello", *prompts)
    ]


def test_an_adapter(tiny_fp32: Path, tiny_hf: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_hf / "config.json").read_text(encoding="utf-8"))
    lora = write_adapter(tmp_path / "lora", lora_tensors(config, strength=0.3))
    replies = []
    for device, adapters in (("GPU.0", lora), ("CPU", lora), ("CPU", None)):
        options: dict[str, Any] = {"backend": "infer_request", "ov_config": EXACT, "adapters": adapters}
        with ov_phi3.load(tiny_fp32, device=device, **options) as pipe:
            replies.append(reply(pipe, "Hi", max_new_tokens=24))
    assert replies[0] == replies[1] != replies[2]


def test_several_requests_at_once(load: Callable[..., ov_phi3.Pipeline], tiny_fp32: Path) -> None:
    prompts = ["One?", "Two words?", "Three words here? " * 40, "Four?"]
    cpu = load(tiny_fp32, "CPU", "infer_request")
    expected = [reply(cpu, prompt, max_new_tokens=24) for prompt in prompts]
    with ov_phi3.load(tiny_fp32, device="GPU.0", ov_config=EXACT, concurrency=3) as pipe:
        results: dict[int, list[int]] = {}

        def ask(number: int) -> None:
            results[number] = reply(pipe, prompts[number], max_new_tokens=24)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [results[number] for number in range(len(prompts))] == expected


def test_prompt_lookup(load: Callable[..., ov_phi3.Pipeline], tiny_fp32: Path) -> None:
    prompt = "one two three four one two three four one two"
    expected = reply(load(tiny_fp32, "CPU", "llm_pipeline"), prompt, max_new_tokens=16)
    config = {**EXACT, "prompt_lookup": True}
    with ov_phi3.load(tiny_fp32, device="GPU.0", ov_config=config) as pipe:
        options = {"num_assistant_tokens": 3, "max_ngram_size": 2}
        assert reply(pipe, prompt, max_new_tokens=16, **options) == expected


def test_what_cannot_work_is_refused_at_load(tiny_fp32: Path) -> None:
    for precision in ("u8", "i8", "u4"):
        config = {**EXACT, "KV_CACHE_PRECISION": precision}
        with pytest.raises(ov_phi3.ConfigError, match=f"KV_CACHE_PRECISION={precision} does not work on GPU.0"):
            ov_phi3.load(tiny_fp32, device="GPU.0", ov_config=config)
    with pytest.raises(ov_phi3.ConfigError, match="KEY_CACHE_PRECISION"):
        ov_phi3.load(tiny_fp32, device="GPU.0", ov_config={"KEY_CACHE_PRECISION": "u8"})
    with pytest.raises(ov_phi3.DeviceError, match="OpenVINO lists: .*GPU.0"):
        ov_phi3.load(tiny_fp32, device="GPU.7")
    with pytest.raises(ov_phi3.ConfigError, match="does not accept .*INFERENCE_PRECISION_HINT"):
        ov_phi3.load(tiny_fp32, device="GPU.0", ov_config={"INFERENCE_PRECISION_HINT": "f17"})


# -- compile cache and properties -------------------------------------------------------------------------------------


def test_compile_cache(load: Callable[..., ov_phi3.Pipeline], tiny_fp32: Path, tmp_path: Path) -> None:
    expected = reply(load(tiny_fp32, "GPU.0", "llm_pipeline", **EXACT), "Hello")
    for state in ("fresh", "verified"):
        with ov_phi3.load(tiny_fp32, device="GPU.0", ov_config={**EXACT, "CACHE_DIR": str(tmp_path)}) as pipe:
            assert pipe.load_report.cache == state
            assert reply(pipe, "Hello") == expected
    assert len([entry for entry in tmp_path.glob("gpu-*") if entry.is_dir()]) == 1


def test_the_library_asks_the_plugins_for_known_properties_only(
    tiny_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openvino

    asked: dict[str, str] = {}  # property to the plugin's error, or ""
    for kind in (openvino.Core, openvino.CompiledModel):
        real = kind.get_property

        def recorded(self: Any, *arguments: Any, _real: Callable[..., Any] = real) -> Any:
            try:
                value = _real(self, *arguments)
            except Exception as error:
                asked[" ".join(map(str, arguments))] = str(error) or type(error).__name__
                raise
            asked[" ".join(map(str, arguments))] = ""
            return value

        monkeypatch.setattr(kind, "get_property", recorded)
    checks = ov_phi3.diagnose(tiny_fp32, "GPU.0", canary=False)
    assert [check for check in checks if check.name == "gpu driver"] == []
    for device, config in (("GPU.0", EXACT), ("CPU", {})):
        for backend in BACKENDS:
            cache = str(tmp_path) if backend != OWN else ""
            with ov_phi3.load(
                tiny_fp32, device=device, backend=backend, ov_config={**config, "CACHE_DIR": cache}
            ) as pipe:
                assert pipe.device.kind == "CPU" or pipe.device.driver
                pipe.generate("Hello", max_new_tokens=2)
    assert "GPU.0 DEVICE_UUID" in asked or "GPU DEVICE_UUID" in asked
    assert {key: error for key, error in asked.items() if error} == {}
