"""The peers of `compare.py --full-size`: a Phi-3-mini of full width with random weights, in every peer's format.

All files come from the same weights (`scripts/full_size.py`). A model of 32 layers needs most of a small machine's
memory, so the needs are checked before anything is made.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from _common import Refused
from _environment import BootstrapError, cache_dir, ensure_model, export_python
from _peers import PEERS, Inputs, Peer, llama_cpp_python, ort_genai_model
from ov_phi3.system.memory import machine_memory

__all__ = ["LAYERS", "check_resources", "full_size_inputs", "full_size_peers"]

LAYERS = 32
_LAYER_WEIGHTS = 4 * 3072 * 3072 + 3 * 3072 * 8192
_OTHER_WEIGHTS = 2 * 32064 * 3072

EXPORT_BYTES = 2.8
"""Peak memory of an export per weight: 10.4 GiB for the 3.8 billion weights of 32 layers."""
ORT_BYTES = 5.5
"""Peak memory of onnxruntime-genai's builder per weight."""

DISK_BYTES = {"hf": 2.0, "int4": 0.73, "int4-max": 0.56, "q4_0": 2.6, "q4_k_m": 2.7, "ort-int4": 0.9}
"""Disk space per weight to make each file; a GGUF file is quantised from one of 16 bits, which is then removed."""


def full_size_inputs(layers: int) -> Inputs:
    """The exported model and its source, made if they are absent."""
    python = export_python()
    exported = ensure_model(f"mini{layers}-int4", python)
    return Inputs(exported, ensure_model(f"mini{layers}-hf", python), None)


def full_size_peers(layers: int) -> tuple[Peer, ...]:
    """The peers, ours first: this library with two recipes on both backends, then the others."""
    by_name = {peer.name: peer for peer in PEERS}
    ours, llama, ort = by_name["ov_phi3"], by_name["llama.cpp"], by_name["onnxruntime-genai"]
    own, smallest = ours.prepare, _recipe(ours, layers, "int4-max")
    engine = {"backend": "infer_request"}
    all_4_bits = "recipe int4-max: all layers in 4 bits, the embedding and the output layer in 8"
    return (
        ours,
        replace(ours, name="ov_phi3-infer_request", prepare=own, options=engine, unequal="our own engine"),
        replace(ours, name="ov_phi3-int4-max", prepare=smallest, unequal=all_4_bits),
        replace(
            ours,
            name="ov_phi3-int4-max-f32",
            prepare=smallest,
            options={"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}},
            unequal=f"INFERENCE_PRECISION_HINT=f32; {all_4_bits}",
        ),
        replace(
            ours,
            name="ov_phi3-int4-max-infer_request",
            prepare=smallest,
            options=engine,
            unequal=f"our own engine; {all_4_bits}",
        ),
        replace(
            llama,
            name="llama.cpp-Q4_0",
            prepare=partial(_gguf, layers, "q4_0"),
            unequal="the same weights, layers in 4 bits in groups of 32, the output layer in 6; KV cache of 16 bits",
        ),
        replace(
            llama,
            name="llama.cpp-Q4_K_M",
            prepare=partial(_gguf, layers, "q4_k_m"),
            unequal="the same weights in 4 bits with two levels of scales, some layers in 5 and 6; KV cache of 16 bits",
        ),
        replace(
            ort,
            prepare=partial(_ort_genai, ort.prepare, layers),
            unequal="the same weights in 4 bits with groups of 32, the output layer too; KV cache of 32 bits",
        ),
    )


def _recipe(ours: Peer, layers: int, recipe: str) -> Callable[[Inputs], tuple[Path, Path]]:
    def prepare(inputs: Inputs) -> tuple[Path, Path]:
        return ours.prepare(inputs)[0], ensure_model(f"mini{layers}-{recipe}", export_python())

    return prepare


def _gguf(layers: int, kind: str, _: Inputs) -> tuple[Path, Path]:
    python = llama_cpp_python()
    return python, ensure_model(f"mini{layers}-{kind}", python) / "model.gguf"


def _ort_genai(prepare: Callable[[Inputs], tuple[Path, Path]], layers: int, inputs: Inputs) -> tuple[Path, Path]:
    assert inputs.source is not None
    needed, free = ORT_BYTES * _weights(layers), _free_memory()
    if not (ort_genai_model(inputs.source) / "genai_config.json").exists() and free is not None and free < needed:
        fits = int((free / ORT_BYTES - _OTHER_WEIGHTS) / _LAYER_WEIGHTS)
        raise BootstrapError(
            f"its builder needs {needed / 2**30:.1f} GiB of memory for {layers} layers and {free / 2**30:.1f} GiB are "
            f"free; --layers {fits} fits, and compares all runtimes at that number of layers"
            if fits > 0
            else f"its builder needs {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB are free"
        )
    return prepare(inputs)


def check_resources(layers: int, selected: set[str], *, free_memory: int | None = None) -> None:
    """Raise `Refused` if memory or disk space is too small for the files that are absent, and for a run.

    Args:
        layers: number of layers of the model.
        selected: names of the peers that are to be measured.
        free_memory: bytes of memory that are free; by default what the system says.
    """
    missing = [kind for kind in _kinds(selected) if not _present(layers, kind)]
    weights = _weights(layers)
    # A process that runs the int4 export has the files' pages and the weights in the layout of the kernels.
    memory = weights * (EXPORT_BYTES if {"int4", "int4-max"} & set(missing) else 1.8)
    free = free_memory or _free_memory()
    smaller = "Close other programs, or measure a smaller model of the same width with --layers N."
    if free is not None and free < memory:
        raise Refused(
            f"--full-size with {layers} layers needs {memory / 2**30:.1f} GiB of memory and {free / 2**30:.1f} GiB are "
            f"free. {smaller}"
        )
    home = cache_dir()
    home.mkdir(parents=True, exist_ok=True)
    disk, space = weights * sum(DISK_BYTES[kind] for kind in missing), shutil.disk_usage(home).free
    if space < disk:
        raise Refused(
            f"--full-size with {layers} layers needs {disk / 2**30:.1f} GiB of disk space for {', '.join(missing)} and "
            f"{home} has {space / 2**30:.1f} GiB. Free some, set OV_PHI3_CACHE to another folder, or take --layers N."
        )


def _kinds(selected: set[str]) -> list[str]:
    """The files that the selected peers need."""
    kinds = ["hf", "int4"]
    kinds += ["int4-max"] if any("int4-max" in name for name in selected) else []
    kinds += [kind for kind in ("q4_0", "q4_k_m") if any(name.lower().endswith(kind) for name in selected)]
    return kinds + (["ort-int4"] if "onnxruntime-genai" in selected else [])


def _present(layers: int, kind: str) -> bool:
    """Whether the cache has some model of this name; one that was made from other inputs takes its place only then."""
    pattern = f"peers/models/*-mini{layers}-hf-ort-int4" if kind == "ort-int4" else f"models/*/mini{layers}-{kind}"
    return any(not path.parent.name.startswith(".") for path in cache_dir().glob(pattern))


def _weights(layers: int) -> int:
    return layers * _LAYER_WEIGHTS + _OTHER_WEIGHTS


def _free_memory() -> int | None:
    memory = machine_memory()
    return None if memory is None else memory.available
