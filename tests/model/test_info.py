"""`ModelInfo` of real exports, and of synthetic directories with the faults that users have met."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ov_phi3.errors import ModelError
from ov_phi3.model.files import REQUIRED_FILES, UNFINISHED
from ov_phi3.model.info import MANIFEST, ModelInfo

CONFIG: dict[str, Any] = {
    "model_type": "phi3",
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [2.0]},
    "sliding_window": 262144,
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "pad_token_id": 32000,
}
PHI3_TOKENS = {
    1: "<s>",
    32000: "<|endoftext|>",
    32001: "<|assistant|>",
    32006: "<|system|>",
    32007: "<|end|>",
    32010: "<|user|>",
}
JUNE = "{% for message in messages %}{% if message['role'] == 'system' %}<|system|>{{message['content']}}<|end|>"
APRIL = "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') %}<|user|>...<|end|>{% endif %}"
PHI35 = "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}<|end|>{% endif %}"

RT_INFO = """<rt_info>
    <Runtime_version value="2026.4.1-1-abc" />
    <nncf><version value="3.4.0" /><weight_compression><mode value="int4_sym" /><group_size value="128" />
    <ratio value="0.6" /></weight_compression></nncf>
    <optimum><optimum_intel_version value="{version}" /><transformers_version value="5.5.4" /></optimum>
    <runtime_options><KV_CACHE_PRECISION value="f16" /></runtime_options>
