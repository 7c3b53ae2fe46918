"""Fingerprint of a saved KV cache: everything that its keys and values depend on.

Keys and values are valid only for the model that computed them, with the ids that its tokenizer made. The fingerprint
is stored beside them and compared when they are loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from ov_phi3.errors import SnapshotError
from ov_phi3.system import versions

if TYPE_CHECKING:
    from ov_phi3.model.info import ModelInfo
    from ov_phi3.text.template import ChatTemplate

__all__ = ["ADAPTERS", "KEYS_ALONE", "check_fingerprint", "fingerprint_of", "same_keys"]

_RELEASE = "engine"
ADAPTERS = "adapters"
"""Key of the LoRA adapters in a fingerprint."""

KEYS_ALONE = (ADAPTERS, _RELEASE)
"""Parts that change keys and values, but no token ids."""

# What a difference means, in the order in which it is reported.
_MEANING = {
    "model": "another model",
    "recipe": "another export of the model",
    "tokenizer": "another tokenizer",
    "template": "another chat template",
    "rope": "another RoPE configuration",
    ADAPTERS: "a pipeline with other LoRA adapters",
    _RELEASE: "another OpenVINO release",
}

_MISSING = {ADAPTERS: "none"}


def fingerprint_of(
    info: ModelInfo, template: ChatTemplate, adapters: Sequence[tuple[str, float]] = ()
) -> dict[str, str]:
    """Model, recipe, tokenizer, template, rope, adapters where there are any, and engine, each as text.

    `model` is `ModelInfo.fingerprint` (config, graph, samples of the weights). `tokenizer` and `template` hold the
    first 32 hexadecimal digits of a SHA-256, of the tokenizer's files and of the chat template. The others can be
    read.
    """
    digest = hashlib.sha256()
    for name in ("openvino_tokenizer.xml", "openvino_tokenizer.bin"):
        file = info.path / name
        digest.update(file.read_bytes() if file.is_file() else b"")
    applied = ", ".join(sorted(f"{sha256[:32]} times {factor:.9g}" for sha256, factor in adapters))
    boundary = "none" if info.rope_boundary is None else f"factors change at {info.rope_boundary} tokens"
    return {
        "model": info.fingerprint,
        "recipe": info.quantization,
        "tokenizer": digest.hexdigest()[:32],
        "template": f"{template.name} {hashlib.sha256(repr(template).encode()).hexdigest()[:32]}",
        "rope": f"{info.rope_type or 'plain'}, {boundary}",
        **({ADAPTERS: applied} if applied else {}),
        _RELEASE: f"openvino {versions.release(versions.package_version('openvino') or 'unknown')}",
    }


def check_fingerprint(
    saved: Mapping[str, str], expected: Mapping[str, str], source: str, *, but: Collection[str] = ()
) -> None:
    """Refuse a saved KV cache of something else.

    Args:
        saved: the fingerprint in the file.
        expected: the pipeline's fingerprint.
        source: the file, for the message.
        but: parts that may differ, such as `KEYS_ALONE` for a file of which only the token ids are needed.

    Raises:
        SnapshotError: they differ; the message names the part that differs.
    """
    for key, meaning in _MEANING.items():
        of_file, here = _value(saved, key), _value(expected, key)
        if of_file != here and key not in but:
            raise SnapshotError(
                f"{source} is of {meaning}: {key} is {of_file!r} in the file and {here!r} here. Load it with the "
                f"{'adapters' if key == ADAPTERS else 'model'} that it was made with, or build it again."
            )


def same_keys(saved: Mapping[str, str], expected: Mapping[str, str]) -> bool:
    """Whether a file that was accepted for its ids was made by the same release with the same adapters.

    If not, its keys and values must be computed again.
    """
    return all(_value(saved, key) == _value(expected, key) for key in KEYS_ALONE)


def _value(fingerprint: Mapping[str, str], key: str) -> str:
    return fingerprint.get(key, _MISSING.get(key, "missing"))
