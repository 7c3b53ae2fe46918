"""The files of an exported model: which must be there, and whether the two halves of an OpenVINO IR fit together."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union
from xml.etree import ElementTree as ET

from ov_phi3.errors import ModelError

__all__ = [
    "REQUIRED_FILES",
    "UNFINISHED",
    "Ir",
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
"""While an export runs, its directory holds a file of this name."""

_WEIGHTS = (".safetensors", ".gguf", ".pt", ".pth")
_CONSTANT = re.compile(rb'<data element_type="(\w+)" shape="[^"]*" offset="(\d+)" size="(\d+)"')
_SAMPLES, _SAMPLE_BYTES = 64, 4096

RtInfo = Mapping[str, Union[str, "RtInfo"]]


def listing(directory: Path) -> dict[str, int]:
    """The files in a directory: name to size in bytes.

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


def check_directory(directory: Path) -> dict[str, int]:
    """The files of a directory that exists and is not empty, with their sizes in bytes.

    Raises:
        ModelError: it is missing, a file, empty or unreadable, or an export into it has not finished.
    """
    try:
        exists, is_directory = directory.exists(), directory.is_dir()
    except (OSError, ValueError) as error:
        raise ModelError(f"{str(directory)!r} cannot be read as a path: {error}.") from error
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
    """See that all of `REQUIRED_FILES` are in the directory, none of them empty.

    Raises:
        ModelError: some are not; all of them are named, with what to do about each.
    """
    if "openvino_model.xml" not in names and has_weights(names):
        raise ModelError(
            f"{directory} is a Hugging Face model that is not exported yet. Export it first, and load the result: "
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
    inside = sorted(str(path.parent) for path in directory.glob("*/openvino_model.xml"))
    return f" Did you mean {inside[0]!r}?" if inside else ""


def _remedy(directory: Path, name: str) -> str:
    if "tokenizer" in name:
        return f'convert_tokenizer "{directory}" --with-detokenizer -o "{directory}"'
    if name == "config.json":
        return "copy it from the model that this was exported from, or export again"
    return "export again (ov-phi3 export SOURCE DIRECTORY)"


@dataclass(frozen=True, slots=True)
class Ir:
    """An OpenVINO IR as its XML describes it, read as text: nothing is loaded.

    Attributes:
        xml: the `.xml` file's bytes.
        weight_bytes: size of the `.bin` file.
        precisions: bytes of constants per element type ("i4", "u8", "f16", ...).
        rt_info: what the exporter noted about itself; {} when it cannot be read.
    """

    xml: bytes
    weight_bytes: int
    precisions: Mapping[str, int]
    rt_info: RtInfo

    @classmethod
    def read(cls, directory: Path, stem: str) -> Ir:
        """Read `<stem>.xml`, and hold it against the size of `<stem>.bin`.

        Raises:
            ModelError: the XML is cut off or no IR, or the `.bin` is shorter than the constants in the XML need.
        """
        xml_file, bin_file = directory / f"{stem}.xml", directory / f"{stem}.bin"
        try:
            xml, size = xml_file.read_bytes(), bin_file.stat().st_size
        except OSError as error:
            raise ModelError(f"{error.filename or xml_file} cannot be read: {error.strerror or error}.") from error
        if b"<net " not in xml[:4096] or not xml.rstrip().endswith(b"</net>"):
            raise ModelError(f"{xml_file} is not an OpenVINO model, or is cut off ({len(xml)} bytes); export again.")
        needed, precisions = _constants(xml)
        if size < needed:
            raise ModelError(
                f"{bin_file} is cut off: it has {size} bytes, and {xml_file.name} needs {needed}. "
                "Copy it again, or export again."
            )
        return cls(xml, size, precisions, _rt_info(xml))

    @property
    def stateful(self) -> bool:
        """Whether the KV cache is a state of the model, which both backends need."""
        return b'type="ReadValue"' in self.xml

    def info(self, *keys: str) -> str | None:
        """A value of rt_info by its path, or None."""
        value: str | RtInfo | None = self.rt_info
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value if isinstance(value, str) and value else None

    def section(self, *keys: str) -> dict[str, str]:
        """The plain values under a path of rt_info."""
        value: str | RtInfo | None = self.rt_info
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return {k: v for k, v in value.items() if isinstance(v, str)} if isinstance(value, Mapping) else {}


def _constants(xml: bytes) -> tuple[int, dict[str, int]]:
    """Where the last constant ends in the `.bin`, and the bytes of constants per element type."""
    end, sizes = 0, dict[str, int]()
    for kind, offset, size in _CONSTANT.findall(xml):
        name = kind.decode()
        sizes[name] = sizes.get(name, 0) + int(size)
        end = max(end, int(offset) + int(size))
    return end, sizes


def _rt_info(xml: bytes) -> RtInfo:
    """The `<rt_info>` of the whole model, which follows its edges at the end of the file."""
    edges = max(xml.rfind(b"</edges>"), xml.rfind(b"<edges />"), xml.rfind(b"<edges/>"))
    start, end = xml.find(b"<rt_info>", edges + 1), xml.rfind(b"</rt_info>")
    if edges < 0 or start < 0 or end < start:
        return {}
    try:
        return _as_dict(ET.fromstring(xml[start : end + len(b"</rt_info>")]))
    except ET.ParseError:
        return {}


def _as_dict(element: ET.Element) -> dict[str, Any]:
    return {child.tag: _as_dict(child) if len(child) else child.get("value", "") for child in element}


def fingerprint(directory: Path, config: Path, ir: Ir) -> str:
    """A hash that tells one model from another: its config, its graph, and samples of its weights, in milliseconds.

    Raises:
        ModelError: a file cannot be read.
    """
    digest = hashlib.sha256(ir.xml)
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
