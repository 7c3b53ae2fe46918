"""A LoRA adapter in peft's files: read, and checked against the model that it is for.

An adapter changes a weight W to W + s * B A, with A of shape [r, in], B of shape [out, r] and s = lora_alpha / r, or
lora_alpha / sqrt(r) with rsLoRA (https://arxiv.org/abs/2106.09685, https://arxiv.org/abs/2312.03732). The names of
files, keys and tensors are peft's (https://huggingface.co/docs/peft/developer_guides/checkpoint).
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ov_phi3.errors import ModelError
from ov_phi3.files import expanded
from ov_phi3.model.config import JsonFile, Phi3Config, read_json
from ov_phi3.model.safetensors import TensorEntry, read_header, read_tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["ADAPTER_CONFIG", "ADAPTER_WEIGHTS", "HUB_NAME", "Adapter", "read_adapter"]

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""A name on the Hugging Face hub."""

_PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
_MAGNITUDE = "lora_magnitude_vector"
_TENSOR = re.compile(
    rf"base_model\.model\.(?P<module>.+?)\.(?P<part>lora_[AB]\.weight|lora_embedding_[AB]|{_MAGNITUDE}|weight)"
)
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_MERGE = "Merge it instead: ov_phi3.export(SOURCE, DIRECTORY, adapter=...)."
# Keys of adapter_config.json whose adapters depend on the input, or have other parts than W + s B A.
_UNKNOWN_METHODS = ("alora_invocation_tokens", "arrow_config", "layer_replication", "target_parameters", "use_qalora")
# Keys whose adapters have no single scale, or lie otherwise in the file: a merge knows them, the load does not.
_MERGE_ONLY = ("use_dora", "alpha_pattern", "rank_pattern", "fan_in_fan_out", "trainable_token_indices")


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        path: the folder or file, absolute.
        weights: the safetensors file.
        config: `adapter_config.json`; None for a file without one beside it.
        tensors: the tensors of the file by name.
        sha256: hash of its weights and its config.
    """

    path: Path
    weights: Path
    config: JsonFile | None
    tensors: Mapping[str, TensorEntry]
    sha256: str

    @property
    def base(self) -> str | None:
        """The model that it was trained on, as its config names it."""
        name = None if self.config is None else self.config.data.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None

    @property
    def rank(self) -> int | None:
        """Its rank r, as its config names it; single modules may have another one."""
        return None if self.config is None else self.config.integer("r", maximum=2**20)

    @property
    def scale(self) -> float | None:
        """The factor s; None without a config."""
        if self.config is None or self.rank is None:
            return None
        alpha = self.config.data.get("lora_alpha")
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise self.config.error("lora_alpha", alpha, "a number")
        return alpha / (math.sqrt(self.rank) if self.config.data.get("use_rslora") else self.rank)

    def to_dict(self) -> dict[str, str | int | float | None]:
        """What a manifest records about it."""
        names = {"path": str(self.path), "base": self.base, "sha256": self.sha256}
        return {**names, "rank": self.rank, "scale": self.scale}

    def check_unchanged(self) -> None:
        """Check that its files are those that were read.

        Raises:
            ModelError: they are gone, or changed.
        """
        if _sha256(self.weights, self.config) != self.sha256:
            raise ModelError(f"{self.path} has changed since the model was loaded. Load the model anew for it.")

    def check_fit(self, model: Phi3Config, name: str | None) -> None:
        """Check that it belongs to a model.

        Args:
            model: the model's config.
            name: where the model is from: a name on the hub, or a path; None if unknown.

        Raises:
            ModelError: it was trained on another model, or has modules, ranks or shapes that do not fit.
        """
        if self.base and name and _is_other_model(self.base, name):
            raise ModelError(
                f"{self.path} was trained on {self.base!r}, and the model is {name!r}. Take that model; if the two "
                f"have the same weights, change base_model_name_or_path in {ADAPTER_CONFIG}."
            )
        widths = _widths(model)
        for module, parts in self._modules().items():
            if module not in widths:
                raise ModelError(f"{self.weights} changes {module!r}, {_why_unknown(module, model)}")
            if module in ("lm_head", "model.embed_tokens") and model.file.data.get("tie_word_embeddings"):
                raise ModelError(
                    f"{self.weights} changes {module!r}, which shares its weights with another layer of this model "
                    "(tie_word_embeddings). Train an adapter without it."
                )
            self._check_shapes(module, parts, *widths[module])

    def check_loadable(self) -> None:
        """Check that it can be applied to a loaded model; GenAI ignores parts that it does not know.

        Raises:
            ModelError: it needs more than W + s * B A with one s, for the linear layers.
        """
        if self.config is not None:
            for key in _MERGE_ONLY:
                if value := self.config.data.get(key):
                    raise ModelError(f"{self.config.path}: {key} is {value!r}, which is not applied at load. {_MERGE}")
        for module, parts in self._modules().items():
            if parts.keys() != {"lora_A.weight", "lora_B.weight"} or not _LAYER.fullmatch(module):
                raise ModelError(
                    f"{self.weights} changes {module!r} by {', '.join(sorted(parts))}; at load only lora_A and lora_B "
                    f"of the decoder layers are applied. {_MERGE}"
                )

    def matrices(self) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """A [r, in] and B [out, r] by module, such as "model.layers.0.mlp.down_proj", for one that is loadable.

        Raises:
            ModelError: the file cannot be read, or holds no floating-point numbers.
        """

        def read(module: str, part: str) -> NDArray[np.float32]:
            return read_tensor(self.weights, self.tensors[f"base_model.model.{module}.{part}"])

        return {module: (read(module, "lora_A.weight"), read(module, "lora_B.weight")) for module in self._modules()}

    def _modules(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Shape by part, by module."""
        modules: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, entry in self.tensors.items():
            match = _TENSOR.fullmatch(name.replace(f"{_MAGNITUDE}.weight", _MAGNITUDE))
            if match is None:
                raise ModelError(
                    f"{self.weights} has a tensor {name!r}; expected peft's names, such as "
                    "'base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight'."
                )
            modules.setdefault(match["module"], {})[match["part"]] = entry.shape
        return modules

    def _check_shapes(self, module: str, parts: Mapping[str, tuple[int, ...]], wide: int, high: int) -> None:
        expected: dict[str, tuple[int, ...]] = {"weight": (high, wide), _MAGNITUDE: (high,)}
        for a, b in _PAIRS:
            if (a in parts) != (b in parts):
                raise ModelError(f"{self.weights} has {a if a in parts else b} of {module!r} without its counterpart.")
            if a in parts:
                rank = self._rank_of(parts[a])
                # An embedding is a matrix [vocabulary, width] whose rows are looked up: its A has the rows.
                first, second = (high, wide) if "embedding" in a else (wide, high)
                expected[a], expected[b] = (rank, first), (second, rank)
        for part, shape in parts.items():
            if shape != expected[part]:
                raise ModelError(
                    f"{self.weights}: {part} of {module!r} has the shape {list(shape)}; this model needs "
                    f"{list(expected[part])}. It was trained on another model, or its {ADAPTER_CONFIG} is of another "
                    "adapter."
                )

    def _rank_of(self, shape: tuple[int, ...]) -> int:
        """The rank that a module must have: the config's, or its own by `rank_pattern` or without a config."""
        if self.rank is None or (self.config is not None and self.config.data.get("rank_pattern")):
            return shape[0] if shape else 0
        return self.rank


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read an adapter: a folder with `adapter_config.json` and `adapter_model.safetensors`, or a safetensors file.

    Raises:
        ModelError: it is missing, damaged, or no LoRA adapter in peft's format.
        TypeError: `path` is not a path.
    """
    given = Path(os.path.abspath(expanded(path)))  # noqa: PTH100 - resolve() would follow symlinks
    if not given.exists():
        raise ModelError(f"{given} does not exist; expected the folder of a LoRA adapter, or its safetensors file.")
    folder = given if given.is_dir() else given.parent
    weights = folder / ADAPTER_WEIGHTS if given.is_dir() else given
    config = read_json(folder / ADAPTER_CONFIG) if (folder / ADAPTER_CONFIG).is_file() else None
    if given.is_dir() and config is None:
        raise ModelError(f"{given} has no {ADAPTER_CONFIG}; expected a LoRA adapter that peft saved.")
    if config is not None:
        _check_method(config)
    if not weights.is_file():
        raise ModelError(
            f"{given} has no {ADAPTER_WEIGHTS}; save the adapter again with peft's save_pretrained(), which writes it."
        )
    tensors = read_header(weights)
    if not tensors:
        raise ModelError(f"{weights} holds no tensors.")
    return Adapter(given, weights, config, tensors, _sha256(weights, config))


def _sha256(weights: Path, config: JsonFile | None) -> str:
    try:
        digest = hashlib.sha256(weights.read_bytes())
        if config is not None:
            digest.update(config.path.read_bytes())
    except OSError as error:
        raise ModelError(f"{error.filename or weights} cannot be read: {error.strerror or error}.") from error
    return digest.hexdigest()


def _check_method(config: JsonFile) -> None:
    kind = config.data.get("peft_type")
    if kind != "LORA":
        raise config.error("peft_type", kind, "'LORA'; other kinds of adapters are not supported")
    for key in _UNKNOWN_METHODS:
        if value := config.data.get(key):
            raise ModelError(f"{config.path}: {key} is {value!r}, which is not supported; expected plain LoRA or DoRA.")


def _is_other_model(base: str, name: str) -> bool:
    """Whether two names on the hub differ. A path says nothing: the same model can lie anywhere."""
    both = all(HUB_NAME.fullmatch(text) and not Path(text).exists() for text in (base, name))
    return both and base.lower() != name.lower()


def _widths(model: Phi3Config) -> dict[str, tuple[int, int]]:
    """Width of the input and of the output by module."""
    hidden, inner = model.hidden_size, model.intermediate_size
    heads, kv_heads = model.num_attention_heads * model.head_dim, model.num_kv_heads * model.head_dim
    layer = {
        "self_attn.qkv_proj": (hidden, heads + 2 * kv_heads),
        "self_attn.o_proj": (heads, hidden),
        "mlp.gate_up_proj": (hidden, 2 * inner),
        "mlp.down_proj": (inner, hidden),
    }

    def all_modules() -> Iterator[tuple[str, tuple[int, int]]]:
        for index in range(model.num_layers):
            yield from ((f"model.layers.{index}.{name}", widths) for name, widths in layer.items())
        yield "lm_head", (hidden, model.vocab_size)

    return {**dict(all_modules()), "model.embed_tokens": (hidden, model.vocab_size)}


def _why_unknown(module: str, model: Phi3Config) -> str:
    match = _LAYER.fullmatch(module)
    if match and int(match[1]) >= model.num_layers:
        return f"and the model has {model.num_layers} layers: it is of another model."
    return (
        "which is none of qkv_proj, o_proj, gate_up_proj, down_proj, lm_head and embed_tokens of a Phi-3 class model: "
        "the adapter is of another architecture, or of a copy of the model with split projections."
    )
