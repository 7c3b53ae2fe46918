"""A model from shared storage on the local disk, named by the hash of its manifest."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from ov_phi3.errors import ConfigError, ModelError
from ov_phi3.files import expanded, lock_file

__all__ = ["fetch_model"]

_MANIFEST = "ov_phi3.json"
_CACHE = "~/.cache/ov_phi3/models"


def fetch_model(
    source: str | os.PathLike[str], manifest_sha256: str, cache_dir: str | os.PathLike[str] | None = None
) -> Path:
    """Copy an exported model to this machine, unless it is there already, and return its directory.

    The copy is checked before it gets its name: the SHA-256 of the manifest `ov_phi3.json`, the sizes of all files that
    it lists, and the SHA-256 of those that it has one of (files up to 16 MiB; of weights it has the size). Processes of
    one machine copy once; the others wait.

    Args:
        source: directory of the model; or, with pyarrow installed, an address such as "s3://bucket/model".
        manifest_sha256: SHA-256 of the manifest, hexadecimal.
        cache_dir: where copies are kept; default: `~/.cache/ov_phi3/models`.

    Raises:
        ConfigError: `manifest_sha256` is not a SHA-256.
        ModelError: the source cannot be read, or is not that model.
    """
    if not re.fullmatch(r"[0-9a-f]{64}", manifest_sha256):
        raise ConfigError(
            f"manifest_sha256={manifest_sha256!r}; expected the 64 hexadecimal digits that `sha256sum {_MANIFEST}` "
            "prints."
        )
    cache = expanded(_CACHE if cache_dir is None else cache_dir)
    model = cache / manifest_sha256
    if model.is_dir():
        return model
    partial = cache / f".{manifest_sha256}.partial"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with lock_file(cache / f".{manifest_sha256}.lock", wait=True):
            if not model.is_dir():
                shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
                _copy(os.fspath(source), partial)
                _check(partial, os.fspath(source), manifest_sha256)
                partial.rename(model)
    except OSError as error:
        raise ModelError(f"{os.fspath(source)} cannot be copied to {cache}: {error.strerror or error}.") from error
    return model


def _copy(source: str, target: Path) -> None:
    if "://" not in source:
        shutil.copytree(expanded(source), target)
        return
    try:
        from pyarrow import fs
    except ImportError as error:
        raise ModelError(f"{source} is an address: reading it needs the package pyarrow (extra 'ray').") from error
    target.mkdir()
    fs.copy_files(source, str(target))


def _check(model: Path, source: str, manifest_sha256: str) -> None:
    """Refuse a copy that is not the model with this manifest."""
    manifest = model / _MANIFEST
    if not manifest.is_file():
        raise ModelError(f"{source} has no {_MANIFEST}; export the model with `ov-phi3 export`, which writes it.")
    if (actual := _sha256(manifest)) != manifest_sha256:
        raise ModelError(f"{source} is another model: its {_MANIFEST} has the SHA-256 {actual}, not {manifest_sha256}.")
    listed: dict[str, Any] = json.loads(manifest.read_bytes())
    sizes = {path.name: path.stat().st_size for path in model.iterdir() if path.is_file()}
    for name, size in listed.get("files", {}).items():
        if sizes.get(name) != size:
            raise ModelError(f"{source} is damaged: {name} has {sizes.get(name, 0)} bytes, not {size}.")
    for name, digest in listed.get("sha256", {}).items():
        if digest and _sha256(model / name) != digest:
            raise ModelError(f"{source} is damaged: {name} has another SHA-256 than {_MANIFEST} says.")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
