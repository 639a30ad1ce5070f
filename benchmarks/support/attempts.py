"""Measurements that may fail: one that does leaves the reason in place of its figure."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any


def attempt(measure: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """What `measure` returns, or a str that says why it failed; device memory is free afterwards."""
    try:
        value = measure(*args, **options)
    except Exception as error:
        value = reason(error)
        print(f"{measure.__name__}: {value}", flush=True)
    # After the handler: until then the error's frames hold what they had allocated.
    free_memory()
    return value


def reason(error: Exception) -> str:
    """An error in a few words."""
    if isinstance(error, ImportError) and error.name:
        return f"{error.name} is not installed" if "No module" in str(error) else f"{error.name}: {error}"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = lines[0] if lines else "failed"
    return (message if type(error) is RuntimeError else f"{type(error).__name__}: {message}")[:200]


def ratio(above: Any, below: Any) -> float | None:
    """above / below, where both were measured."""
    if isinstance(above, (int, float)) and isinstance(below, (int, float)):
        return above / below
    return None


def teraflops(operations: int, microseconds: float | str) -> float | str:
    """Of so many operations in that time, or why it was not measured."""
    return microseconds if isinstance(microseconds, str) else operations / microseconds / 1e6


def free_memory() -> None:
    """Return unused memory to the device, so that others can have it."""
    gc.collect()
    cupy: Any = sys.modules.get("cupy")
    torch: Any = sys.modules.get("torch")
    with suppress(Exception):  # a broken device says so at the next measurement
        if cupy is not None:
            cupy.get_default_memory_pool().free_all_blocks()
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()
