"""Merges a LoRA adapter into a model's weights. Runs in a subprocess, with the packages of the `export` extra."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

__all__ = ["main", "merge"]

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.index.json")


def merge(source: str, adapter: Path, output: Path, *, cache_dir: str | None, trust_remote_code: bool) -> None:
    """Write the model with W + s * B A in place of W, in the precision of its weights, with all its other files.

    Args:
        source: a directory, or a name on the hub.
        adapter: the folder of the adapter.
        output: the directory to create.
        cache_dir: folder for downloads, or None for the hub's own.
        trust_remote_code: run Python code of the model's repository.

    Raises:
        RuntimeError: peft did not apply every tensor of the adapter.
    """
    import peft
    from huggingface_hub import snapshot_download
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    files = Path(source)
    if not files.is_dir():
        files = Path(snapshot_download(source, cache_dir=cache_dir, ignore_patterns=list(_WEIGHTS)))
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype="auto", cache_dir=cache_dir, trust_remote_code=trust_remote_code
    )
    adapted = peft.PeftModel.from_pretrained(model, str(adapter))
    with safe_open(adapter / "adapter_model.safetensors", "pt") as tensors:
        unapplied = set(tensors.keys()) ^ set(peft.get_peft_model_state_dict(adapted))
    if unapplied:
        raise RuntimeError(
            f"{len(unapplied)} tensors are in the adapter or in its target_modules, but not in both, such as "
            f"{min(unapplied)}; save it again with peft."
        )
    adapted.merge_and_unload(safe_merge=True).save_pretrained(output)
    # The configuration and the tokenizer as they were: saving changes keys and formats.
    shutil.copytree(files, output, ignore=shutil.ignore_patterns(*_WEIGHTS, ".*"), dirs_exist_ok=True)


def main() -> None:
    """Merge as the command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("adapter", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--cache-dir")
    parser.add_argument("--trust-remote-code", action="store_true")
    args = parser.parse_args()
    merge(args.source, args.adapter, args.output, cache_dir=args.cache_dir, trust_remote_code=args.trust_remote_code)
