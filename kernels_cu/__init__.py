"""CUDA sources of losart's kernels, and the one place that compiles them and hands them out."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

DTYPE_CODES = {"float32": 0, "bfloat16": 1, "float16": 2}
OPTIONS = ("--std=c++17",)

# Kernels of each file, in the order of their use.
FILES = {
    "embedding": ("embedding",),
    "rms_norm": ("add_rms_norm",),
    "linear": ("linear",),
    "heads": ("split_heads",),
    "cache_write": ("cache_write",),
    "prefix_attention": ("prefix_attention", "merge_parts"),
    "block_attention": ("block_attention",),
    "causal_attention": ("causal_attention",),
    "silu_gate": ("silu_gate",),
    "sampling": ("sample",),
}
_NEEDS_ATTENTION = ("prefix_attention", "block_attention", "causal_attention")


def source(file: str) -> str:
    """The whole source of one file, what it shares with others included."""
    folder = Path(__file__).parent
    parts = ["common.cuh", *(["attention.cuh"] if file in _NEEDS_ATTENTION else []), f"{file}.cu"]
    return "\n".join((folder / part).read_text() for part in parts)


def compile_options(dtype: str) -> tuple[str, ...]:
    """The compiler's options for weights, keys and values held in `dtype`."""
    return (*OPTIONS, f"-DLOSART_DTYPE={DTYPE_CODES[dtype]}")


@cache
def kernels(dtype: str) -> dict[str, Any]:
    """Kernels by name for the current device, compiled at first use and cached on disk by CuPy.

    Parameters
    ----------
    dtype : {"float32", "bfloat16", "float16"}
        In which weights, keys and values are held.
    """
    import cupy

    found = {}
    for file, names in FILES.items():
        module = cupy.RawModule(code=source(file), options=compile_options(dtype), backend="nvrtc")
        found.update({name: module.get_function(name) for name in names})
    return found
