"""The public surface: its names, what importing it loads, and that it types."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import ov_phi3

CONTRACT = {
    "export", "devices", "load", "measure", "GenerationConfig", "ChatTemplate", "Raw", "ModelInfo", "DeviceInfo",
    "Pipeline", "Tokenizer", "TokenStream", "StreamChunk", "GenerationResult", "Error", "ModelError", "DeviceError",
    "ExportError", "ConfigError", "TemplateError", "ContextOverflowError", "SnapshotError", "ClosedError",
}  # fmt: skip


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_name_exists_and_is_listed_once() -> None:
    assert len(set(ov_phi3.__all__)) == len(ov_phi3.__all__)
    assert set(ov_phi3.__all__) == {*ov_phi3._HOME_OF, "__version__"}
    for name in ov_phi3.__all__:
        assert getattr(ov_phi3, name) is not None
    assert set(ov_phi3.__all__) >= CONTRACT
    assert dir(ov_phi3) == sorted(ov_phi3.__all__)


def test_no_module_hides_a_public_function() -> None:
    """Importing a submodule sets an attribute of its name on the package."""
    modules = {p.stem for p in Path(ov_phi3.__file__).parent.iterdir()}
    assert not modules & set(ov_phi3.__all__)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="lod"):
        ov_phi3.lod  # noqa: B018


def test_every_error_is_an_error_of_ours() -> None:
    from ov_phi3 import errors

    for name in errors.__all__:
        assert issubclass(getattr(errors, name), ov_phi3.Error)
    assert issubclass(ov_phi3.PromptError, ValueError)
    assert issubclass(ov_phi3.ConfigError, ValueError)
    assert issubclass(ov_phi3.ClosedError, RuntimeError)


def test_errors_cross_processes() -> None:
    error = ov_phi3.ContextOverflowError("too long", prompt_tokens=5, max_new_tokens=None, context_length=4)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.prompt_tokens, copy.max_new_tokens, copy.context_length) == ("too long", 5, None, 4)


def test_import_loads_neither_openvino_nor_numpy() -> None:
    code = (
        "import sys, ov_phi3\n"
        "from ov_phi3 import GenerationConfig, ChatTemplate, Raw, Error, ModelInfo\n"
        "print(sorted({'openvino', 'numpy', 'openvino_genai', 'torch', 'transformers'} & set(sys.modules)))"
    )
    assert python(code).strip() == "[]"


def test_running_loads_none_of_the_exporters_packages(demo_int4: Path, device: str) -> None:
    code = (
        "import sys, ov_phi3\n"
        f"with ov_phi3.load({str(demo_int4)!r}, device={device!r}) as pipe:\n"
        "    print(''.join(c.text for c in pipe.stream('What is the capital of France?')))\n"
        "print(sorted({'torch', 'transformers', 'optimum', 'nncf'} & set(sys.modules)))"
    )
    out = python(code)
    assert "Paris" in out
    assert out.splitlines()[-1] == "[]"


def test_an_exception_in_our_own_callback_does_not_abort(demo_int4: Path, device: str) -> None:
    """One that reached the engine would end the process by SIGABRT."""
    code = (
        "import ov_phi3\n"
        "from ov_phi3.text.stream_decoder import StreamDecoder\n"
        f"pipe = ov_phi3.load({str(demo_int4)!r}, device={device!r})\n"
        "whole, StreamDecoder.add = StreamDecoder.add, lambda *_: 1 / 0\n"
        "try:\n"
        "    list(pipe.stream('Hi'))\n"
        "except ov_phi3.GenerationError as error:\n"
        "    print(type(error.__cause__).__name__)\n"
        "StreamDecoder.add = whole\n"
        "print(pipe.generate('What is the capital of France?').text)"
    )
    out = python(code)
    assert out.startswith("ZeroDivisionError")
    assert "Paris" in out


def test_interpreter_exits_while_a_stream_runs(demo_int4: Path, device: str) -> None:
    code = (
        "import ov_phi3\n"
        f"pipe = ov_phi3.load({str(demo_int4)!r}, device={device!r})\n"
        "stream = pipe.stream('Write a very long story.', ignore_eos=True)\n"
        "next(iter(stream))\n"
        "reader = iter(pipe.stream('Another one.', ignore_eos=True))\n"
        "print('leaving')"
    )
    assert python(code).strip() == "leaving"
