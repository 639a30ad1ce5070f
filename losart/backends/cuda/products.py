"""Matrix products of many tokens by cuBLAS, where CuPy finds it."""

from __future__ import annotations

from functools import cache
from typing import Any

import cupy
import numpy as np

CUDA_TYPES = {"float32": 0, "float16": 2, "bfloat16": 14}  # cudaDataType
COMPUTE_32F = 68  # cublasComputeType
TRANSPOSED, AS_IT_IS = 1, 0
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


def blas_product(x: Any, matrix: Any, dtype: str) -> Any | None:
    """x [tokens, inner] times matrix [rows, inner] transposed, float32; None without cuBLAS.

    Parameters
    ----------
    x, matrix : arrays of `dtype`, 16-bit ones as their bits
    dtype : {"float32", "bfloat16", "float16"}
    """
    cublas = _cublas()
    if cublas is None:
        return None
    handle = cupy.cuda.device.get_cublas_handle()  # the thread's and the device's own
    (tokens, inner), rows, held = x.shape, len(matrix), CUDA_TYPES[dtype]
    y = cupy.empty((tokens, rows), np.float32)
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    cublas.gemmEx(
        *(handle, TRANSPOSED, AS_IT_IS, rows, tokens, inner),
        *(one.ctypes.data, matrix.data.ptr, held, inner, x.data.ptr, held, inner),
        *(zero.ctypes.data, y.data.ptr, CUDA_TYPES["float32"], rows, COMPUTE_32F, DEFAULT_ALGORITHM),
    )
    return y
