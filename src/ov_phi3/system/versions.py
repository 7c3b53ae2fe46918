"""Versions of the three OpenVINO packages, which share an ABI and work together only if all are of one release.

A mix fails at import with an undefined symbol or, worse, at the first inference. `check()` reads the versions from the
packages' metadata without importing them, so that the failure is an error message and not a crash.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import metadata

from ov_phi3.errors import DeviceError

__all__ = ["OPENVINO_PACKAGES", "check", "installed", "package_version", "release"]

OPENVINO_PACKAGES = ("openvino", "openvino-genai", "openvino-tokenizers")
"""The packages whose first three version numbers must be equal."""


def package_version(package: str) -> str | None:
    """The version of an installed package, or None if it is not installed; the package is not imported."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def installed() -> dict[str, str | None]:
    """The installed version of each of `OPENVINO_PACKAGES`; None for a missing package."""
    return {name: package_version(name) for name in OPENVINO_PACKAGES}


def release(version: str) -> str:
    """The first three numbers of a version: `"2026.4.1"` for `"2026.4.1.0"` and for `"2026.4.1-22982-e213a147257"`."""
    numbers = re.match(r"\d+(?:\.\d+){0,2}", version)
    return numbers[0] if numbers else version


def check(versions: Mapping[str, str | None] | None = None) -> None:
    """Check that the three OpenVINO packages are installed and of one release.

    Args:
        versions: version by package name (None: missing); by default the installed ones.

    Raises:
        DeviceError: a package is missing or the releases differ. The message names each version, and the pip command
            that installs the newest of these releases of all three.
    """
    by_name = installed() if versions is None else {name: versions.get(name) for name in OPENVINO_PACKAGES}
    releases = {release(version) for version in by_name.values() if version is not None}
    missing = [name for name, version in by_name.items() if version is None]
    if not missing and len(releases) == 1:
        return
    listed = ", ".join(f"{name} {version or '(not installed)'}" for name, version in by_name.items())
    problem = "not all of them are installed" if missing else "they are of different releases"
    raise DeviceError(
        f"The OpenVINO packages do not fit together, {problem}: {listed}. "
        f"Expected: all three of one release (the same first three numbers). Fix: {_pip_command(releases)}"
    )


def _pip_command(releases: set[str]) -> str:
    newest = max(releases, key=_numbers, default="")
    return "pip install " + " ".join(f'"{name}=={newest}.*"' if newest else name for name in OPENVINO_PACKAGES)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
