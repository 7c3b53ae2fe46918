"""The backends by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ov_phi3.backends.llm_pipeline import LLMPipelineSpec
from ov_phi3.backends.paged.backend import PagedBackendSpec
from ov_phi3.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from ov_phi3.backends.protocol import BackendSpec

__all__ = ["backend_spec", "backends_with", "concurrency_on"]

_SPECS: dict[str, BackendSpec] = {spec.capabilities.name: spec for spec in (LLMPipelineSpec(), PagedBackendSpec())}


def backend_spec(name: object) -> BackendSpec:
    """The backend of a name.

    Raises:
        ConfigError: there is none.
    """
    spec = _SPECS.get(name) if isinstance(name, str) else None
    if spec is None:
        raise ConfigError(f"backend={name!r}; expected one of {list(_SPECS)}.{did_you_mean(str(name), _SPECS)}")
    return spec


def backends_with(capability: str) -> list[str]:
    """Names of the backends that have a capability, a field of `Capabilities`."""
    return [name for name, spec in _SPECS.items() if getattr(spec.capabilities, capability)]


def concurrency_on(backend: object, asked: int | None, most: int) -> int:
    """Requests at once: those asked for, or else `most`, or 1 on a named backend that runs one after another.

    Raises:
        ConfigError: none are asked for, and there is no such backend.
    """
    if asked is not None:
        return asked
    return most if backend is None or backend_spec(backend).capabilities.schedules else 1
