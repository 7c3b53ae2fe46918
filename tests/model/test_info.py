"""`ModelInfo` of real exports and of synthetic directories: what it reads, and its warnings."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from model_dirs import APRIL, JUNE, PHI3_TOKENS, PHI35, make, write_json, write_xml

from ov_phi3.model.info import MANIFEST, ModelInfo


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make(tmp_path / "modèle int4 模型")


# -- reading -----------------------------------------------------------------------------------------------------------


def test_all_fields(model: Path) -> None:
    info = ModelInfo.load(model)
    assert info == ModelInfo.from_dir(str(model))
    assert isinstance(hash(info), int)
    assert (info.path, info.model_type, info.family) == (model, "phi3", "phi-3")
    assert (info.context_length, info.original_context_length) == (131072, 4096)
    assert (info.rope_type, info.rope_boundary, info.sliding_window) == ("longrope", 4096, 262144)
    assert (info.num_layers, info.num_attention_heads, info.num_kv_heads, info.head_dim) == (32, 32, 32, 96)
    assert (info.hidden_size, info.vocab_size, info.partial_rotary_factor) == (3072, 32064, 1.0)
    assert info.eos_token_ids == (32000, 32001, 32007)
    assert (info.eos_token, info.bos_token, info.bos_token_id, info.pad_token_id) == ("<|endoftext|>", "<s>", 1, 32000)
    assert info.chat_template == JUNE
    assert [(token.id, token.content) for token in info.added_tokens] == list(PHI3_TOKENS.items())
    assert [token.rstrip for token in info.added_tokens] == [False, False, True, True, True, True]
    assert info.generation_defaults == {"eos_token_id": [32000, 32001, 32007]}
    assert (info.weight_bytes, info.quantization) == (24, "int4_sym, group size 128, ratio 0.6")
    assert info.exporter_versions == {
        "optimum-intel": "2.2.0",
        "transformers": "5.5.4",
        "nncf": "3.4.0",
        "openvino": "2026.4.1-1-abc",
    }
    assert info.runtime_options == {"KV_CACHE_PRECISION": "f16"}
    assert (info.manifest, info.warnings) == (None, ())
    json.dumps(info.to_dict())
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.family = "x"  # type: ignore[misc]


def test_kv_bytes_per_token(model: Path) -> None:
    info = ModelInfo.from_dir(model)
    assert info.kv_bytes_per_token == 2 * 32 * 32 * 96 * 2 == info.to_dict()["kv_bytes_per_token"]
    assert info.kv_bytes_per_token_for(8) * 4 == info.kv_bytes_per_token_for(32)
    with pytest.raises(ValueError, match="bits is 0"):
        info.kv_bytes_per_token_for(0)


def test_rope_parameters_of_transformers_5(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 64, "partial_rotary_factor": 0.75}
    info = ModelInfo.from_dir(make(tmp_path / "m", rope_scaling=..., rope_parameters=rope))
    assert (info.rope_type, info.rope_boundary, info.partial_rotary_factor) == ("longrope", 64, 0.75)


@pytest.mark.parametrize(
    "config",
    [
        {"rope_scaling": None},
        {"rope_scaling": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"max_position_embeddings": 4096},
    ],
)
def test_no_boundary_without_longrope(tmp_path: Path, config: dict[str, Any]) -> None:
    assert ModelInfo.from_dir(make(tmp_path / "m", **config)).rope_boundary is None


def test_default_of_kv_heads_and_explicit_head_dim(tmp_path: Path) -> None:
    info = ModelInfo.from_dir(make(tmp_path / "m", num_key_value_heads=..., head_dim=64))
    assert (info.num_kv_heads, info.head_dim) == (32, 64)


@pytest.mark.parametrize(("template", "family"), [(JUNE, "phi-3"), (APRIL, "phi-3-april-2024"), (PHI35, "phi-3.5")])
def test_family_by_template(tmp_path: Path, template: str, family: str) -> None:
    assert ModelInfo.from_dir(make(tmp_path / "m", template=template)).family == family


@pytest.mark.parametrize(
    ("tokens", "family", "eos"),
    [
        ({199999: "<|endoftext|>", 200020: "<|end|>", 200021: "<|user|>"}, "phi-4-mini", (199999, 200020)),
        ({100257: "<|endoftext|>", 100265: "<|im_end|>"}, "phi-4", (100257, 100265)),
        ({0: "<|endoftext|>", 5: "<|end|>"}, "phi3-compatible", (0, 5)),
    ],
)
def test_family_by_vocabulary(tmp_path: Path, tokens: dict[int, str], family: str, eos: tuple[int, ...]) -> None:
    path = make(tmp_path / "m", tokens=tokens, vocab_size=200064, eos_token_id=None)
    (path / "generation_config.json").unlink()
    info = ModelInfo.from_dir(path)
    assert (info.family, info.eos_token_ids) == (family, eos)


def test_family_table_needs_the_text_at_the_id(tmp_path: Path) -> None:
    tokens = {**PHI3_TOKENS, 32001: "<|fim|>"}
    path = make(tmp_path / "m", tokens=tokens)
    (path / "generation_config.json").unlink()
    assert ModelInfo.from_dir(path).eos_token_ids == (32000, 32007)


def test_the_family_adds_end_tokens_that_the_configs_lack(tmp_path: Path) -> None:
    path = make(tmp_path / "m", eos_token_id=2)
    write_json(path / "generation_config.json", {"eos_token_id": 2})
    assert ModelInfo.from_dir(path).eos_token_ids == (2, 32000, 32001, 32007)


def test_end_token_of_the_plain_vocabulary(model: Path) -> None:
    write_json(model / "tokenizer_config.json", {"eos_token": "</s>"})
    assert 2 in ModelInfo.from_dir(model).eos_token_ids


def test_tokens_as_transformers_4_wrote_them(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "chat_template.jinja").unlink()
    decoder = {str(i): {"content": c, "special": True, "rstrip": True} for i, c in PHI3_TOKENS.items()}
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": APRIL}]
    write_json(
        model / "tokenizer_config.json",
        {"added_tokens_decoder": decoder, "chat_template": named, "eos_token": {"content": "<|endoftext|>"}},
    )
    info = ModelInfo.from_dir(model)
    assert (info.family, info.chat_template) == ("phi-3-april-2024", APRIL)
    assert len(info.added_tokens) == 6
    assert info.added_tokens[0].rstrip


def test_manifest(model: Path) -> None:
    write_json(model / MANIFEST, {"format": 1, "recipe": "int4"})
    assert ModelInfo.from_dir(model).manifest == {"format": 1, "recipe": "int4"}


def test_fingerprint(model: Path, tmp_path: Path) -> None:
    first = ModelInfo.from_dir(model).fingerprint
    copy = shutil.copytree(model, tmp_path / "copy")
    assert ModelInfo.from_dir(copy).fingerprint == first
    (copy / "openvino_model.bin").write_bytes(bytes(23) + b"x")
    assert ModelInfo.from_dir(copy).fingerprint != first
    assert len(first) == 32


def test_quantization_without_notes(model: Path) -> None:
    write_xml(model / "openvino_model.xml", version=None)
    info = ModelInfo.from_dir(model)
    assert info.quantization == "i4"
    assert info.exporter_versions == {}


# -- warnings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "words"), [("1.27.0", "optimum-intel 1.27.0"), (None, "does not name the version")]
)
def test_longrope_of_an_old_exporter(model: Path, version: str | None, words: str) -> None:
    write_xml(model / "openvino_model.xml", version=version)
    (warning,) = ModelInfo.from_dir(model).warnings
    assert words in warning
    assert "past 4096 tokens" in warning


def test_old_exporter_without_longrope(tmp_path: Path) -> None:
    path = make(tmp_path / "m", rope_scaling=None)
    write_xml(path / "openvino_model.xml", version="1.27.0")
    assert ModelInfo.from_dir(path).warnings == ()


def test_end_token_outside_the_vocabulary(tmp_path: Path) -> None:
    info = ModelInfo.from_dir(make(tmp_path / "m", vocab_size=32001, eos_token_id=99999))
    assert any("config.json: eos_token_id has 99999" in warning for warning in info.warnings)
    assert 99999 not in info.eos_token_ids


def test_a_directory_without_token_files_gets_three_warnings(tmp_path: Path) -> None:
    path = make(tmp_path / "m", eos_token_id=None)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        (path / name).unlink()
    info = ModelInfo.from_dir(path)
    assert info.eos_token_ids == ()
    assert info.family == "phi3-compatible"
    assert len(info.warnings) == 3


def test_a_directory_with_the_graphs_and_config_only_knows_its_tokens(tiny_fp32: Path, tmp_path: Path) -> None:
    for file in tiny_fp32.iterdir():
        if file.name.startswith("openvino_") or file.name == "config.json":
            (tmp_path / file.name).symlink_to(file)
    whole, info = ModelInfo.from_dir(tiny_fp32), ModelInfo.from_dir(tmp_path)
    assert info.eos_token_ids == whole.eos_token_ids
    assert (info.eos_token, info.bos_token, info.family) == (whole.eos_token, whole.bos_token, whole.family)
    assert info.chat_template == whole.chat_template
    assert [token.content for token in info.added_tokens] == [token.content for token in whole.added_tokens]
    assert not info.warnings


# -- real directories --------------------------------------------------------------------------------------------------


def test_demo_model(demo_int4: Path) -> None:
    info = ModelInfo.from_dir(demo_int4)
    assert (info.family, info.context_length, info.rope_boundary) == ("phi3-compatible", 8192, None)
    assert (info.num_layers, info.num_attention_heads, info.num_kv_heads, info.head_dim) == (30, 9, 3, 64)
    texts = {token.id: token.content for token in info.added_tokens}
    assert "<|end|>" in {texts.get(id_) for id_ in info.eos_token_ids}
    assert info.quantization.startswith("int4_sym")
    assert info.weight_bytes > 50_000_000
    assert info.warnings == ()


def test_tiny_model_with_the_real_tokenizer(tiny_fp32: Path) -> None:
    info = ModelInfo.from_dir(tiny_fp32)
    assert info.family.startswith("phi-3")
    assert {32000, 32007} <= set(info.eos_token_ids)
    assert info.quantization == "f32"
    assert {token.id: token.rstrip for token in info.added_tokens}[32010]


def test_needs_neither_numpy_nor_openvino() -> None:
    code = "import sys, ov_phi3.model.info, ov_phi3.system.versions; print({'numpy', 'openvino'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
