"""A mark for tests that need the packages of the `export` extra."""

from __future__ import annotations

import importlib.util

import pytest

needs_exporter = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch", "transformers", "nncf", "optimum")),
    reason="the export extra is not installed",
)
