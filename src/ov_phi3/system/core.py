"""The import of OpenVINO, the one `openvino.Core` of this library, and protection against faults of its threads.

Signal stacks: the CPU plugin gives the thread that first uses it a signal stack of its own, and removes it when the
`Core` is destroyed. If two Cores are destroyed in the order of their creation, the second one restores the first one's
stack, which is freed by then. A Core that is destroyed in another thread leaves its own stack behind. The next signal,
such as Ctrl-C, then kills the process (SIGSEGV; seen with openvino 2026.4.1 on Linux, where `LLMPipeline` creates Cores
of its own). `keeping_signal_stack` restores the thread's stack at once, so that no plugin's stack is ever in use.

Forked processes: a child has the memory of OpenVINO's objects but none of their threads. Using or freeing such an
object waits for these threads and hangs, at the child's exit at the latest. Objects given to `never_freed_in_children`
are never freed there.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import openvino

__all__ = [
    "FEW_KERNELS",
    "few_kernels",
    "give_memory_back",
    "import_genai",
    "import_openvino",
    "keeping_signal_stack",
    "never_freed_in_children",
    "shared_core",
]

_lock = threading.Lock()
_importing = threading.RLock()


def import_openvino() -> Any:
    """Import openvino without its telemetry, and return the module.

    The import of openvino 2026.4.1 sends a message to Google Analytics through openvino-telemetry, from a process that
    it forks, unless the user has opted out. Without the package openvino-telemetry it sends nothing, so that package is
    hidden during the import. If the program has imported openvino before, nothing is hidden.

    Raises:
        ImportError: openvino is missing or broken.
    """
    with _importing:
        if "openvino" in sys.modules:
            return sys.modules["openvino"]
        hidden = "openvino_telemetry" not in sys.modules
        if hidden:
            sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
        try:
            import openvino
        finally:
            if hidden:
                del sys.modules["openvino_telemetry"]
        return openvino


def import_genai() -> Any:
    """Import openvino_genai without openvino's telemetry, and return the module.

    Raises:
        ImportError: openvino or openvino_genai is missing or broken.
    """
    import_openvino()
    import openvino_genai

    return openvino_genai


_owners: weakref.WeakSet[object] = weakref.WeakSet()


def never_freed_in_children(owner: object) -> None:
    """Keep an object, which holds objects of OpenVINO, alive in every forked process."""
    _owners.add(owner)


def _keep_owners() -> None:
    for owner in list(_owners):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_owners)


class _Stack(ctypes.Structure):
    """`stack_t` of Linux."""

    _fields_ = (("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextlib.contextmanager
def keeping_signal_stack() -> Iterator[None]:
    """Restore the signal stack of this thread at the end of the `with` block (Linux)."""
    if sys.platform != "linux":
        yield
        return
    sigaltstack = ctypes.CDLL(None).sigaltstack
    stack = _Stack()
    has_stack = sigaltstack(None, ctypes.byref(stack)) == 0
    try:
        yield
    finally:
        if has_stack:
            sigaltstack(ctypes.byref(stack), None)


FEW_KERNELS = "32"
"""Capacity of the kernel caches of the CPU plugin and of oneDNN."""

_ONEDNN_KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


@contextlib.contextmanager
def few_kernels() -> Iterator[None]:
    """Limit oneDNN's kernel cache if the CPU plugin first uses it inside the `with` block; a user's limit stays.

    The plugin compiles a kernel for every number of tokens in a pass. The plugin and oneDNN each cache about 1,000 of
    them, and oneDNN's limit can only be set by an environment variable. 200 prompts of different lengths left 390 MiB
    on the demo model (2026.4.1).
    """
    if _ONEDNN_KERNELS in os.environ:
        yield
        return
    os.environ[_ONEDNN_KERNELS] = FEW_KERNELS
    try:
        yield
    finally:
        os.environ.pop(_ONEDNN_KERNELS, None)


def give_memory_back() -> None:
    """Return freed memory to the operating system, if the C library has a function for that (glibc).

    Loading frees much memory: graphs, and weights in the file's format. glibc keeps it in the arena of each thread.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def shared_core() -> openvino.Core:
    """The only Core of this process, created on the first call. The first call imports openvino.

    Raises:
        ImportError: openvino is missing or broken.
    """
    with _lock:
        return _create_core()


@functools.cache
def _create_core() -> openvino.Core:
    openvino = import_openvino()
    import numpy as np

    # The bindings look up numpy when they create the first array. Two threads that do so at once deadlock, one holding
    # the interpreter's lock and one the lock of the look-up. So the first array is created here, by one thread.
    np.asarray(openvino.op.Constant(np.zeros(1, dtype=np.int32)).data)
    core = openvino.Core()
    with keeping_signal_stack(), contextlib.suppress(RuntimeError):
        core.get_property("CPU", "FULL_DEVICE_NAME")  # loads the plugin now
    return core
