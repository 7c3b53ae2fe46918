"""The tokenizer and the clock of the scripted pipelines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from scripted import Clock

    from ov_phi3 import Tokenizer


@pytest.fixture
def tokenizer(demo_tokenizer: Tokenizer) -> Tokenizer:
    return demo_tokenizer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    from scripted import Clock

    return Clock(monkeypatch)
