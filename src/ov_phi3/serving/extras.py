"""Whether the packages of the extra `serve` are installed."""

from __future__ import annotations

import importlib.util

from ov_phi3.errors import ConfigError

__all__ = ["check_installed"]

_PACKAGES = ("fastapi", "uvicorn", "pydantic")


def check_installed() -> None:
    """Refuse to serve without the packages that it needs.

    Raises:
        ConfigError: one is missing; the message has the command that installs them.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"serving needs the package {missing[0]} (extra 'serve'): pip install 'fastapi>=0.115' 'uvicorn>=0.30' "
            "'pydantic>=2.7'."
        )
