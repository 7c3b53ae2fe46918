"""LoRA adapters that `load` applies: the same greedy ids as the weights with the adapter in them, in float32."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora import lora_tensors, write_adapter

import ov_phi3
from ov_phi3 import ConfigError, ModelError, SnapshotError

PROMPT = "What is the capital of France?"
NEW = 16
BACKENDS = ("llm_pipeline", "infer_request")


@pytest.fixture(scope="module")
def lora(demo_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = json.loads((demo_hf / "config.json").read_text(encoding="utf-8"))
    return write_adapter(tmp_path_factory.mktemp("lora") / "lora", lora_tensors(config))


@pytest.fixture(scope="module")
def tiny_lora(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = json.loads((tiny_hf / "config.json").read_text(encoding="utf-8"))
    return write_adapter(tmp_path_factory.mktemp("lora") / "tiny", lora_tensors(config, strength=0.3))


@pytest.fixture(scope="module")
def reference(demo_hf: Path, lora: Path, demo_tokenizer: ov_phi3.Tokenizer) -> Callable[[float], list[int]]:
    """A function from a strength to greedy ids, by transformers with W + strength * 3 * B A in its weights."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file

    model = transformers.AutoModelForCausalLM.from_pretrained(demo_hf, dtype=torch.float32)
    parameters, tensors = dict(model.named_parameters()), load_file(lora / "adapter_model.safetensors")
    prompt = demo_tokenizer.encode_messages([{"role": "user", "content": PROMPT}]).tolist()

    def add(factor: float) -> None:
        for name, b in tensors.items():
            if name.endswith("lora_B.weight"):
                a = tensors[name.replace("lora_B", "lora_A")]
                target = name.removeprefix("base_model.model.").replace("lora_B.", "")
                parameters[target].data += factor * (b @ a)

    def ids(strength: float) -> list[int]:
        add(3.0 * strength)
        try:
            with torch.no_grad():
                reply, tokens, cache = [], prompt, None
                for _ in range(NEW):
                    out = model(torch.tensor([tokens]), past_key_values=cache, use_cache=True)
                    tokens, cache = [int(out.logits[0, -1].argmax())], out.past_key_values
                    reply += tokens
            return reply
        finally:
            add(-3.0 * strength)

    return functools.cache(ids)


