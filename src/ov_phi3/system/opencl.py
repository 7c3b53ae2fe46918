"""Driver versions of Intel GPUs, from OpenCL: OpenVINO (2026.4.1) has no property for them."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from typing import Any

__all__ = ["driver_version"]

# Constants of the OpenCL headers (CL/cl.h, CL/cl_ext.h).
_DEVICE_TYPE_GPU = 1 << 2
_DEVICE_VENDOR_ID = 0x1001
_DRIVER_VERSION = 0x102D
_DEVICE_UUID_KHR = 0x106A
_INTEL = 0x8086


def driver_version(uuid: str | None) -> str | None:
    """Version of the driver of an Intel GPU, or None if OpenCL does not give it.

    Args:
        uuid: OpenVINO's DEVICE_UUID, hexadecimal. If no device has this UUID, the version is that of all Intel GPUs,
            provided that they agree.
    """
    with contextlib.suppress(OSError, AttributeError):  # no OpenCL, or no usable one
        library = ctypes.CDLL("OpenCL.dll" if sys.platform == "win32" else "libOpenCL.so.1")
        versions = dict(_versions(library))
        same = set(versions.values())
        return versions.get(uuid or "") or (same.pop() if len(same) == 1 else None)
    return None


def _versions(library: Any) -> Iterator[tuple[str, str]]:
    """UUID and driver version of each Intel GPU."""
    for platform in _handles(library.clGetPlatformIDs):
        kind = ctypes.c_ulong(_DEVICE_TYPE_GPU) if sys.platform != "win32" else ctypes.c_ulonglong(_DEVICE_TYPE_GPU)
        for index, device in enumerate(_handles(library.clGetDeviceIDs, ctypes.c_void_p(platform), kind)):
            vendor = _info(library, device, _DEVICE_VENDOR_ID)
            version = _info(library, device, _DRIVER_VERSION).rstrip(b"\0").decode(errors="replace").strip()
            if int.from_bytes(vendor, sys.byteorder) == _INTEL and version:
                yield _info(library, device, _DEVICE_UUID_KHR).hex() or f"{platform} {index}", version


def _handles(function: Any, *arguments: Any) -> list[int]:
    """All handles that an OpenCL function lists, which takes a capacity, an array and a pointer to the number."""
    count = ctypes.c_uint(0)
    if function(*arguments, 0, None, ctypes.byref(count)) or not count.value:
        return []
    handles = (ctypes.c_void_p * count.value)()
    return [] if function(*arguments, count, handles, None) else [int(handle or 0) for handle in handles]


def _info(library: Any, device: int, key: int) -> bytes:
    """A property of a device, or b'' if it does not have it."""
    size, handle = ctypes.c_size_t(0), ctypes.c_void_p(device)
    if library.clGetDeviceInfo(handle, key, ctypes.c_size_t(0), None, ctypes.byref(size)):
        return b""
    value = ctypes.create_string_buffer(size.value)
    return b"" if library.clGetDeviceInfo(handle, key, size, value, None) else value.raw
