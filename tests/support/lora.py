"""LoRA adapters in peft's files, written by numpy, and the weights that they make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["lora_tensors", "write_adapter"]


def lora_tensors(config: dict[str, Any], rank: int = 4, strength: float = 0.05, seed: int = 0) -> dict[str, np.ndarray]:
    """Random A and B for all four linear layers of every decoder layer of a model with this `config.json`."""
    source = np.random.default_rng(seed)
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    kv_width = config["num_key_value_heads"] * hidden // heads
    layer = {
        "self_attn.qkv_proj": (hidden, hidden + 2 * kv_width),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_up_proj": (hidden, 2 * inner),
        "mlp.down_proj": (inner, hidden),
    }
    tensors = {}
    for index in range(config["num_hidden_layers"]):
        for name, (wide, high) in layer.items():
            prefix = f"base_model.model.model.layers.{index}.{name}"
            for part, shape in (("A", (rank, wide)), ("B", (high, rank))):
                values = source.standard_normal(shape) * strength
                tensors[f"{prefix}.lora_{part}.weight"] = values.astype(np.float32)
    return tensors


def write_adapter(
    folder: Path, tensors: dict[str, np.ndarray], *, rank: int = 4, alpha: float = 12, **config: Any
) -> Path:
    """A folder as peft's `save_pretrained` writes it."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": alpha,
        "bias": "none",
        "target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(values), encoding="utf-8")
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    return folder
