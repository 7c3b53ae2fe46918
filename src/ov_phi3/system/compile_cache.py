"""OpenVINO's compile cache (`CACHE_DIR`), with protection against stale blobs.

A compiled blob belongs to one model, one OpenVINO release, one driver, one device and one set of properties. OpenVINO
checks only some of these; users have had blobs that loaded and then generated garbage (openvinotoolkit/openvino#31487).
So the user's cache folder only holds sub-folders, one per `cache_key`. Each sub-folder records the ids that the model
generated greedily for a fixed prompt when its blobs were written (the canary). If a later load gives other ids, the
sub-folder is purged and the model is compiled again. A lock lets only one load at a time use a sub-folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ov_phi3.errors import ConfigError
from ov_phi3.files import lock_file, write_atomically
from ov_phi3.system.failures import essential_message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from ov_phi3.system.devices import DeviceInfo

__all__ = ["CANARY_FILE", "cache_key", "check_canary", "load_guarded", "prepare", "purge", "store_canary"]

CANARY_FILE = "canary.json"
_FORMAT = 1
_KEY = re.compile(r"(cpu|gpu|npu)-[0-9a-f]{32}")
_log = logging.getLogger("ov_phi3")
T = TypeVar("T")


def cache_key(
    fingerprint: str, versions: Mapping[str, str | None], device: DeviceInfo, config: Mapping[str, Any] | None = None
) -> str:
    """The name of the sub-folder for one model on one device: "gpu-" and 32 hexadecimal digits.

    Args:
        fingerprint: `ModelInfo.fingerprint`; changes when the model's files do.
        versions: installed versions by package name (openvino, openvino-genai, openvino-tokenizers).
        device: the resolved device; its kind, full name, architecture and driver are part of the key.
        config: the properties that the model is compiled with; CACHE_DIR is ignored. Another precision may give other
            ids, for example.
    """
    options = {str(key): str(value) for key, value in (config or {}).items() if key != "CACHE_DIR"}
    parts = {
        "format": _FORMAT,
        "model": fingerprint,
        "versions": dict(versions),
        "device": [device.kind, device.full_name, device.architecture, device.driver],
        "config": options,
    }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return f"{device.kind.lower()}-{digest[:32]}"


def prepare(base: str | os.PathLike[str], key: str) -> Path:
    """Create the sub-folder `key` of the user's cache folder, and return it.

    Raises:
        ConfigError: the folder cannot be created or written; the message names it.
    """
    directory = Path(base) / key
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ConfigError(
            f"the compile cache CACHE_DIR={os.fsdecode(base)!r} cannot be written ({error.strerror or error}); "
            "give a folder with write permission, or leave CACHE_DIR out"
        ) from error
    return directory


def store_canary(directory: str | os.PathLike[str], ids: Sequence[int]) -> None:
    """Record the ids that the model generated greedily with the blobs in this folder. The write is atomic.

    Raises:
        ConfigError: the folder cannot be written.
    """
    target = Path(directory) / CANARY_FILE
    text = json.dumps({"format": _FORMAT, "token_ids": [int(token) for token in ids]})
    try:
        with write_atomically(target) as file:
            file.write(f"{text}\n".encode())
    except OSError as error:
        raise ConfigError(
            f"the compile cache {str(directory)!r} cannot be written ({error.strerror or error})"
        ) from error


def check_canary(directory: str | os.PathLike[str], ids: Sequence[int]) -> bool | None:
    """Whether the recorded ids equal these; None if there is no readable record."""
    recorded = _recorded_ids(Path(directory))
    return None if recorded is None else recorded == [int(token) for token in ids]


def _recorded_ids(directory: Path) -> list[int] | None:
    try:
        record = json.loads((directory / CANARY_FILE).read_text(encoding="utf-8"))
        ids = record["token_ids"] if record["format"] == _FORMAT else None
        return [int(token) for token in ids] if ids else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def purge(directory: str | os.PathLike[str]) -> None:
    """Delete the contents of a folder that `prepare` created, but not the folder.

    Raises:
        ConfigError: the folder is no compile cache of this library (its name is no `cache_key`), or a file in it cannot
            be deleted.
    """
    directory = Path(directory)
    if not _KEY.fullmatch(directory.name):
        raise ConfigError(f"{str(directory)!r} is not a compile cache made by ov_phi3; nothing was deleted")
    try:
        for entry in directory.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(
            f"the compile cache {str(directory)!r} is stale and cannot be deleted ({error.strerror or error}); "
            "delete it by hand"
        ) from error


def load_guarded(
    directory: str | os.PathLike[str],
    compile: Callable[[], T],  # noqa: A002
    canary: Callable[[T], list[int]],
    discard: Callable[[T], None],
) -> tuple[T, str]:
    """Load a model through its compile cache; use the cache only if the model generates the recorded ids.

    Args:
        directory: the folder that `prepare` returned, which the backend gets as CACHE_DIR.
        compile: loads the model; called a second time after a purge.
        canary: generates a few ids greedily for a fixed prompt with a loaded model.
        discard: closes a loaded model that is not used.

    Returns:
        The model, and the state of the cache (`LoadReport.cache`): "fresh" (it was empty), "verified", or "purged",
        which is also logged as a warning.

    Raises:
        ConfigError: a stale cache cannot be deleted.
    """
    directory = Path(directory)
    with _one_load_at_a_time(directory):
        return _load(directory, compile, canary, discard)


@contextlib.contextmanager
def _one_load_at_a_time(directory: Path) -> Iterator[None]:
    """Lock the folder, also against other processes: a second load would purge blobs that have no record yet."""
    try:
        lock = lock_file(directory.with_name(f"{directory.name}.lock"), wait=True)
    except OSError as error:
        _log.debug("compile cache %s cannot be locked: %s", directory, error)  # a file system without locks
        yield
        return
    with lock:
        yield


def _load(
    directory: Path, compile_: Callable[[], T], canary: Callable[[T], list[int]], discard: Callable[[T], None]
) -> tuple[T, str]:
    if not _has_files(directory):
        return _compile_fresh(directory, compile_, canary, discard), "fresh"
    reason = "it has no record of the ids that the model generated."
    recorded = _recorded_ids(directory)
    if recorded is not None:
        engine, reason = _try_cached(recorded, compile_, canary, discard)
        if engine is not None:
            return engine[0], "verified"
    _log.warning(
        "compile cache %s is not used: %s The cache is deleted and the model compiled again.", directory, reason
    )
    purge(directory)
    return _compile_fresh(directory, compile_, canary, discard), "purged"


def _try_cached(
    recorded: list[int], compile_: Callable[[], T], canary: Callable[[T], list[int]], discard: Callable[[T], None]
) -> tuple[tuple[T] | None, str]:
    """The engine, in a 1-tuple, if it generates the recorded ids; else None and the reason."""
    try:
        engine = compile_()
    except Exception as error:  # noqa: BLE001 - plugins raise many types for a bad blob; the model is compiled again without it
        return None, f"loading from it failed: {essential_message(error)}"
    try:
        ids = [int(token) for token in canary(engine)]
    except Exception as error:  # noqa: BLE001
        reason = f"the model loaded from it does not run: {essential_message(error)}"
    except BaseException:
        discard(engine)
        raise
    else:
        if ids == recorded:
            return (engine,), ""
        reason = f"the model loaded from it generates the ids {ids}, and {recorded} were recorded."
    discard(engine)
    return None, reason


def _compile_fresh(
    directory: Path, compile_: Callable[[], T], canary: Callable[[T], list[int]], discard: Callable[[T], None]
) -> T:
    engine = compile_()
    try:
        store_canary(directory, canary(engine))
    except BaseException:
        discard(engine)
        raise
    return engine


def _has_files(directory: Path) -> bool:
    return directory.is_dir() and any(directory.iterdir())
