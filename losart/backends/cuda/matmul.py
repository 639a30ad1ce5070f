"""Matmuls of many tokens by cuBLAS, where CuPy finds it."""

from __future__ import annotations

from functools import cache
from typing import Any

import cupy
import numpy as np

from losart.config.precision import FLOAT32, Format

COMPUTE_32F = 68  # cublasComputeType_t
TRANSPOSED, NOT_TRANSPOSED = 1, 0
DEFAULT_ALGORITHM = -1


@cache
def _cublas() -> Any | None:
    """cuBLAS's module, None where it is not installed."""
    try:
        from cupy_backends.cuda.libs import cublas

        cublas.getVersion(cupy.cuda.device.get_cublas_handle())
    except (ImportError, OSError, RuntimeError):
        return None
    return cublas


def blas_matmul(x: Any, weight: Any, format: Format) -> Any | None:
    """x [tokens, inner] times weight [rows, inner] transposed, as float32; None without cuBLAS."""
    cublas = _cublas()
    if cublas is None:
        return None
    handle = cupy.cuda.device.get_cublas_handle()  # the thread's and the device's own
    (tokens, inner), rows, kind = x.shape, len(weight), format.cuda_type
    y = cupy.empty((tokens, rows), np.float32)
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    cublas.gemmEx(
        *(handle, TRANSPOSED, NOT_TRANSPOSED, rows, tokens, inner),
        *(one.ctypes.data, weight.data.ptr, kind, inner, x.data.ptr, kind, inner),
        *(zero.ctypes.data, y.data.ptr, FLOAT32.cuda_type, rows, COMPUTE_32F, DEFAULT_ALGORITHM),
    )
    return y
