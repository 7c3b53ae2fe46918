"""The temporary directory of an export, beside the output, and its rename to the output."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from ov_phi3.errors import ExportError
from ov_phi3.files import FileLock, expanded, lock_file
from ov_phi3.model.files import UNFINISHED

__all__ = ["Workspace", "check_output"]

_MODEL_FILES = ("openvino_model.xml", "config.json", "ov_phi3.json", "openvino_tokenizer.xml")
_GRACE_S = 60.0


def check_output(output: str | os.PathLike[str], source: Path | None, *, overwrite: bool) -> Path:
    """The absolute path of the output, after checking that an export may write there.

    Raises:
        ExportError: the output is a file; is not empty and `overwrite` is off; is not empty and holds no model; or
            contains the source or the current directory.
        TypeError: `output` is not a path.
    """
    target = Path(os.path.abspath(expanded(output)))  # noqa: PTH100 - the link itself is the output
    if target.is_symlink():
        target = target.resolve()
    try:
        if target.exists() and not target.is_dir():
            raise ExportError(f"{target} is a file; expected a directory to export into.")
        names = sorted(os.listdir(target)) if target.exists() else []  # noqa: PTH208 - names only
        contains_cwd = Path.cwd().is_relative_to(target)
    except OSError as error:
        raise ExportError(f"{target} cannot be read: {error.strerror or error}.") from error
    if source is not None and source.is_relative_to(target):
        raise ExportError(f"The output {target} is, or contains, the source {source}; choose another directory.")
    if contains_cwd:
        raise ExportError(f"The output {target} is, or contains, the current directory; choose another directory.")
    if names and not overwrite:
        raise ExportError(f"{target} is not empty; pass overwrite=True (--overwrite) to replace it, or choose another.")
    if names and not any(name in names for name in _MODEL_FILES):
        raise ExportError(
            f"{target} holds no model, but {names[0]!r}; it is not overwritten. Choose another directory."
        )
    return target


class Workspace:
    """A hidden directory beside the output. A `with` block fills it, and `install` renames it to the output.

    It is locked while its process lives. The next export to the same output removes an abandoned workspace, and
    refuses to start if there is a locked one.

    Attributes:
        root: the directory.
        model: the directory for the exported files; a marker file in it says that it is unfinished.
        scratch: the temporary directory of the subprocesses.

    Raises:
        ExportError: the directory cannot be created, or another export to the same output is running.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self._lock: FileLock | None = None
        prefix = f".{target.name}.ov_phi3-export-"
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            for other in target.parent.glob(f"{_escaped(prefix)}*"):
                _remove_abandoned(other, target)
            self.root = target.parent / f"{prefix}{uuid.uuid4().hex[:8]}"
            self.model, self.scratch = self.root / "model", self.root / "scratch"
            self.root.mkdir()
            self._lock = lock_file(self.root / "lock")
            self.model.mkdir()
            (self.model / UNFINISHED).touch()
            self.scratch.mkdir()
        except OSError as error:
            raise ExportError(
                f"{error.filename or target.parent} cannot be created: {error.strerror or error}."
            ) from error

    def __enter__(self) -> Workspace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._lock.close()  # first, because Windows does not remove open files
        shutil.rmtree(self.root, ignore_errors=True)

    def install(self) -> None:
        """Rename the finished model to the output.

        Raises:
            ExportError: it cannot be renamed; an old model in the output is unchanged.
        """
        replaced = self.root / "replaced"
        try:
            (self.model / UNFINISHED).unlink(missing_ok=True)
            if self._target.exists():
                self._target.rename(replaced)
            self.model.rename(self._target)
        except OSError as error:
            if replaced.exists() and not self._target.exists():
                with suppress(OSError):
                    replaced.rename(self._target)
            raise ExportError(f"{self._target} cannot be replaced: {error.strerror or error}.") from error


def _escaped(name: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def _remove_abandoned(other: Path, target: Path) -> None:
    lock = other / "lock"
    if not lock.exists():
        if time.time() - other.stat().st_mtime > _GRACE_S:
            shutil.rmtree(other, ignore_errors=True)
        return
    try:
        lock_file(lock).close()
    except OSError:
        raise ExportError(f"Another export to {target} is running; wait for it, or choose another output.") from None
    shutil.rmtree(other, ignore_errors=True)
