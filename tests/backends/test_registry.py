"""The names of the backends."""

import re

import pytest

from ov_phi3 import ConfigError
from ov_phi3.backends.protocol import BACKENDS
from ov_phi3.backends.registry import backend_spec


def test_the_command_line_offers_every_backend() -> None:
    assert [backend_spec(name).capabilities.name for name in BACKENDS] == list(BACKENDS)
    with pytest.raises(ConfigError, match=re.escape(f"expected one of {list(BACKENDS)}")):
        backend_spec("no such backend")
