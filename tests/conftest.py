"""Model directories and pipelines for the tests.

The models are those of `scripts/_models.py`, from its cache, or from the folder in the environment variable
OV_PHI3_MODELS. Nothing of `ov_phi3` is imported before a fixture needs it, so that tests of what an import loads stay
true.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from scripted import MakePipe, ScriptedBackend

    import ov_phi3

# A shell's background job ignores Ctrl-C, and so would everything that is started here: the tests send it on purpose.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The command line keeps a list of models and a history for its user, who is not this test run.
os.environ["OV_PHI3_STATE"] = tempfile.mkdtemp(prefix="ov_phi3-state-")
atexit.register(shutil.rmtree, os.environ["OV_PHI3_STATE"], ignore_errors=True)

# No timed assertions: an example that takes long on a busy machine is not wrong.
settings.register_profile("ov_phi3", deadline=None)
settings.load_profile("ov_phi3")


@pytest.fixture(autouse=True)
def signal_stack() -> Iterator[None]:
    """No test leaves this thread on a signal stack of a Core of its own, which is freed when that Core goes."""
    from ov_phi3.system.core import keeping_signal_stack

    with keeping_signal_stack():
        yield


def model(name: str) -> Path:
    """The directory of a model, made now if it has to be."""
    if folder := os.environ.get("OV_PHI3_MODELS"):
        path = Path(folder) / name
        if not path.is_dir():
            pytest.fail(f"OV_PHI3_MODELS is set, but there is no {path}", pytrace=False)
        return path
    from _models import ensure_model
    from _steps import BootstrapError

    try:
        return ensure_model(name)
    except BootstrapError as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(scope="session")
def demo_hf() -> Path:
    return model("demo-hf")


@pytest.fixture(scope="session")
def demo_int4() -> Path:
    return model("demo-int4")


@pytest.fixture(scope="session")
def demo_fp32() -> Path:
    return model("demo-fp32")


@pytest.fixture(scope="session")
def tiny_hf() -> Path:
    return model("tiny-hf")


@pytest.fixture(scope="session")
def tiny_fp32() -> Path:
    return model("tiny-fp32")


@pytest.fixture(scope="session", params=[64, 256])
def longrope(request: pytest.FixtureRequest) -> tuple[Path, Path, int]:
    """A random LongRoPE model: as exported (fp32), in Hugging Face format, and its boundary in tokens."""
    return model(f"longrope{request.param}-fp32"), model(f"longrope{request.param}-hf"), request.param


@pytest.fixture(scope="session")
def sliding() -> tuple[Path, Path]:
    """A random model with Phi-3-mini-4k's sliding window: as exported (fp32), and in Hugging Face format."""
    return model("sliding-fp32"), model("sliding-hf")


@pytest.fixture(scope="session")
def tokenizer_vectors(tiny_hf: Path) -> list[dict[str, Any]]:
    """The 46 published vectors of the real Phi-3 tokenizer, each {"text": ..., "ids": [...]}."""
    return json.loads((tiny_hf / "tokenizer_vectors.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def device() -> str:
    """The device that the device-dependent tests run on."""
    return os.environ.get("OV_PHI3_TEST_DEVICE") or "CPU"


@pytest.fixture(scope="session")
def pipe(demo_int4: Path, device: str) -> Iterator[ov_phi3.Pipeline]:
    """The demo model, int4. Shared by all tests: leave it as it was."""
    import ov_phi3

    with ov_phi3.load(demo_int4, device=device) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def loop(demo_fp32: Path, device: str) -> Iterator[ov_phi3.Pipeline]:
    """The demo model, fp32, on our own engine. Shared by all tests: leave it as it was."""
    import ov_phi3

    with ov_phi3.load(demo_fp32, device=device, backend="infer_request") as loaded:
        yield loaded


@pytest.fixture(scope="session")
def tiny_loop(tiny_fp32: Path, device: str) -> Iterator[ov_phi3.Pipeline]:
    """The random model with the real Phi-3 tokenizer, on our own engine. Shared by all tests."""
    import ov_phi3

    with ov_phi3.load(tiny_fp32, device=device, backend="infer_request") as loaded:
        yield loaded


@pytest.fixture(scope="session")
def tiny_pipe(tiny_fp32: Path, device: str) -> Iterator[ov_phi3.Pipeline]:
    """The random model with the real Phi-3 tokenizer, fp32. Shared by all tests: leave it as it was."""
    import ov_phi3

    with ov_phi3.load(tiny_fp32, device=device) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def tiny_batch(tiny_fp32: Path, device: str) -> Iterator[ov_phi3.Pipeline]:
    """The same on our own engine, with four requests at once. Shared by all tests: a test must not change it."""
    import ov_phi3

    with ov_phi3.load(tiny_fp32, device=device, concurrency=4) as loaded:
        yield loaded


@pytest.fixture(scope="session")
def demo_tokenizer(demo_int4: Path) -> ov_phi3.Tokenizer:
    """The demo model's tokenizer. Shared by all tests: a test must not change it."""
    import ov_phi3

    return ov_phi3.Tokenizer(demo_int4)


@pytest.fixture
def make(demo_int4: Path, demo_tokenizer: ov_phi3.Tokenizer) -> Iterator[MakePipe]:
    """Builds pipelines on scripted backends; at the end they are closed, and no worker thread may be left."""
    from scripted import ScriptedBackend, scripted_pipeline

    pipes: list[ov_phi3.Pipeline] = []

    def build(
        steps: Sequence[Sequence[int]] = (), *, window: int = 200, concurrency: int = 1, **options: Any
    ) -> tuple[ov_phi3.Pipeline, ScriptedBackend]:
        backend = ScriptedBackend(steps, **options)
        pipes.append(scripted_pipeline(demo_int4, demo_tokenizer, backend, window=window, concurrency=concurrency))
        return pipes[-1], backend

    yield build
    for pipe in pipes:
        pipe.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "ov_phi3-stream"]
