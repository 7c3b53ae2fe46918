"""Directories that look like Hugging Face models, for tests of the export."""

from __future__ import annotations

import json
import struct
from pathlib import Path

CONFIG = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 96,
    "intermediate_size": 192,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 264,
}


def write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")


def write_safetensors(path: Path, tensors: dict[str, int]) -> None:
    """A file with float16 tensors of so many values each, all zero."""
    header, offset = {}, 0
    for name, size in tensors.items():
        header[name] = {"dtype": "F16", "shape": [size], "data_offsets": [offset, offset + 2 * size]}
        offset += 2 * size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))


def copying(directory: Path, *without: str) -> str:
    """Code for the fixture `played` that copies a directory to the output, without some files."""
    return f"shutil.copytree({str(directory)!r}, OUT, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*{without!r}))"


def nothing_left(parent: Path, *expected: str) -> None:
    """Check that a directory holds these entries and nothing else."""
    assert sorted(path.name for path in parent.iterdir()) == sorted(expected)
