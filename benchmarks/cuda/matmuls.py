"""The matmuls of a pass against the memory's floor, and those of prefill beside cuBLAS."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import cupy
import numpy as np

from benchmarks.cuda.noise import BFLOAT16, NoiseBackend, model_config, noise, uncached
from benchmarks.cuda.timing import graph_microseconds, queued_microseconds
from benchmarks.support.attempts import attempt, ratio, teraflops
from losart.backends.cuda.matmul import blas_matmul


def rows(bandwidth: float, quick: bool = False) -> Iterator[dict[str, Any]]:
    """One row per matmul; the weights are read from memory each time."""
    for size in ("8B",) if quick else ("1.7B", "8B"):
        for name, shape in matmul_shapes(size).items():
            floor = 2 * shape[0] * shape[1] / bandwidth * 1e6
            ours = attempt(microseconds, size, shape)
            yield {
                "size": size,
                "matmul": name,
                "floor": floor,
                "losart": ours,
                "losart/floor": ratio(ours, floor),
            }


def prefill_rows(quick: bool = False) -> Iterator[dict[str, Any]]:
    """One row per matmul and number of tokens; speeds in TFLOP/s."""
    for size in ("8B",) if quick else ("1.7B", "8B"):
        for name, shape in matmul_shapes(size).items():
            if name == "head":
                continue  # prefill has none
            for tokens in (512, 2048):
                operations = 2 * tokens * shape[0] * shape[1]
                ours, blas = (
                    teraflops(operations, attempt(prefill_microseconds, size, shape, tokens, with_blas))
                    for with_blas in (False, True)
                )
                yield {
                    "size": size,
                    "matmul": name,
                    "tokens": tokens,
                    "losart": ours,
                    "cuBLAS": blas,
                    "losart/cuBLAS": ratio(ours, blas),
                }


def matmul_shapes(size: str) -> dict[str, tuple[int, int]]:
    """Rows and columns of each matrix of a pass."""
    c = model_config(size)
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    return {
        "qkv": (q + 2 * kv, c.hidden_size),
        "o": (c.hidden_size, q),
        "gate_up": (2 * c.intermediate_size, c.hidden_size),
        "down": (c.hidden_size, c.intermediate_size),
        "head": (c.vocab_size, c.hidden_size),
    }


def microseconds(size: str, shape: tuple[int, int], block: int = 16) -> float:
    """Of one matmul with a block's tokens."""
    backend, x, next_matrix, copies = _operands(size, shape, block)
    return graph_microseconds(backend.memory.stream, lambda: backend.linear(x, next_matrix()), 3 * copies)


def prefill_microseconds(size: str, shape: tuple[int, int], tokens: int, with_blas: bool) -> float:
    """Of one matmul with a piece of a prompt, by our kernels or by cuBLAS."""
    backend, x, next_matrix, copies = _operands(size, shape, tokens)

    def by_blas() -> Any:
        y = blas_matmul(x, next_matrix().values, BFLOAT16.weights)
        if y is None:
            raise RuntimeError("CuPy finds no cuBLAS")
        return y

    launch = by_blas if with_blas else lambda: backend.linear(x, next_matrix())
    return queued_microseconds(backend.memory.stream, launch, max(20, copies))


def _operands(
    size: str, shape: tuple[int, int], tokens: int
) -> tuple[NoiseBackend, Any, Callable[[], Any], int]:
    """A backend, x, what returns matrices in turn, and how many they are."""
    backend = NoiseBackend(model_config(size), BFLOAT16)
    copies = uncached(2 * shape[0] * shape[1])
    turn = itertools.cycle([backend.upload(shape) for _ in range(copies)])
    with backend.memory.stream:
        x = cupy.empty((tokens, shape[1]), np.uint16)
        noise(np.float32(1.0), x)
    return backend, x, lambda: next(turn), copies
