"""What a model directory holds: read once, checked, and kept as plain values. Needs neither openvino nor numpy."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ov_phi3.errors import ModelError
from ov_phi3.files import expanded
from ov_phi3.model.config import JsonFile, Phi3Config, read_json
from ov_phi3.model.files import Ir, check_directory, check_files, fingerprint
from ov_phi3.model.tokens import AddedToken, TokenizerFiles, end_token_ids, family_of

__all__ = ["MANIFEST", "AddedToken", "ModelInfo"]

MANIFEST = "ov_phi3.json"
"""The file in which `ov_phi3.export` notes how a model was made."""

_NOT_OPTIONS = ("_from_model_config", "transformers_version")
_EXPORTER_KEYS = {
    "optimum-intel": ("optimum", "optimum_intel_version"),
    "optimum": ("optimum", "optimum_version"),
    "transformers": ("optimum", "transformers_version"),
    "torch": ("optimum", "pytorch_version"),
    "nncf": ("nncf", "version"),
    "openvino": ("Runtime_version",),
}


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model directory that is complete, and what its files say.

    Attributes:
        path: the directory, absolute.
        model_type: `model_type` of `config.json`, always "phi3".
        family: "phi-3", "phi-3-april-2024" (no system turn), "phi-3.5", "phi-4-mini", "phi-4", or "phi3-compatible":
            the architecture with a vocabulary of its own.
        context_length: tokens that prompt and reply share (`max_position_embeddings`).
        original_context_length: tokens the model was trained on before RoPE was stretched; equal to `context_length`
            where it was not.
        rope_type: "longrope", or None for plain RoPE; another name is `config.json`'s own.
        rope_boundary: length in tokens up to which LongRoPE uses its short factors, and past which the long ones; keys
            cached on one side are wrong on the other. None where nothing changes within `context_length`.
        sliding_window: tokens that each token attends to, or None for all.
        vocab_size: rows of the output layer; ids are below it.
        hidden_size: width of the model.
        num_layers: decoder layers.
        num_attention_heads: query heads per layer.
        num_kv_heads: key and value heads per layer.
        head_dim: width of a head.
        partial_rotary_factor: share of a head that is rotated.
        eos_token_ids: all ids that end a reply, sorted: those of `config.json`, `generation_config.json` and the
            tokenizer, and the family's own where the tokenizer has them.
        eos_token: text of the tokenizer's end token, or None.
        bos_token_id: id of the first token of a text, or None.
        bos_token: its text, or None.
        pad_token_id: id that fills up batches, or None.
        chat_template: Jinja source, or None.
        added_tokens: tokens found in text before it is split, control tokens among them, by id.
        generation_defaults: options in `generation_config.json`, under their Hugging Face names.
        weight_bytes: size of `openvino_model.bin`.
        quantization: how weights are stored, e.g. "int4_sym, group size 128, ratio 0.6" or "f16".
        runtime_options: what the exporter put into the model for the runtime, e.g. `KV_CACHE_PRECISION`.
        exporter_versions: package name to version, as noted in the model; a package that is not there is unknown.
        manifest: how the model was made (`ov_phi3.json`), or None.
        fingerprint: hash that tells this model from others; equal for a copy.
        warnings: sentences about what works, but not as it should.
    """

    path: Path
    model_type: str
    family: str
    context_length: int
    original_context_length: int
    rope_type: str | None
    rope_boundary: int | None
    sliding_window: int | None
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    partial_rotary_factor: float
    eos_token_ids: tuple[int, ...]
    eos_token: str | None
    bos_token_id: int | None
    bos_token: str | None
    pad_token_id: int | None
    chat_template: str | None = field(repr=False)
    added_tokens: tuple[AddedToken, ...] = field(repr=False)
    generation_defaults: Mapping[str, Any] = field(repr=False, hash=False)
    weight_bytes: int
    quantization: str
    runtime_options: Mapping[str, str] = field(repr=False, hash=False)
    exporter_versions: Mapping[str, str] = field(repr=False, hash=False)
    manifest: Mapping[str, Any] | None = field(repr=False, hash=False)
    fingerprint: str
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_dir(cls, path: str | os.PathLike[str]) -> ModelInfo:
        """Read and check an exported model's directory; takes milliseconds, and loads no weights.

        Raises:
            ModelError: the directory is missing, incomplete (all missing files are named), broken, not exported yet, or
                of another architecture.
            TypeError: `path` is not a path.
        """
        directory = Path(os.path.abspath(expanded(path)))  # noqa: PTH100 - resolve() would follow symlinks
        names = check_directory(directory)
        config = Phi3Config.read(directory / "config.json") if names.get("config.json") else None
        check_files(directory, names)
        assert config is not None  # check_files has seen it
        ir = _read_ir(directory)
        tokens = TokenizerFiles(directory, names)
        generation = _optional_json(directory, names, "generation_config.json")
        family = family_of(tokens.added, tokens.chat_template)
        warnings = _Warnings(config)
        eos = {*end_token_ids(tokens.added, family, tokens.chat_template)}
        for file in (config.file, generation):
            eos.update(warnings.in_vocabulary(file, "eos_token_id"))
        if (eos_token := tokens.id_of(tokens.text("eos_token"))) is not None:
            eos.add(eos_token)
        bos = _first(generation, config.file, "bos_token_id", warnings)
        pad = _first(generation, config.file, "pad_token_id", warnings)
        exporter = {name: found for name, keys in _EXPORTER_KEYS.items() if (found := ir.info(*keys))}
        warnings.about_tokens(tokens, eos)
        warnings.about_longrope(exporter.get("optimum-intel"))
        return cls(
            path=directory,
            model_type=str(config.file.data["model_type"]),
            family=family,
            context_length=config.context_length,
            original_context_length=config.original_context_length,
            rope_type=config.rope_type,
            rope_boundary=config.rope_boundary,
            sliding_window=config.sliding_window,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            num_attention_heads=config.num_attention_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            partial_rotary_factor=config.partial_rotary_factor,
            eos_token_ids=tuple(sorted(eos)),
            eos_token=tokens.text("eos_token"),
            bos_token_id=tokens.id_of(tokens.text("bos_token")) if bos is None else bos,
            bos_token=tokens.text("bos_token"),
            pad_token_id=tokens.id_of(tokens.text("pad_token")) if pad is None else pad,
            chat_template=tokens.chat_template,
            added_tokens=tokens.added,
            generation_defaults={k: v for k, v in generation.data.items() if k not in _NOT_OPTIONS},
            weight_bytes=ir.weight_bytes,
            quantization=_quantization(ir),
            runtime_options=ir.section("runtime_options"),
            exporter_versions=exporter,
            manifest=_manifest(directory, names),
            fingerprint=fingerprint(directory, config.file.path, ir),
            warnings=tuple(warnings.found),
        )

    load = from_dir

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache per token if it is held as float16, the precision of GPUs and of snapshots."""
        return self.kv_bytes_per_token_for(16)

    def kv_bytes_per_token_for(self, bits: int) -> int:
        """Bytes of KV cache per token: a key and a value x layers x KV heads x head width x bits / 8.

        The scales that a quantised cache (8 or 4 bits) keeps beside its values are not counted: they depend on the
        device.

        Raises:
            ValueError: `bits` is not positive.
        """
        if bits <= 0:
            raise ValueError(f"bits is {bits}; expected 16, 8 or 4, or 32 for float32.")
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bits // 8

    def to_dict(self) -> dict[str, Any]:
        """All fields, and `kv_bytes_per_token`, as values that `json.dumps` takes."""
        values = {**dataclasses.asdict(self), "path": str(self.path)}
        return {**values, "kv_bytes_per_token": self.kv_bytes_per_token}


class _Warnings:
    """Collects what is odd about a model but does not keep it from running."""

    def __init__(self, config: Phi3Config) -> None:
        self.found: list[str] = []
        self._config = config

    def in_vocabulary(self, file: JsonFile, key: str) -> list[int]:
        """The token ids under a key, less those that the model cannot produce."""
        ids = file.token_ids(key)
        size = self._config.vocab_size
        outside = [id_ for id_ in ids if not 0 <= id_ < size]
        if outside and outside != [-1]:  # -1 has long been written for "none"
            self.found.append(
                f"{file.path.name}: {key} names {', '.join(map(str, outside))}, outside the vocabulary of "
                f"{size}; ignored."
            )
        return [id_ for id_ in ids if 0 <= id_ < size]

    def about_tokens(self, tokens: TokenizerFiles, eos: set[int]) -> None:
        if not tokens.known:
            self.found.append(
                "No tokenizer.json and no tokenizer_config.json: control tokens are unknown. Copy both from the model "
                "that this was exported from."
            )
        if tokens.chat_template is None:
            self.found.append("No chat template in the directory; Phi-3's is assumed.")
        if not eos:
            self.found.append("No file names an end token: replies end at their length limit only.")

    def about_longrope(self, optimum_intel: str | None) -> None:
        boundary = self._config.rope_boundary
        if boundary is None or (optimum_intel is not None and _major(optimum_intel) >= 2):
            return
        if optimum_intel is None:
            self.found.append(
                f"LongRoPE model, and the file does not say which optimum-intel exported it: before 2.0 the export is "
                f"wrong past {boundary} tokens. Export again to be sure."
            )
        else:
            self.found.append(
                f"Exported by optimum-intel {optimum_intel}, whose LongRoPE models (before 2.0) are wrong past "
                f"{boundary} tokens. Export again with the current version, or keep context_length at or below that."
            )


def _major(version: str) -> int:
    number = re.match(r"\d+", version)
    return int(number[0]) if number else 0


def _read_ir(directory: Path) -> Ir:
    for stem in ("openvino_tokenizer", "openvino_detokenizer"):
        Ir.read(directory, stem)
    ir = Ir.read(directory, "openvino_model")
    if not ir.stateful:
        raise ModelError(
            f"{directory / 'openvino_model.xml'} keeps no KV cache in its state. Export again with "
            "--task text-generation-with-past and without --disable-stateful, as `ov-phi3 export` does."
        )
    return ir


def _optional_json(directory: Path, names: Mapping[str, int], name: str) -> JsonFile:
    return read_json(directory / name) if name in names else JsonFile(directory / name, {})


def _manifest(directory: Path, names: Mapping[str, int]) -> Mapping[str, Any] | None:
    return read_json(directory / MANIFEST).data if MANIFEST in names else None


def _first(generation: JsonFile, config: JsonFile, key: str, warnings: _Warnings) -> int | None:
    ids = [*warnings.in_vocabulary(generation, key), *warnings.in_vocabulary(config, key)]
    return ids[0] if ids else None


def _quantization(ir: Ir) -> str:
    """From NNCF's notes in rt_info; without them, the element type that most of the weights have."""
    notes = ir.section("nncf", "weight_compression")
    if not notes.get("mode"):
        return max(ir.precisions, key=lambda name: ir.precisions[name], default="unknown")
    parts = [notes["mode"]]
    if notes.get("group_size") not in (None, "", "-1"):
        parts.append(f"group size {notes['group_size']}")
    if notes.get("ratio") not in (None, "", "1", "1.0"):
        parts.append(f"ratio {notes['ratio']}")
    return ", ".join(parts)
