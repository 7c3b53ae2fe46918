"""Memory bandwidth of a device, measured with OpenVINO."""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np

from ov_phi3.system.core import import_openvino, shared_core

__all__ = ["bandwidth"]

_MATRIX_BYTES = 256 * 2**20
"""Far more than the last-level cache of a client machine holds."""

_WIDTH = 4096


def bandwidth(device: str, *, repeat: int = 9) -> float:
    """Memory bandwidth that a device reaches when it reads weights, in bytes per second.

    The measured operation is a vector times a float32 matrix of 256 MiB, computed in float32: one pass over the matrix
    and two operations per value, as in decoding. On a CPU it gives the same figure as summing an array with one thread
    per core.

    Args:
        device: an OpenVINO device name.
        repeat: number of passes. The median is used, because a large shared last-level cache can make single passes
            faster than the memory is.
    """
    openvino = import_openvino()
    from openvino import opset13

    rows = _MATRIX_BYTES // 4 // _WIDTH
    vector = opset13.parameter([1, _WIDTH], np.float32)
    matrix = opset13.constant(np.ones((rows, _WIDTH), np.float32), shared_memory=True)
    model = openvino.Model([opset13.matmul(vector, matrix, False, True)], [vector])
    properties: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = shared_core().compile_model(model, device, properties).create_infer_request()
    request.infer([np.ones((1, _WIDTH), np.float32)])  # the first pass also reorders the weights
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        request.infer()
        times.append(time.perf_counter() - started)
    return _MATRIX_BYTES / statistics.median(times)
