"""Directories that `ModelInfo` refuses, and the fault that each message names."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from model_dirs import make, write_json, write_xml

from ov_phi3.errors import ModelError
from ov_phi3.model.files import REQUIRED_FILES, UNFINISHED
from ov_phi3.model.info import MANIFEST, ModelInfo


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


def test_a_path_that_is_no_directory(tmp_path: Path, model: Path) -> None:
    fails(tmp_path / "nowhere", "nowhere does not exist", "ov-phi3 export")
    name = "microsoft/Phi-3-mini-4k-instruct"
    fails(name, "does not exist", "Hugging Face hub", f"ov_phi3.export('{name}', ", f"ov-phi3 export {name} ")
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
