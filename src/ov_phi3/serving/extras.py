"""Whether the packages of the extras `serve` and `ray` are installed."""

from __future__ import annotations

import importlib.util

from ov_phi3.errors import ConfigError

__all__ = ["check_installed"]

_PACKAGES = {
    "serve": {"fastapi": "fastapi>=0.115", "uvicorn": "uvicorn>=0.30", "pydantic": "pydantic>=2.7"},
    "ray": {"ray": "ray[data,serve]>=2.60", "fastapi": "fastapi>=0.115", "pydantic": "pydantic>=2.7"},
}


def check_installed(extra: str = "serve") -> None:
    """Refuse to serve without the packages that it needs.

    Args:
        extra: "serve" or "ray".

    Raises:
        ConfigError: one is missing; the message has the command that installs them.
    """
    packages = _PACKAGES[extra]
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        wanted = " ".join(f"'{package}'" for package in packages.values())
        raise ConfigError(f"serving needs the package {missing[0]} (extra {extra!r}): pip install {wanted}.")
