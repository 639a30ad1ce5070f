"""Matrices of codes that no file has, and backends that take them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from kv import model_config

from losart.backends.cpu.convert import narrow, widen
from losart.config.precision import FORMATS, Precision
from losart.loaders.quantized.float8 import FLOAT8_VALUES
from losart.loaders.quantized.tensor import QuantizedTensor


@dataclass(frozen=True)
class Codes(QuantizedTensor):
    """A matrix of given codes, scales and zeros."""

    values: np.ndarray | None = None
    factors: np.ndarray | None = None
    offsets: np.ndarray | None = None
    scale_dtype: str = "float32"

    def codes(self, start, stop):
        return self.values[start:stop]

    def scales(self, start, stop):
        return self.factors[start:stop]

    def zeros(self, start, stop):
        return None if self.offsets is None else self.offsets[start:stop]

    has_zeros = property(lambda self: self.offsets is not None)

    def release(self):
        pass


def random_codes(rng, rows, columns, dtype, group, zeros, wide, format):
    group = group or columns
    shape = rows, -(-columns // group)
    if dtype == "float8":
        values = rng.integers(0, 127, (rows, columns)) | rng.integers(0, 2, (rows, columns)) << 7
        values = values.astype(np.uint8)
    else:
        half = 8 if dtype == "int4" else 128
        values = rng.integers(-half, half, (rows, columns)).astype(np.int32)
        offsets = rng.integers(-half, half, shape).astype(np.int32)
    factors = rng.uniform(0.002, 0.02, shape).astype(np.float32)
    if not wide:
        factors = widen(narrow(factors, FORMATS[format]))
    names = "float32" if wide else format
    offsets = offsets if zeros else None
    return Codes("matrix", (rows, columns), dtype, group, {}, values, factors, offsets, names)


def matrix_of(tensor):
    """float64"""
    values = FLOAT8_VALUES[tensor.values] if tensor.dtype == "float8" else tensor.values
    values = values.astype(np.float64)
    if tensor.offsets is not None:
        values = values - tensor.offsets[:, tensor.group_of_column]
    return values * tensor.factors[:, tensor.group_of_column]


def new_backend(dtype, card=None, deterministic=False, activations="auto"):
    from losart.backends.cuda.backend import CudaBackend

    precision = Precision.of(dtype, activations=activations)
    backend = CudaBackend(model_config(kv_heads=1, group=1, width=16), precision, deterministic)
    backend.kernels.card = replace(backend.kernels.card, **(card or {}))
    return backend


def to_device(backend, x, dtype):
    import cupy

    with backend.memory.stream:
        return cupy.asarray(narrow(x, FORMATS[dtype]).view(np.uint16))
