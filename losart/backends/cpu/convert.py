"""Conversions between float32 and the formats that numbers are held in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

import losart.backends.cpu.attention_kernels as kernels
from losart.config.precision import BFLOAT16, FLOAT16, Format
from losart.loaders.safetensors_files import MappedTensor


def widen(values: np.ndarray, threads: bool = True) -> np.ndarray:
    """Any held array as float32; float32 as it is. By all threads or the caller's alone."""
    if values.dtype == np.float32:
        return values
    out = np.empty(values.shape, np.float32)
    widen_into(values, out, threads)
    return out


def widen_into(values: np.ndarray, out: np.ndarray, threads: bool = True) -> None:
    """A held array of 16 bits into a float32 array, by all threads or the caller's alone."""
    code = (BFLOAT16 if values.dtype == BFLOAT16.array else FLOAT16).code
    kernels.widen_into(values.reshape(-1).view(np.uint16), out.reshape(-1), code, threads)


def float32_rows(matrix: Any, floats: int) -> Iterator[np.ndarray]:
    """A checkpoint's matrix, quantized or not, in float32, some rows at a time of about so many numbers."""
    rows, columns = matrix.shape
    step = max(1, floats // max(1, columns))
    for start in range(0, rows, step):
        yield float32_of(matrix, start, min(rows, start + step))


def float32_of(matrix: Any, start: int, stop: int, threads: bool = True) -> np.ndarray:
    """Some rows of a checkpoint's matrix, of any kind, in float32; `threads` as of `widen`."""
    if isinstance(matrix, MappedTensor):
        return widen(matrix.array(start, stop), threads)
    return matrix.float32(start, stop)


def narrow(values: np.ndarray, format: Format) -> np.ndarray:
    """float32 as it is held in a format, rounded to the nearest, ties to even."""
    if format != BFLOAT16:
        with np.errstate(over="ignore", invalid="ignore"):  # Arm flags a signalling NaN as invalid
            return values.astype(format.array, copy=False)
    bits = values.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
