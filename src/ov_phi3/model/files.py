"""The files of an exported model: the required ones, and a fingerprint of the model."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

from ov_phi3.errors import ModelError
from ov_phi3.model.ir import IrSummary

__all__ = [
    "REQUIRED_FILES",
    "UNFINISHED",
    "check_directory",
    "check_files",
    "fingerprint",
    "has_weights",
    "listing",
]

REQUIRED_FILES = (
    "config.json",
    "openvino_model.xml",
    "openvino_model.bin",
    "openvino_tokenizer.xml",
    "openvino_tokenizer.bin",
    "openvino_detokenizer.xml",
    "openvino_detokenizer.bin",
)

UNFINISHED = "ov_phi3.unfinished"
"""Name of the file that marks the directory of an export which has not finished."""

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w-]*/[A-Za-z0-9][\w.-]*")  # owner/name
_WEIGHTS = (".safetensors", ".gguf", ".pt", ".pth")
_SAMPLES, _SAMPLE_BYTES = 64, 4096


def listing(directory: Path) -> dict[str, int]:
    """The files in a directory, with their sizes in bytes.

    Raises:
        ModelError: the directory cannot be read.
    """
    try:
        with os.scandir(directory) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    except OSError as error:
        raise ModelError(f"{directory} cannot be read: {error.strerror or error}.") from error


def has_weights(names: Mapping[str, int]) -> bool:
    """Whether Hugging Face weights are among the files."""
    return any(name.endswith(_WEIGHTS) or re.fullmatch(r"pytorch_model.*\.bin", name) for name in names)


def check_directory(directory: Path, given: str) -> dict[str, int]:
    """The files of a directory that exists and is not empty, with their sizes in bytes.

    Args:
        directory: the directory.
        given: its path as the caller wrote it.

    Raises:
        ModelError: the directory is missing, a file, empty or unreadable, or an export into it has not finished.
    """
    try:
        exists, is_directory = directory.exists(), directory.is_dir()
    except (OSError, ValueError) as error:
        raise ModelError(f"{str(directory)!r} cannot be read as a path: {error}.") from error
    if not exists and _HUB_NAME.fullmatch(given) and not directory.parent.exists():
        raise ModelError(
            f"{directory} does not exist, and {given!r} looks like a name on the Hugging Face hub. load() takes the "
            f"directory of an exported model: ov_phi3.export({given!r}, DIRECTORY) or `ov-phi3 export {given} "
            "DIRECTORY` makes one. A model that is in OpenVINO's format already only has to be downloaded."
        )
    if not exists:
        raise ModelError(f"{directory} does not exist; expected a directory made by `ov-phi3 export`.")
    if not is_directory:
        raise ModelError(f"{directory} is a file; expected the directory that holds it, {directory.parent}.")
    names = listing(directory)
    if UNFINISHED in names:
        raise ModelError(f"{directory} is an export that has not finished, or was killed; export again.")
    if not names:
        raise ModelError(
            f"{directory} holds no files; expected a directory made by `ov-phi3 export`.{_nearby(directory)}"
        )
    return names


def check_files(directory: Path, names: Mapping[str, int]) -> None:
    """Check that all of `REQUIRED_FILES` are in the directory and not empty.

    Raises:
        ModelError: some are missing or empty; the message names each of them with a fix.
    """
    if "openvino_model.xml" not in names and has_weights(names):
        raise ModelError(
            f"{directory} is a Hugging Face model that is not exported yet. Export it first, then load the result: "
            f'ov-phi3 export "{directory}" "{directory}-int4"'
        )
    if "openvino_model.xml" not in names and "config.json" not in names:
        raise ModelError(
            f"{directory} holds no model; expected a directory made by `ov-phi3 export`.{_nearby(directory)}"
        )
    missing = [name for name in REQUIRED_FILES if not names.get(name)]
    if missing:
        lines = [
            f"  {name} is {'empty' if name in names else 'missing'}: {_remedy(directory, name)}" for name in missing
        ]
        raise ModelError(f"{directory} is not a complete model:\n" + "\n".join(lines))


def _nearby(directory: Path) -> str:
    models = sorted(str(path.parent) for path in directory.glob("*/openvino_model.xml"))
    return f" Did you mean {models[0]!r}?" if models else ""


def _remedy(directory: Path, name: str) -> str:
    if "tokenizer" in name:
        return f'convert_tokenizer "{directory}" --with-detokenizer -o "{directory}"'
    if name == "config.json":
        return "copy it from the model that this was exported from, or export again"
    return "export again (ov-phi3 export SOURCE DIRECTORY)"


def fingerprint(directory: Path, config: Path, ir: IrSummary, adapter: str = "") -> str:
    """A hash of a model's config, its graph, and 64 samples of 4 KiB of its weights; takes milliseconds.

    Args:
        directory: the model's directory.
        config: its `config.json`.
        ir: its graph.
        adapter: hash of an adapter that was merged: it can change few weights, which the samples may miss.

    Raises:
        ModelError: a file cannot be read.
    """
    digest = hashlib.sha256(ir.xml)
    digest.update(adapter.encode())
    try:
        digest.update(config.read_bytes())
        digest.update(str(ir.weight_bytes).encode())
        with (directory / "openvino_model.bin").open("rb") as file:
            last = max(0, ir.weight_bytes - _SAMPLE_BYTES)
            for sample in range(_SAMPLES):
                file.seek(last * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    except OSError as error:
        raise ModelError(f"{error.filename or directory} cannot be read: {error.strerror or error}.") from error
    return digest.hexdigest()[:32]
