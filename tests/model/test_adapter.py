"""LoRA adapters in peft's files: what is read, and what does not fit a model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import CONFIG, write_json
from lora import lora_tensors, write_adapter

from ov_phi3.errors import ModelError
from ov_phi3.model.adapter import Adapter, read_adapter
from ov_phi3.model.config import Phi3Config

QKV = "base_model.model.model.layers.0.self_attn.qkv_proj"


@pytest.fixture
def model(tmp_path: Path) -> Phi3Config:
    write_json(tmp_path / "config.json", {**CONFIG, "tie_word_embeddings": False})
    return Phi3Config.read(tmp_path / "config.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "lora", lora_tensors(CONFIG))


def rewritten(folder: Path, change: Any = None, **config: Any) -> Adapter:
    """The adapter once more, with other tensors or other keys in its config."""
    tensors = lora_tensors(CONFIG)
    if change is not None:
        change(tensors)
    return read_adapter(write_adapter(folder, tensors, **config))


def test_an_adapter_is_read_from_its_folder_or_its_file(folder: Path, model: Phi3Config) -> None:
    for path in (folder, folder / "adapter_model.safetensors", str(folder)):
        adapter = read_adapter(path)
        assert (adapter.rank, adapter.scale, adapter.base) == (4, 3.0, None)
        adapter.check_fit(model, "microsoft/Phi-3-mini-4k-instruct")
        adapter.check_loadable()


def test_the_scale_of_rslora(folder: Path) -> None:
    assert rewritten(folder, use_rslora=True).scale == 12 / math.sqrt(4)


def test_a_file_without_a_config_has_no_scale(folder: Path, model: Phi3Config) -> None:
    (folder / "adapter_config.json").unlink()
    adapter = read_adapter(folder / "adapter_model.safetensors")
    assert (adapter.config, adapter.scale) == (None, None)
    adapter.check_fit(model, None)
    with pytest.raises(ModelError, match=r"has no adapter_config.json"):
        read_adapter(folder)


def test_the_hash_is_of_weights_and_config(folder: Path) -> None:
    first = read_adapter(folder).sha256
    assert rewritten(folder).sha256 == first
    assert len({first, rewritten(folder, alpha=13).sha256, rewritten(folder, lambda t: t.popitem()).sha256}) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: (f / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors.*save_pretrained"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"abc"), "not a safetensors file|cut off"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "not valid JSON"),
        (lambda f: write_adapter(f, {}), "holds no tensors"),
        (lambda f: write_adapter(f, lora_tensors(CONFIG), peft_type="IA3"), "peft_type is 'IA3'"),
        (lambda f: write_adapter(f, lora_tensors(CONFIG), alora_invocation_tokens=[1]), "alora_invocation_tokens"),
    ],
)
def test_what_is_no_adapter(folder: Path, change: Any, words: str) -> None:
    change(folder)
    with pytest.raises(ModelError, match=words):
        read_adapter(folder)


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        read_adapter(tmp_path / "nothing")


def other_shape(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"{QKV}.lora_A.weight"] = np.zeros((4, 97), np.float32)


def other_layer(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"{QKV.replace('layers.0', 'layers.7')}.lora_A.weight"] = np.zeros((4, 96), np.float32)


def split_projection(tensors: dict[str, np.ndarray]) -> None:
    for part in "AB":
        tensors[f"{QKV.replace('qkv', 'q')}.lora_{part}.weight"] = np.zeros((4, 4), np.float32)


def other_names(tensors: dict[str, np.ndarray]) -> None:
    tensors["lora_unet_down.alpha"] = np.zeros((), np.float32)


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        (other_shape, {}, r"lora_A.weight of 'model.layers.0.self_attn.qkv_proj' has the shape \[4, 97\].*\[4, 96\]"),
        (other_layer, {}, "the model has 1 layers"),
        (split_projection, {}, "split projections"),
        (other_names, {}, "expected peft's names"),
        (lambda tensors: tensors.pop(f"{QKV}.lora_B.weight"), {}, "without its counterpart"),
        (None, {"rank": 8}, r"has the shape \[4, \d+\]; this model needs \[8, \d+\]"),
        (None, {"rank": 0}, "r is 0"),
        (None, {"base_model_name_or_path": "microsoft/Phi-4"}, "was trained on 'microsoft/Phi-4', and the model is"),
    ],
)
def test_what_does_not_fit_the_model(
    folder: Path, model: Phi3Config, change: Any, config: dict[str, Any], words: str
) -> None:
    with pytest.raises(ModelError, match=words):
        rewritten(folder, change, **config).check_fit(model, "microsoft/Phi-3-mini-4k-instruct")


@pytest.mark.parametrize("base", ["Microsoft/phi-3-MINI-4k-instruct", "/data/phi3", "./phi3", ""])
def test_names_that_do_not_contradict_the_model(folder: Path, model: Phi3Config, base: str) -> None:
    rewritten(folder, base_model_name_or_path=base).check_fit(model, "microsoft/Phi-3-mini-4k-instruct")


def test_weights_that_two_layers_share(folder: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {**CONFIG, "tie_word_embeddings": True})
    tied = Phi3Config.read(tmp_path / "config.json")
    head = {"base_model.model.lm_head.weight": np.zeros((264, 96), np.float32)}
    with pytest.raises(ModelError, match="tie_word_embeddings"):
        rewritten(folder, lambda tensors: tensors.update(head)).check_fit(tied, None)


def with_magnitude(tensors: dict[str, np.ndarray]) -> None:
    tensors[f"{QKV}.lora_magnitude_vector"] = np.zeros(192, np.float32)


def with_embedding(tensors: dict[str, np.ndarray]) -> None:
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = np.zeros((4, 264), np.float32)
    tensors["base_model.model.model.embed_tokens.lora_embedding_B"] = np.zeros((96, 4), np.float32)


@pytest.mark.parametrize(
    ("change", "config", "words"),
    [
        (with_magnitude, {}, "lora_magnitude_vector"),
        (with_embedding, {}, "lora_embedding_A"),
        (None, {"use_dora": True}, "use_dora is True"),
        (None, {"alpha_pattern": {"o_proj": 3}}, "alpha_pattern"),
    ],
)
def test_what_only_a_merge_knows(
    folder: Path, model: Phi3Config, change: Any, config: dict[str, Any], words: str
) -> None:
    adapter = rewritten(folder, change, **config)
    adapter.check_fit(model, None)
    with pytest.raises(ModelError, match=f"{words}.*Merge it instead"):
        adapter.check_loadable()
