"""The one `openvino.Core` of this library, and a guard around what makes others.

The CPU plugin gives the thread that first uses it a signal stack of its own, and takes it back when its `Core` goes. Of
two Cores that go in the order in which they came, the second puts back the first one's stack, which is gone by then;
one that goes in another thread leaves its own behind. The next signal, a Ctrl-C say, then kills the process (SIGSEGV;
seen with openvino 2026.4.1 on Linux, where `LLMPipeline` makes Cores of its own). `keeping_signal_stack` puts the
thread's stack back at once, so that none of them is ever in use.

A forked process has the memory of OpenVINO's objects and none of the threads that they wait for when they are used or
freed: it would hang, at its exit at the latest. What is given to `never_freed_in_children` stays there as it is.
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
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import openvino

__all__ = [
    "FEW_KERNELS",
    "few_kernels",
    "give_memory_back",
    "import_openvino",
    "keeping_signal_stack",
    "never_freed_in_children",
    "shared_core",
]

_lock = threading.Lock()


_importing = threading.RLock()


def import_openvino() -> None:
    """Import openvino, before any other import of it or of openvino_genai, without its telemetry.

    Its import sends a message to Google Analytics through openvino-telemetry, unless that was opted out of, from a
    process that it forks for that (openvino 2026.4.1). What it falls back to where that package is missing sends
    nothing. A program that has imported openvino itself has made its own choice.
    """
    with _importing:
        if "openvino" in sys.modules:
            return
        hidden = "openvino_telemetry" not in sys.modules
        if hidden:
            sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
        try:
            import openvino  # noqa: F401
        finally:
            if hidden:
                del sys.modules["openvino_telemetry"]


_owners: weakref.WeakSet[object] = weakref.WeakSet()


def never_freed_in_children(owner: object) -> None:
    """Let an object that holds some of OpenVINO's live on in every forked process, whatever frees it there."""
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
    """Leave this thread with the signal stack that it came with."""
    if sys.platform != "linux":
        yield
        return
    change = ctypes.CDLL(None).sigaltstack
    before = _Stack()
    known = change(None, ctypes.byref(before)) == 0
    try:
        yield
    finally:
        if known:
            change(ctypes.byref(before), None)


FEW_KERNELS = "32"
_ONEDNN_KERNELS = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


@contextlib.contextmanager
def few_kernels() -> Iterator[None]:
    """Have oneDNN keep few kernels, if the CPU plugin first asks for one in here and the user has not set how many.

    Kernels are made for every number of tokens in a pass, and kept by the plugin (1,000 numbers or so) and by oneDNN,
    which is told by the environment alone: 200 prompts of different lengths left 390 MiB on the demo model (2026.4.1).
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
    """Have the C library give memory that was freed to the system, where it has a function for that (glibc).

    Loading frees much: graphs, weights as they were in the file. glibc keeps that in the arena of each thread.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def shared_core() -> openvino.Core:
    """The Core. Imports openvino on first use.

    Raises:
        ImportError: openvino is missing or broken.
    """
    with _lock:
        return _made()


@functools.cache
def _made() -> openvino.Core:
    import_openvino()
    import numpy as np
    import openvino

    # The bindings look numpy up when they first make an array: two threads that do so at once wait for each other, one
    # with the interpreter's lock and one with that of the look-up. Here it is one.
    np.asarray(openvino.op.Constant(np.zeros(1, dtype=np.int32)).data)
    core = openvino.Core()
    with keeping_signal_stack(), contextlib.suppress(RuntimeError):
        core.get_property("CPU", "FULL_DEVICE_NAME")  # loads the plugin, here and not later
    return core