def greedy(model: Path, device: str, **options: object) -> list[int]:
    with ov_phi3.load(model, device=device, **options) as pipe:  # type: ignore[arg-type]
        first = pipe.generate(PROMPT, max_new_tokens=NEW, do_sample=False, ignore_eos=True).token_ids
        again = pipe.generate(PROMPT, max_new_tokens=NEW, do_sample=False, ignore_eos=True).token_ids
    assert list(first) == list(again)
    return list(first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_adapter_gives_the_ids_of_changed_weights(
    demo_fp32: Path, device: str, lora: Path, reference: Callable[[float], list[int]], backend: str
) -> None:
    assert len({tuple(reference(strength)) for strength in (1.0, 0.0, -1.0)}) == 3
    assert greedy(demo_fp32, device, backend=backend, adapters=lora) == reference(1.0)
    assert greedy(demo_fp32, device, backend=backend, adapters={lora: -1.0}) == reference(-1.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_adapters_add_up(
    demo_fp32: Path, device: str, lora: Path, tmp_path: Path, reference: Callable[[float], list[int]], backend: str
) -> None:
    config = json.loads((lora / "adapter_config.json").read_text(encoding="utf-8"))
    from safetensors.numpy import load_file

    copy = write_adapter(tmp_path / "copy", load_file(lora / "adapter_model.safetensors"), **{**config, "r": 4})
    assert greedy(demo_fp32, device, backend=backend, adapters={lora: 0.25, copy: 0.75}) == reference(1.0)


def test_a_bare_file_needs_its_scale(
    demo_fp32: Path, device: str, lora: Path, tmp_path: Path, reference: Callable[[float], list[int]]
) -> None:
    file = tmp_path / "bare.safetensors"
    file.write_bytes((lora / "adapter_model.safetensors").read_bytes())
    with pytest.raises(ConfigError, match=r"lora_alpha / r"):
        ov_phi3.load(demo_fp32, device=device, adapters=file)
    with ov_phi3.load(demo_fp32, device=device, backend="infer_request", adapters={file: 3.0}) as pipe:
        assert pipe.generate(PROMPT, max_new_tokens=NEW, do_sample=False).token_ids == reference(1.0)
        [report] = pipe.load_report.adapters
        assert (report.path, report.factor) == (file, 3.0)


def test_an_adapter_without_paged_attention(
    demo_fp32: Path, device: str, lora: Path, reference: Callable[[float], list[int]]
) -> None:
    assert greedy(demo_fp32, device, adapters=lora, ov_config={"ATTENTION_BACKEND": "SDPA"}) == reference(1.0)


def test_several_requests_at_once_have_the_adapter(
    demo_fp32: Path, device: str, lora: Path, reference: Callable[[float], list[int]]
) -> None:
    with ov_phi3.load(demo_fp32, device=device, adapters=lora, concurrency=3) as pipe:
        assert pipe.load_report.backend == "infer_request"
        batch = pipe.generate_many([PROMPT, "One?", PROMPT, "Two?", PROMPT], max_new_tokens=NEW, do_sample=False)
        replies = batch.results()
    assert [list(replies[number].token_ids) for number in (0, 2, 4)] == [reference(1.0)] * 3


def test_after_an_unload_the_adapter_is_applied_again(
    demo_fp32: Path, device: str, lora: Path, reference: Callable[[float], list[int]]
) -> None:
    with ov_phi3.load(demo_fp32, device=device, backend="infer_request", adapters=lora) as pipe:
        pipe.unload()
        assert pipe.generate(PROMPT, max_new_tokens=NEW, do_sample=False).token_ids == reference(1.0)


def test_an_adapter_that_changed_while_the_model_was_unloaded(
    tiny_fp32: Path, tiny_hf: Path, device: str, tmp_path: Path
) -> None:
    config = json.loads((tiny_hf / "config.json").read_text(encoding="utf-8"))
    lora = write_adapter(tmp_path / "lora", lora_tensors(config))
    before = {path: path.read_bytes() for path in lora.iterdir()}
    with ov_phi3.load(tiny_fp32, device=device, backend="infer_request", adapters=lora) as pipe:
        expected = pipe.generate(PROMPT, max_new_tokens=NEW, do_sample=False).token_ids
        pipe.unload()
        write_adapter(lora, lora_tensors(config, seed=1))
        with pytest.raises(ModelError, match="has changed since the model was loaded"):
            pipe.generate(PROMPT, max_new_tokens=NEW, do_sample=False)
        for path, data in before.items():
            path.write_bytes(data)
        assert pipe.generate(PROMPT, max_new_tokens=NEW, do_sample=False).token_ids == expected


def test_an_adapter_of_a_longrope_model(longrope: tuple[Path, Path, int], device: str, tmp_path: Path) -> None:
    model, source, boundary = longrope
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    lora = write_adapter(tmp_path / "lora", lora_tensors(config, strength=0.2))
    prompt = np.arange(8, boundary - 4) % 100 + 10
    pipes: list[dict[str, Any]] = [
        {"adapters": lora},
        {"adapters": lora, "ov_config": {"ATTENTION_BACKEND": "SDPA"}},
        {"adapters": lora, "backend": "infer_request"},
        {},
    ]
    replies = []
    for options in pipes:
        with ov_phi3.load(model, device=device, **options) as pipe:
            replies.append(pipe.generate(prompt, max_new_tokens=12, do_sample=False, ignore_eos=True).token_ids)
    assert replies[0] == replies[1] == replies[2] != replies[3]


def test_saved_keys_belong_to_their_adapters(tiny_fp32: Path, device: str, tiny_lora: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "ignore_eos": True}

    def opened(adapters: dict[Path, float] | None) -> ov_phi3.Pipeline:
        return ov_phi3.load(tiny_fp32, device=device, backend="infer_request", adapters=adapters)

    with opened({tiny_lora: 1.0}) as pipe:
        pipe.prefill("Paris is").save(tmp_path / "prefix.kv")
        chat = pipe.chat()
        chat.send("Hi", **options)
        chat.save(tmp_path / "chat.kv")
        expected = chat.send("More", **options).token_ids
    with opened({tiny_lora: 1.0}) as pipe:
        assert pipe.load_prefix(tmp_path / "prefix.kv")
        again = pipe.load_chat(tmp_path / "chat.kv").send("More", **options)
        assert again.token_ids == expected
        assert again.metrics.reused_tokens
    for other in (None, {tiny_lora: 0.5}):
        with opened(other) as pipe:
            with pytest.raises(SnapshotError, match="of a pipeline with other LoRA adapters: adapters is '.* times 3'"):
                pipe.load_prefix(tmp_path / "prefix.kv")
            moved = pipe.load_chat(tmp_path / "chat.kv").send("More", **options)
            assert not moved.metrics.reused_tokens
            assert moved.token_ids == pipe.generate(moved.prompt_token_ids, **options).token_ids != expected


def test_compiled_models_are_kept_apart_by_adapter(
    demo_fp32: Path, device: str, lora: Path, tmp_path: Path, reference: Callable[[float], list[int]]
) -> None:
    cache = {"CACHE_DIR": str(tmp_path / "cache"), "ATTENTION_BACKEND": "SDPA"}
    for _ in range(2):
        assert greedy(demo_fp32, device, ov_config=cache, adapters=lora) == reference(1.0)
    assert greedy(demo_fp32, device, ov_config=cache, adapters={lora: -1.0}) == reference(-1.0)
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 2


def test_what_load_refuses(demo_int4: Path, device: str, lora: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"load\(adapters="):
        ov_phi3.load(demo_int4, device=device, ov_config={"adapters": lora})
    with pytest.raises(ConfigError, match="finite"):
        ov_phi3.load(demo_int4, device=device, adapters={lora: float("nan")})
    with pytest.raises(ConfigError, match="twice"):
        ov_phi3.load(demo_int4, device=device, adapters=[lora, lora])
    for wrong in (3, [3], {lora: "1"}, {lora: True}):
        with pytest.raises(TypeError, match="adapters"):
            ov_phi3.load(demo_int4, device=device, adapters=wrong)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="does not exist"):
        ov_phi3.load(demo_int4, device=device, adapters=tmp_path / "nothing")


def test_an_adapter_of_another_model(tiny_fp32: Path, device: str, lora: Path) -> None:
    with pytest.raises(ModelError, match=r"It was trained on another model|the model has"):
        ov_phi3.load(tiny_fp32, device=device, adapters=lora)
