"""Fingerprint of a saved KV cache: everything that its keys and values depend on.

Keys and values are valid only for the model that computed them, with the ids that its tokenizer made. The fingerprint
is stored beside them and compared when they are loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ov_phi3.errors import SnapshotError
from ov_phi3.system import versions

if TYPE_CHECKING:
    from ov_phi3.model.info import ModelInfo
    from ov_phi3.text.template import ChatTemplate

__all__ = ["RELEASE", "check_fingerprint", "fingerprint_of"]

RELEASE = "engine"
"""Key of the OpenVINO release in a fingerprint."""

# What a difference means, in the order in which it is reported.
_MEANING = {
    "model": "another model",
    "recipe": "another export of the model",
    "tokenizer": "another tokenizer",
    "template": "another chat template",
    "rope": "another RoPE configuration",
    RELEASE: "another OpenVINO release",
}


def fingerprint_of(info: ModelInfo, template: ChatTemplate) -> dict[str, str]:
    """Model, recipe, tokenizer, template, rope and engine, each as text.

    `model` is `ModelInfo.fingerprint` (config, graph, samples of the weights). `tokenizer` and `template` hold the
    first 32 hexadecimal digits of a SHA-256, of the tokenizer's files and of the chat template. The others can be
    read.
    """
    digest = hashlib.sha256()
    for name in ("openvino_tokenizer.xml", "openvino_tokenizer.bin"):
        file = info.path / name
        digest.update(file.read_bytes() if file.is_file() else b"")
    boundary = "none" if info.rope_boundary is None else f"factors change at {info.rope_boundary} tokens"
    return {
        "model": info.fingerprint,
        "recipe": info.quantization,
        "tokenizer": digest.hexdigest()[:32],
        "template": f"{template.name} {hashlib.sha256(repr(template).encode()).hexdigest()[:32]}",
        "rope": f"{info.rope_type or 'plain'}, {boundary}",
        RELEASE: f"openvino {versions.release(versions.package_version('openvino') or 'unknown')}",
    }


def check_fingerprint(
    saved: Mapping[str, str], expected: Mapping[str, str], source: str, *, any_release: bool = False
) -> None:
    """Refuse a saved KV cache of something else.

    Args:
        saved: the fingerprint in the file.
        expected: the pipeline's fingerprint.
        source: the file, for the message.
        any_release: accept a file of another OpenVINO release.

    Raises:
        SnapshotError: they differ; the message names the part that differs.
    """
    for key, meaning in _MEANING.items():
        if saved.get(key) != expected[key] and not (any_release and key == RELEASE):
            raise SnapshotError(
                f"{source} is of {meaning}: {key} is {saved.get(key, 'missing')!r} in the file and {expected[key]!r} "
                "here. Load it with the model that it was made with, or build it again."
            )
