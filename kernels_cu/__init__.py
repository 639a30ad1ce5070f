"""CUDA sources of losart's kernels, and the one place that compiles them and hands them out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

DTYPE_CODES = {"float32": 0, "bfloat16": 1, "float16": 2}
SIXTEEN_BIT = ("bfloat16", "float16")


@dataclass(frozen=True)
class KernelFile:
    """A .cu file: its kernels, the headers it needs, and the dtypes it can be compiled for."""

    kernels: tuple[str, ...]
    headers: tuple[str, ...] = ("common.cuh",)
    dtypes: tuple[str, ...] = tuple(DTYPE_CODES)


ATTENTION = ("common.cuh", "attention.cuh")
TENSOR = ("common.cuh", "tensor.cuh")
FILES = {
    "embedding": KernelFile(("embedding",)),
    "rms_norm": KernelFile(("add_rms_norm",)),
    "linear": KernelFile(("linear",)),
    "linear_tensor": KernelFile(("linear_tensor", "sum_splits"), TENSOR, SIXTEEN_BIT),
    "heads": KernelFile(("split_heads",)),
    "cache_write": KernelFile(("cache_write",)),
    "prefix_attention": KernelFile(("prefix_attention", "merge_parts"), ATTENTION),
    "prefix_attention_tensor": KernelFile(("prefix_attention_tensor",), TENSOR, SIXTEEN_BIT),
    "block_attention": KernelFile(("block_attention",), ATTENTION),
    "causal_attention": KernelFile(("causal_attention",), ATTENTION),
    "silu_gate": KernelFile(("silu_gate",)),
    "sampling": KernelFile(("sample",)),
}
_FILE_OF = {kernel: name for name, file in FILES.items() for kernel in file.kernels}

Defines = tuple[tuple[str, int], ...]


def source(file: str) -> str:
    """The whole source of one file, its headers included."""
    folder = Path(__file__).parent
    return "\n".join((folder / part).read_text() for part in (*FILES[file].headers, f"{file}.cu"))


def compile_options(dtype: str, defines: Defines = ()) -> tuple[str, ...]:
    """The compiler's options for weights, keys and values held in `dtype`."""
    macros = (("LOSART_DTYPE", DTYPE_CODES[dtype]), *defines)
    return ("--std=c++17", *(f"-D{name}={value}" for name, value in macros))


@cache
def kernel(name: str, dtype: str, defines: Defines = ()) -> Any:
    """A kernel for the current device, compiled at first use and cached on disk by CuPy.

    Parameters
    ----------
    name : str
    dtype : {"float32", "bfloat16", "float16"}
        In which weights, keys and values are held.
    defines : tuple of (str, int)
        The file's compile-time constants.
    """
    return _module(_FILE_OF[name], dtype, defines).get_function(name)


@cache
def _module(file: str, dtype: str, defines: Defines) -> Any:
    import cupy

    return cupy.RawModule(code=source(file), options=compile_options(dtype, defines), backend="nvrtc")
