"""Contents of a model directory, read once, checked, and held as plain values. Needs neither openvino nor numpy."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ov_phi3.errors import ModelError
from ov_phi3.files import expanded
from ov_phi3.model.config import JsonFile, Phi3Config, read_json
from ov_phi3.model.files import check_directory, check_files, fingerprint
from ov_phi3.model.ir import IrSummary
from ov_phi3.model.tokens import AddedToken, TokenizerFiles, end_token_ids, family_of

__all__ = ["MANIFEST", "AddedToken", "ModelInfo"]

MANIFEST = "ov_phi3.json"
"""The file in which `ov_phi3.export` records how a model was exported."""

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
    """Properties of a complete, exported model, as its files give them.

    Attributes:
        path: the directory, absolute.
        model_type: `model_type` of `config.json`, always "phi3".
        family: "phi-3", "phi-3-april-2024" (no system message), "phi-3.5", "phi-4-mini", "phi-4", or
            "phi3-compatible": the same architecture with another vocabulary.
        context_length: tokens that prompt and reply share (`max_position_embeddings`).
        original_context_length: tokens that the model was trained on before RoPE was extended; equal to
            `context_length` without an extension.
        rope_type: "longrope", or None for plain RoPE; any other value is the name in `config.json`.
        rope_boundary: the LongRoPE boundary: sequences up to this length, in tokens, use the short factors, longer ones
            the long factors. Keys cached with one set of factors are wrong with the other. None if the factors do not
            change within `context_length`.
        sliding_window: tokens that each token attends to, or None for all.
        vocab_size: rows of the output layer; all ids are below it.
        hidden_size: width of the hidden state.
        num_layers: decoder layers.
        num_attention_heads: query heads per layer.
        num_kv_heads: key and value heads per layer.
        head_dim: width of a head.
        partial_rotary_factor: fraction of a head that RoPE rotates.
        eos_token_ids: all ids that end a reply, sorted: those of `config.json`, `generation_config.json` and the
            tokenizer, and those of the family if the tokenizer has them.
        eos_token: text of the tokenizer's end token, or None.
        bos_token_id: id of the token that starts a text, or None.
        bos_token: text of that token, or None.
        pad_token_id: id of the padding token, or None.
        chat_template: Jinja source, or None.
        added_tokens: tokens, among them all control tokens, that the tokenizer finds in a text before it splits the
            rest; sorted by id.
        generation_defaults: options of `generation_config.json`, by their Hugging Face names.
        weight_bytes: size of `openvino_model.bin`, in bytes.
        quantization: format of the weights, such as "int4_sym, group size 128, ratio 0.6" or "f16".
        runtime_options: options for the runtime that the exporter stored in the model, such as `KV_CACHE_PRECISION`.
        exporter_versions: version by package name, as stored in the model; unknown packages are left out.
        manifest: how the model was exported (`ov_phi3.json`), or None.
        fingerprint: hash of the config, the graph and samples of the weights; copies have the same one.
        warnings: sentences about properties that limit the model but do not stop it from running.
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
        """Read and check the directory of an exported model. Takes milliseconds; loads no weights.

        Raises:
            ModelError: the directory is missing, incomplete (the message names all missing files), damaged, not
                exported yet, or of another architecture.
            TypeError: `path` is not a path.
        """
        files = _Files.read(path)
        config, tokens, ir = files.config, files.tokens, files.ir
        family = family_of(tokens.added, tokens.chat_template)
        warnings = _Warnings(config)
        special = _special_tokens(files, family, warnings)
        exporter = {name: version for name, keys in _EXPORTER_KEYS.items() if (version := ir.info(*keys))}
        warnings.check_tokens(tokens, special.eos)
        warnings.check_longrope(exporter.get("optimum-intel"))
        return cls(
            path=files.directory,
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
            eos_token_ids=special.eos,
            eos_token=tokens.text("eos_token"),
            bos_token_id=special.bos,
            bos_token=tokens.text("bos_token"),
            pad_token_id=special.pad,
            chat_template=tokens.chat_template,
            added_tokens=tokens.added,
            generation_defaults={k: v for k, v in files.generation.data.items() if k not in _NOT_OPTIONS},
            weight_bytes=ir.weight_bytes,
            quantization=_quantization(ir),
            runtime_options=ir.section("runtime_options"),
            exporter_versions=exporter,
            manifest=files.manifest,
            fingerprint=fingerprint(files.directory, config.file.path, ir, _merged_adapter(files.manifest)),
            warnings=tuple(warnings.sentences),
        )

    load = from_dir

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache per token in float16, the precision of GPUs and of snapshots."""
        return self.kv_bytes_per_token_for(16)

    def kv_bytes_per_token_for(self, bits: int) -> int:
        """Bytes of KV cache per token: 2 (key and value) x layers x KV heads x head width x bits / 8.

        The scales that a quantised cache (8 or 4 bits) stores beside its values are not counted, because they depend
        on the device.

        Raises:
            ValueError: `bits` is not positive.
        """
        if bits <= 0:
            raise ValueError(f"bits is {bits}; expected 16, 8 or 4, or 32 for float32.")
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bits // 8

    def to_dict(self) -> dict[str, Any]:
        """All fields, and `kv_bytes_per_token`, as JSON-ready values."""
        values = {**dataclasses.asdict(self), "path": str(self.path)}
        return {**values, "kv_bytes_per_token": self.kv_bytes_per_token}


class _Files(NamedTuple):
    """The files of a model directory, read and checked one by one."""

    directory: Path
    config: Phi3Config
    ir: IrSummary
    tokens: TokenizerFiles
    generation: JsonFile
    manifest: Mapping[str, Any] | None

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> _Files:
        directory = Path(os.path.abspath(expanded(path)))  # noqa: PTH100 - resolve() would follow symlinks
        names = check_directory(directory, os.fsdecode(path))
        # Read first: for another architecture, its name is a better message than a list of missing files.
        config = Phi3Config.read(directory / "config.json") if names.get("config.json") else None
        check_files(directory, names)
        assert config is not None  # check_files has raised otherwise
        return cls(
            directory,
            config,
            _read_ir(directory),
            TokenizerFiles(directory, names),
            _optional_json(directory, names, "generation_config.json"),
            read_json(directory / MANIFEST).data if MANIFEST in names else None,
        )


def _read_ir(directory: Path) -> IrSummary:
    for stem in ("openvino_tokenizer", "openvino_detokenizer"):
        IrSummary.read(directory, stem)
    ir = IrSummary.read(directory, "openvino_model")
    if not ir.stateful:
        raise ModelError(
            f"{directory / 'openvino_model.xml'} keeps no KV cache in its state. Export again with "
            "--task text-generation-with-past and without --disable-stateful, as `ov-phi3 export` does."
        )
    return ir


def _optional_json(directory: Path, names: Mapping[str, int], name: str) -> JsonFile:
    return read_json(directory / name) if name in names else JsonFile(directory / name, {})


class _SpecialTokens(NamedTuple):
    """Ids of the tokens that end, start and pad a text."""

    eos: tuple[int, ...]
    bos: int | None
    pad: int | None


def _special_tokens(files: _Files, family: str, warnings: _Warnings) -> _SpecialTokens:
    tokens, configs = files.tokens, (files.config.file, files.generation)
    eos = {*end_token_ids(tokens.added, family, tokens.chat_template)}
    for file in configs:
        eos.update(warnings.ids_in_vocabulary(file, "eos_token_id"))
    for eos_token in (tokens.id_of(tokens.text("eos_token")), tokens.graph_id("eos_token_id")):
        if eos_token is not None and eos_token < files.config.vocab_size:
            eos.add(eos_token)

    def first(key: str, token: str) -> int | None:
        """The id in generation_config.json, else in config.json, else of the tokenizer's token."""
        ids = [id_ for file in reversed(configs) for id_ in warnings.ids_in_vocabulary(file, key)]
        return ids[0] if ids else tokens.id_of(tokens.text(token))

    return _SpecialTokens(tuple(sorted(eos)), first("bos_token_id", "bos_token"), first("pad_token_id", "pad_token"))


