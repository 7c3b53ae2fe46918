"""LoRA adapters that `load` applies: the same greedy ids as the weights with the adapter in them, in float32."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from lora import lora_tensors, write_adapter

import ov_phi3
from ov_phi3 import ConfigError, ModelError

PROMPT = "What is the capital of France?"
NEW = 16


@pytest.fixture(scope="module")
def lora(demo_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = json.loads((demo_hf / "config.json").read_text(encoding="utf-8"))
    return write_adapter(tmp_path_factory.mktemp("lora") / "lora", lora_tensors(config))


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


def test_an_adapter_gives_the_ids_of_changed_weights(
    demo_fp32: Path, device: str, lora: Path, reference: Callable[[float], list[int]]
) -> None:
    assert len({tuple(reference(strength)) for strength in (1.0, 0.0, -1.0)}) == 3
    assert greedy(demo_fp32, device, adapters=lora) == reference(1.0)
    assert greedy(demo_fp32, device, adapters={lora: -1.0}) == reference(-1.0)


def test_several_adapters_add_up(
    demo_fp32: Path, device: str, lora: Path, tmp_path: Path, reference: Callable[[float], list[int]]
) -> None:
    config = json.loads((lora / "adapter_config.json").read_text(encoding="utf-8"))
    from safetensors.numpy import load_file

    copy = write_adapter(tmp_path / "copy", load_file(lora / "adapter_model.safetensors"), **{**config, "r": 4})
    assert greedy(demo_fp32, device, adapters={lora: 0.25, copy: 0.75}) == reference(1.0)


def test_a_bare_file_needs_its_scale(
    demo_fp32: Path, device: str, lora: Path, tmp_path: Path, reference: Callable[[float], list[int]]
) -> None:
    file = tmp_path / "bare.safetensors"
    file.write_bytes((lora / "adapter_model.safetensors").read_bytes())
    with pytest.raises(ConfigError, match=r"lora_alpha / r"):
        ov_phi3.load(demo_fp32, device=device, adapters=file)
    assert greedy(demo_fp32, device, adapters={file: 3.0}) == reference(1.0)


@pytest.mark.parametrize("options", [{"concurrency": 2}, {"ov_config": {"ATTENTION_BACKEND": "SDPA"}}])
def test_an_adapter_with_other_kinds_of_pipelines(
    demo_fp32: Path, device: str, lora: Path, reference: Callable[[float], list[int]], options: dict[str, object]
) -> None:
    assert greedy(demo_fp32, device, adapters=lora, **options) == reference(1.0)


def test_an_adapter_of_a_longrope_model(longrope: tuple[Path, Path, int], device: str, tmp_path: Path) -> None:
    model, source, boundary = longrope
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    lora = write_adapter(tmp_path / "lora", lora_tensors(config, strength=0.2))
    prompt = np.arange(8, boundary - 4) % 100 + 10
    replies = []
    for options in ({"adapters": lora}, {"adapters": lora, "ov_config": {"ATTENTION_BACKEND": "SDPA"}}, {}):
        with ov_phi3.load(model, device=device, **options) as pipe:
            replies.append(pipe.generate(prompt, max_new_tokens=12, do_sample=False, ignore_eos=True).token_ids)
    assert replies[0] == replies[1] != replies[2]


def test_compiled_models_are_kept_apart_by_adapter(
    demo_fp32: Path, device: str, lora: Path, tmp_path: Path, reference: Callable[[float], list[int]]
) -> None:
    cache = {"CACHE_DIR": str(tmp_path / "cache"), "ATTENTION_BACKEND": "SDPA"}
    for _ in range(2):
        assert greedy(demo_fp32, device, ov_config=cache, adapters=lora) == reference(1.0)
    assert greedy(demo_fp32, device, ov_config=cache, adapters={lora: -1.0}) == reference(-1.0)
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 2


def test_what_load_refuses(demo_int4: Path, device: str, lora: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"adapters= needs backend='llm_pipeline'.*export\(.*adapter="):
        ov_phi3.load(demo_int4, device=device, backend="infer_request", adapters=lora)
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
