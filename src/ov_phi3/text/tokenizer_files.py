"""Read, check, edit and compile the exported tokenizer graphs, `openvino_tokenizer.xml` and `openvino_detokenizer.xml`.

They are OpenVINO graphs of string operations, which the extension library of openvino_tokenizers implements.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ov_phi3.errors import ModelError
from ov_phi3.system.core import shared_core
from ov_phi3.system.failures import essential_message
from ov_phi3.system.tokenizers_library import extension_library

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "constant",
    "create_infer_request",
    "find_operation",
    "not_a_graph",
    "packed_strings",
    "read_graph",
    "replace_constant",
]

# The extension library must stay loaded until the last graph is freed, or the interpreter crashes at exit. The shared
# Core is never freed, so the library is added to it.
_core: Any = None
_core_lock = threading.Lock()

# Tokenizing takes microseconds: more threads or streams cost memory and load time and save nothing.
_COMPILE_PROPERTIES = {"INFERENCE_NUM_THREADS": "1", "NUM_STREAMS": "1"}


def read_graph(path: Path) -> Any:
    """Read a tokenizer or detokenizer graph as an `openvino.Model`.

    Raises:
        ModelError: the file cannot be read, or a string table points outside its data. The operations do not check
            that: such a table kills the process (SIGSEGV, openvino-tokenizers 2026.4.1).
    """
    try:
        model = _core_with_tokenizers().read_model(path)
    except (RuntimeError, UnicodeDecodeError) as exc:  # UnicodeDecodeError: OpenVINO's message quotes damaged bytes
        raise ModelError(f"{path} could not be read: {essential_message(exc)} Export the model again.") from exc
    if not all(_string_tables_are_valid(operation) for operation in model.get_ops()):
        raise ModelError(
            f"{path.with_suffix('.bin')} is damaged: a string table points outside its data. Export the model again."
        )
    return model


def not_a_graph(path: Path, kind: str) -> ModelError:
    """The error for a file that is an OpenVINO graph but not a "tokenizer" or "detokenizer" (`kind`)."""
    return ModelError(f"{path} is not a {kind} graph of openvino_tokenizers. Export the model again.")


def create_infer_request(outputs: Sequence[Any], inputs: Sequence[Any], name: str) -> Any:
    """Compile the part of a graph between `inputs` and `outputs` for the CPU and return an infer request."""
    from openvino import Model

    model = Model(list(outputs), list(inputs), name)
    return _core_with_tokenizers().compile_model(model, "CPU", _COMPILE_PROPERTIES).create_infer_request()


def find_operation(model: Any, type_name: str) -> Any | None:
    """The first operation of this type in the graph, or None."""
    return next((operation for operation in model.get_ops() if operation.get_type_name() == type_name), None)


def constant(operation: Any, index: int) -> NDArray[Any]:
    """The value of a constant input, as a copy."""
    return np.array(operation.input(index).get_source_output().get_node().data)


def replace_constant(operation: Any, index: int, value: bytes | NDArray[Any]) -> None:
    """Put another constant into an input; bytes become uint8, shape [bytes]."""
    from openvino import opset13

    data = np.frombuffer(value, dtype=np.uint8).copy() if isinstance(value, bytes) else value
    operation.input(index).replace_source_output(opset13.constant(data).output(0))


def packed_strings(operation: Any, index: int) -> list[bytes]:
    """A constant string tensor: three inputs (begins, ends, characters) from `index` on."""
    begins, ends, characters = (constant(operation, index + i) for i in range(3))
    data = characters.tobytes()
    return [data[begin:end] for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]


def _core_with_tokenizers() -> Any:
    """The shared `openvino.Core`, with the tokenizer operations added."""
    global _core
    with _core_lock:
        if _core is None:
            core, library = shared_core(), str(extension_library())
            core.add_extension(library)
            # The Core unloads the library when it is freed, at exit, perhaps before the last graph whose operations
            # live in it: the process then crashes. ctypes never closes a library that it has opened.
            ctypes.CDLL(library)
            _core = core
    return _core


def _string_tables_are_valid(operation: Any) -> bool:
    """Whether the constant string tables of an operation (begins, ends, characters) stay inside their data."""
    nodes = [value.get_node() for value in operation.input_values()]
    inputs = [np.asarray(node.data) if node.get_type_name() == "Constant" else None for node in nodes]
    for begins, ends, characters in zip(inputs, inputs[1:], inputs[2:], strict=False):
        if begins is None or ends is None or characters is None:
            continue
        types = [array.dtype.name for array in (begins, ends, characters)]
        if types != ["int32", "int32", "uint8"] or begins.ndim != 1:
            continue
        if begins.shape != ends.shape or not bool(((begins >= 0) & (begins <= ends) & (ends <= characters.size)).all()):
            return False
    return True
