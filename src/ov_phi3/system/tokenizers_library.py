"""The extension library of openvino_tokenizers, found without importing that package."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from ov_phi3.errors import ModelError

__all__ = ["extension_library", "tokenizers_importable"]


def extension_library() -> Path:
    """The shared library of openvino_tokenizers. The package is not imported: its import loads far more.

    Raises:
        ModelError: the package is not installed, or has no library.
    """
    spec = find_spec("openvino_tokenizers")
    for root in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(root, "lib").glob("*openvino_tokenizers*")):
            if path.suffix in (".so", ".dll", ".dylib"):
                return path
    raise ModelError(
        "openvino_tokenizers is not installed, or its library is missing: pip install openvino-tokenizers."
    )


@contextlib.contextmanager
def tokenizers_importable() -> Iterator[None]:
    """Let openvino_genai import openvino_tokenizers also in a Python without docstrings (-OO).

    openvino_genai imports that package only for the path of its library. The package edits one of its own docstrings
    when it is imported, and fails if there is none (2026.4.1). A stand-in module with the path replaces it meanwhile.
    """
    name = "openvino_tokenizers"
    if sys.flags.optimize < 2 or name in sys.modules:
        yield
        return
    stand_in = ModuleType(name)
    vars(stand_in)["_ext_path"] = str(extension_library())
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]