class _Warnings:
    """Collects the warnings about a model."""

    def __init__(self, config: Phi3Config) -> None:
        self.sentences: list[str] = []
        self._config = config

    def ids_in_vocabulary(self, file: JsonFile, key: str) -> list[int]:
        """The token ids under a key, without those outside the vocabulary, for which it adds a warning."""
        ids = file.token_ids(key)
        size = self._config.vocab_size
        outside = [id_ for id_ in ids if not 0 <= id_ < size]
        if outside and outside != [-1]:  # -1 has long been written for "none"
            self.sentences.append(
                f"{file.path.name}: {key} has {', '.join(map(str, outside))}, outside the vocabulary of {size} tokens; "
                "ignored."
            )
        return [id_ for id_ in ids if 0 <= id_ < size]

    def check_tokens(self, tokens: TokenizerFiles, eos: tuple[int, ...]) -> None:
        if not tokens.known:
            self.sentences.append(
                "No tokenizer.json and no tokenizer_config.json, and the tokenizer's graph names no control tokens. "
                "Copy both from the model that this was exported from."
            )
        if tokens.chat_template is None:
            self.sentences.append("No chat template in the directory; Phi-3's is assumed.")
        if not eos:
            self.sentences.append("No file names an end token: replies end at their length limit only.")

    def check_longrope(self, optimum_intel: str | None) -> None:
        boundary = self._config.rope_boundary
        if boundary is None or (optimum_intel is not None and _major(optimum_intel) >= 2):
            return
        if optimum_intel is None:
            self.sentences.append(
                "LongRoPE model, and the file does not name the version of optimum-intel that exported it: exports "
                f"before 2.0 are wrong past {boundary} tokens. Export again to be sure."
            )
        else:
            self.sentences.append(
                f"Exported by optimum-intel {optimum_intel}, whose LongRoPE models (before 2.0) are wrong past "
                f"{boundary} tokens. Export again with the current version, or keep context_length at or below that."
            )


def _merged_adapter(manifest: Mapping[str, Any] | None) -> str:
    """Hash of the adapter that was merged, by the manifest; "" without one."""
    adapter = (manifest or {}).get("adapter")
    return str(adapter.get("sha256", "")) if isinstance(adapter, dict) else ""


def _major(version: str) -> int:
    number = re.match(r"\d+", version)
    return int(number[0]) if number else 0


def _quantization(ir: IrSummary) -> str:
    """NNCF's notes in rt_info; without them, the element type of most weights."""
    notes = ir.section("nncf", "weight_compression")
    if not notes.get("mode"):
        return max(ir.precisions, key=lambda name: ir.precisions[name], default="unknown")
    parts = [notes["mode"]]
    if notes.get("group_size") not in (None, "", "-1"):
        parts.append(f"group size {notes['group_size']}")
    if notes.get("ratio") not in (None, "", "1", "1.0"):
        parts.append(f"ratio {notes['ratio']}")
    return ", ".join(parts)
