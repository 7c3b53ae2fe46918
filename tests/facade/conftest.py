"""Models on both backends, for what must hold on either."""

import pytest

from ov_phi3 import Pipeline


@pytest.fixture(params=["tiny_pipe", "tiny_loop"])
def tiny(request: pytest.FixtureRequest) -> Pipeline:
    """The random model with the real Phi-3 tokenizer. A test must not change it."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["pipe", "loop"])
def demo(request: pytest.FixtureRequest) -> Pipeline:
    """The demo model. A test must not change it."""
    return request.getfixturevalue(request.param)
