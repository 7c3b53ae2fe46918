"""What a saved KV cache is of: a model, a tokenizer, a layout, a RoPE regime, an engine.

Keys and values mean something only to the model that made them, behind the ids that its tokenizer gave. So all that
they depend on is written beside them, and compared when they are loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ov_phi3 import versions
from ov_phi3.errors import SnapshotError

if TYPE_CHECKING:
    from ov_phi3.model_info import ModelInfo
    from ov_phi3.template import ChatTemplate

__all__ = ["check_identity", "identity_of"]

_WORDS = {
    "model": "another model",
    "recipe": "another export of the model",
    "tokenizer": "another tokenizer",
    "template": "another chat layout",
    "rope": "another RoPE regime",
    "engine": "another OpenVINO release",
}
"""What differs, in the order in which it is told."""


def identity_of(info: ModelInfo, template: ChatTemplate) -> dict[str, str]:
    """The parts of a fingerprint, each as text: model, recipe, tokenizer, template, rope and engine.

    `model` is `ModelInfo.fingerprint` (config, graph, samples of the weights), `tokenizer` and `template` are SHA-256
    of the tokenizer's files and of the layout, cut to 32 digits; the others can be read.
    """
    digest = hashlib.sha256()
    for name in ("openvino_tokenizer.xml", "openvino_tokenizer.bin"):
        file = info.path / name
        digest.update(file.read_bytes() if file.is_file() else b"")
    regime = "none" if info.rope_boundary is None else f"factors change at {info.rope_boundary} tokens"
    return {
        "model": info.fingerprint,
        "recipe": info.quantization,
        "tokenizer": digest.hexdigest()[:32],
        "template": f"{template.name} {hashlib.sha256(repr(template).encode()).hexdigest()[:32]}",
        "rope": f"{info.rope_type or 'plain'}, {regime}",
        "engine": f"openvino {versions.release(versions.package_version('openvino') or 'unknown')}",
    }


def check_identity(found: Mapping[str, str], wanted: Mapping[str, str], where: str, *, engine: bool = True) -> None:
    """Refuse a snapshot of something else.

    Args:
        found: the snapshot's identity.
        wanted: the pipeline's.
        where: the file, for the message.
        engine: whether the OpenVINO release counts.

    Raises:
        SnapshotError: they differ; the message says in what.
    """
    for key, words in _WORDS.items():
        if found.get(key) != wanted[key] and (engine or key != "engine"):
            raise SnapshotError(
                f"{where} is of {words}: {key} is {found.get(key, 'not told')!r} there and {wanted[key]!r} here. "
                "Load it with the model that it was made with, or build it again."
            )
