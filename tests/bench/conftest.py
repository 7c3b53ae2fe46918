"""A report of the real engine, shared by the tests of reports and of the roofline."""

from __future__ import annotations

from pathlib import Path

import pytest

import ov_phi3


@pytest.fixture(scope="session")
def report(demo_int4: Path, device: str) -> ov_phi3.Report:
    with ov_phi3.load(demo_int4, device=device) as fresh:
        return ov_phi3.measure(fresh, prompt_tokens=[8, 40], new_tokens=12, repeat=2, chat_turns=3)
