"""Synthetic model directories: what `ModelInfo` reads, without a usable model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
