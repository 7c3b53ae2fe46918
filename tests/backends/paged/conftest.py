"""Failures inside the shared simulations show the compared values, as failures of the tests do."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("block_histories", "engine_histories", "scheduler_world")
