"""The lock file of the test environment: packages with exact versions and hashes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from _steps import BootstrapError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["NOT_LOCKED", "Locked", "read_lock"]

# Never in the lock: torch, and packages that only torch depends on. An index of CPU builds and the public index have
# different files (and versions, X+cpu) for the same torch==X, so a hash would exclude one of them, and only some of
# these files depend on the CUDA packages. optimum-intel requires torchvision, and an export never uses it.
NOT_LOCKED = re.compile(r"torch|torchvision|triton|(nvidia|cuda)-.+")

_LINE = re.compile(
    r"(?P<name>[a-z0-9]+(-[a-z0-9]+)*)==(?P<version>[A-Za-z0-9.!+]+)( ; (?P<marker>[^#\\]+?))?"
    r"(?P<hashes>( --hash=sha256:[0-9a-f]{64})+)"
)


@dataclass(frozen=True)
class Locked:
    """One version of a package in the lock, for the machines on which the marker is true."""

    name: str
    version: str
    marker: str
    hashes: tuple[str, ...]


def read_lock(path: Path) -> list[Locked]:
    """Return the packages of a lock. A package may occur several times, with markers that exclude each other.

    Raises:
        BootstrapError: A line is not one version of a package with its hashes.
    """
    text = re.sub(r"\s*\\\r?\n\s*", " ", path.read_text(encoding="utf-8"))
    packages = []
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise BootstrapError(f"{path.name}: not one version of a package with its hashes: {line[:100]!r}")
        hashes = tuple(re.findall(r"sha256:([0-9a-f]{64})", match["hashes"]))
        packages.append(Locked(match["name"], match["version"], match["marker"] or "", hashes))
    return packages