</rt_info>"""
XML = """<?xml version="1.0"?>
<net name="Model0" version="11"><layers>
<layer id="0" name="c" type="Const" version="opset1"><data element_type="i4" shape="32" offset="0" size="16" /></layer>
<layer id="1" name="d" type="Const" version="opset1"><data element_type="f16" shape="4" offset="16" size="8" /></layer>
<layer id="2" name="s" type="{state}" version="opset6"><rt_info><attribute name="x" /></rt_info></layer>
</layers><edges></edges>{rt_info}</net>
"""


def write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")


def write_xml(path: Path, *, version: str | None = "2.2.0", state: str = "ReadValue") -> None:
    rt_info = "" if version is None else RT_INFO.format(version=version)
    path.write_text(XML.format(state=state, rt_info=rt_info), encoding="utf-8")


def make(directory: Path, *, tokens: dict[int, str] = PHI3_TOKENS, template: str = JUNE, **config: Any) -> Path:
    """A directory that `ModelInfo` accepts, without a usable model; config keys with the value `...` are left out."""
    directory.mkdir(parents=True)
    write_json(directory / "config.json", {k: v for k, v in {**CONFIG, **config}.items() if v is not ...})
    write_json(
        directory / "generation_config.json", {"eos_token_id": [32000, 32001, 32007], "transformers_version": "5"}
    )
    added = [{"id": i, "content": c, "special": True, "rstrip": i > 32000, "lstrip": False} for i, c in tokens.items()]
    write_json(directory / "tokenizer.json", {"version": "1.0", "added_tokens": added, "model": {"vocab": {"</s>": 2}}})
    write_json(directory / "tokenizer_config.json", {"eos_token": "<|endoftext|>", "bos_token": {"content": "<s>"}})
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    for stem in ("openvino_model", "openvino_tokenizer", "openvino_detokenizer"):
        write_xml(directory / f"{stem}.xml")
        (directory / f"{stem}.bin").write_bytes(bytes(24))
    return directory


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make(tmp_path / "modèle int4 模型")


def fails(path: Path | str, *words: str) -> str:
    """Check that a directory raises `ModelError` with all these words in its message, and return the message."""
    with pytest.raises(ModelError) as caught:
        ModelInfo.from_dir(path)
    message = str(caught.value)
    for word in words:
        assert word in message, message
    return message


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


# -- refused directories -----------------------------------------------------------------------------------------------


def test_a_path_that_is_no_directory(tmp_path: Path, model: Path) -> None:
    fails(tmp_path / "nowhere", "nowhere does not exist", "ov-phi3 export")
    fails(model / "config.json", "is a file", str(model))
    fails("a\0b")
    with pytest.raises(TypeError):
        ModelInfo.from_dir(None)  # type: ignore[arg-type]


def test_a_model_in_a_subfolder_is_suggested(tmp_path: Path, model: Path) -> None:
    fails(tmp_path, "holds no files", f"Did you mean {str(model)!r}?")
    (tmp_path / "notes.txt").touch()
    fails(tmp_path, "holds no model", f"Did you mean {str(model)!r}?")


@pytest.mark.parametrize("name", REQUIRED_FILES)
@pytest.mark.parametrize("how", ["missing", "empty"])
def test_each_required_file_is_named_with_a_fix(model: Path, name: str, how: str) -> None:
    (model / name).unlink()
    if how == "empty":
        (model / name).touch()
    remedy = "convert_tokenizer" if "tokenizer" in name else "export again"
    message = fails(model, f"{name} is {how}", remedy)
    assert message.count(" is missing") + message.count(" is empty") == 1


def test_all_missing_files_at_once(model: Path) -> None:
    for name in ("openvino_model.bin", "openvino_tokenizer.xml", "openvino_detokenizer.bin"):
        (model / name).unlink()
    assert (
        fails(model, "openvino_model.bin", "openvino_tokenizer.xml", "openvino_detokenizer.bin").count(" is missing: ")
        == 3
    )


@pytest.mark.parametrize("stem", ["openvino_model", "openvino_tokenizer", "openvino_detokenizer"])
def test_cut_off_files(model: Path, stem: str) -> None:
    (model / f"{stem}.bin").write_bytes(bytes(23))
    fails(model, f"{stem}.bin is cut off", "23 bytes", "needs 24")
    (model / f"{stem}.bin").write_bytes(bytes(24))
    text = (model / f"{stem}.xml").read_text(encoding="utf-8")
    (model / f"{stem}.xml").write_text(text[:-40], encoding="utf-8")
    fails(model, f"{stem}.xml", "cut off")


def test_not_an_ir(model: Path) -> None:
    (model / "openvino_model.xml").write_text("version https://git-lfs", encoding="utf-8")
    fails(model, "is not an OpenVINO model")


def test_no_state(model: Path) -> None:
    write_xml(model / "openvino_model.xml", state="Result")
    fails(model, "no KV cache", "text-generation-with-past")


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", MANIFEST]
)
def test_broken_json(model: Path, name: str) -> None:
    (model / name).write_text('{\n  "added_tokens": [}', encoding="utf-8")
    fails(model, name, "not valid JSON", "line 2, column")
    (model / name).write_bytes(b'{"\xff": 1}')
    fails(model, name, "not UTF-8")
    if name != "tokenizer.json":
        (model / name).write_text("[1]", encoding="utf-8")
        fails(model, name, "holds a JSON list")


@pytest.mark.parametrize("model_type", ["llama", "phi3_v", "phimoe", None, 3])
def test_wrong_architecture(tmp_path: Path, model_type: object) -> None:
    fails(make(tmp_path / "m", model_type=model_type), "config.json: model_type is", repr(model_type), "'phi3'")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", -1),
        ("num_hidden_layers", "32"),
        ("num_hidden_layers", True),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", ...),
        ("hidden_size", 3.5),
        ("hidden_size", 3073),
        ("vocab_size", 0),
        ("max_position_embeddings", None),
        ("num_key_value_heads", 7),
        ("sliding_window", -5),
        ("partial_rotary_factor", 2),
        ("partial_rotary_factor", "x"),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [1, "x"]),
        ("bos_token_id", True),
        ("rope_scaling", [1]),
    ],
)
def test_values_of_wrong_type_or_range(tmp_path: Path, key: str, value: object) -> None:
    fails(
        make(tmp_path / "m", **{key: value}), f"config.json: {key} is {None if value is ... else value!r}", "expected"
    )


def test_malformed_tokenizer_files(model: Path) -> None:
    write_json(model / "tokenizer.json", {"added_tokens": [{"id": "x"}]})
    fails(model, "tokenizer.json: added_tokens cannot be read")
    write_json(model / "tokenizer.json", {"added_tokens": []})
    write_json(model / "tokenizer_config.json", {"added_tokens_decoder": {"x": {}}})
    fails(model, "tokenizer_config.json: added_tokens_decoder")
    write_json(model / "tokenizer_config.json", {"eos_token": 5})
    fails(model, "tokenizer_config.json: eos_token is 5")
    (model / "chat_template.jinja").unlink()
    write_json(model / "tokenizer_config.json", {"chat_template": 5})
    fails(model, "tokenizer_config.json: chat_template is 5")


def test_unfinished_export(model: Path) -> None:
    (model / UNFINISHED).touch()
    fails(model, "has not finished")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_permissions(model: Path) -> None:
    (model / "config.json").chmod(0)
    fails(model, "config.json cannot be read: Permission denied")
    (model / "config.json").chmod(0o644)
    model.chmod(0)
    try:
        fails(model, "cannot be read: Permission denied")
    finally:
        model.chmod(0o755)


@pytest.mark.parametrize("name", ["config.json", "openvino_model.xml", "openvino_model.bin"])
def test_a_file_that_cannot_be_opened(model: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as without permission, also when root runs the tests."""

    def refusing(method: Any) -> Any:
        def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
            if self.name == name:
                raise PermissionError(13, "Permission denied", str(self))
            return method(self, *args, **kwargs)

        return refuse

    for method in ("open", "read_text", "read_bytes"):
        monkeypatch.setattr(Path, method, refusing(getattr(Path, method)))
    fails(model, f"{name} cannot be read: Permission denied")


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


def test_not_exported_yet(demo_hf: Path) -> None:
    fails(demo_hf, "not exported yet", "ov-phi3 export")


def test_truncated_demo_weights(demo_int4: Path, tmp_path: Path) -> None:
    copy = tmp_path / "m"
    shutil.copytree(demo_int4, copy, ignore=shutil.ignore_patterns("openvino_model.bin"))
    size = (demo_int4 / "openvino_model.bin").stat().st_size
    with (copy / "openvino_model.bin").open("wb") as file:
        file.truncate(size - 1)
    fails(copy, "openvino_model.bin is cut off")
    with (copy / "openvino_model.bin").open("wb") as file:
        file.truncate(size)
    assert ModelInfo.from_dir(copy).fingerprint != ModelInfo.from_dir(demo_int4).fingerprint


def test_needs_neither_numpy_nor_openvino() -> None:
    code = "import sys, ov_phi3.model.info, ov_phi3.system.versions; print({'numpy', 'openvino'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
