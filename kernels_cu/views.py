"""Structs that kernels take by value, field by field as common/views.cuh declares them.

`layout_checks` has the compiler verify that both declarations agree.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_longlong, c_void_p


class CacheView(ctypes.Structure):
    """A layer of a KV cache."""

    _fields_ = (
        ("kv_chunks", c_void_p),
        ("bound_chunks", c_void_p),
        ("length", c_void_p),
        ("layer", c_int),
        ("kv_heads", c_int),
        ("head_dim", c_int),
        ("chunk_positions", c_int),
        ("page_size", c_int),
    )


class BatchView(ctypes.Structure):
    """The pass's inputs, where the host has copied them, and what it counts."""

    _fields_ = (
        ("uniforms", c_void_p),
        ("slot", c_void_p),
        ("length", c_void_p),
        ("masked_count", c_void_p),
        ("ids", c_void_p),
        ("masked", c_void_p),
        ("positions_read", c_void_p),
        ("tokens", c_int),
    )


class WeightView(ctypes.Structure):
    """A matrix [rows, inner] of weights."""

    _fields_ = (("values", c_void_p), ("rows", c_int), ("inner", c_int))


class MatmulView(ctypes.Structure):
    """The result of a matmul, whose partial sums the kernel that reads it adds up."""

    _fields_ = (
        ("planes", c_void_p),
        ("bias", c_void_p),
        ("tokens", c_int),
        ("rows", c_int),
        ("steps", c_int),
        ("share", c_int),
    )


class PartsView(ctypes.Structure):
    """Attention over the prefix in parts that are not merged yet."""

    _fields_ = (
        ("o", c_void_p),
        ("tops", c_void_p),
        ("totals", c_void_p),
        ("parts", c_int),
        ("tokens", c_int),
    )


class StoredView(ctypes.Structure):
    """An array in a sequence's slot, whose address the device reads; `slot` null: none."""

    _fields_ = (("slot", c_void_p), ("offset", c_longlong))


class PagesView(ctypes.Structure):
    """Pages that each kv head reads: marks, or the top pages of rows."""

    _fields_ = (
        ("marks", c_void_p),
        ("top", StoredView),
        ("words", c_int),
        ("rows", c_int),
        ("count", c_int),
    )


VIEWS = (CacheView, BatchView, WeightView, MatmulView, PartsView, StoredView, PagesView)


def layout_checks() -> str:
    """Static assertions that sizes and offsets are those of the ctypes declarations."""
    checks = []
    for view in VIEWS:
        checks.append(f"sizeof({view.__name__}) == {ctypes.sizeof(view)}")
        for name, *_ in view._fields_:
            field = getattr(view, name)
            # As offsetof, which NVRTC lacks, is defined for its front end.
            checks.append(f"__INTADDR__(&(({view.__name__} *)0)->{name}) == {field.offset}")
            checks.append(f"sizeof({view.__name__}::{name}) == {field.size}")
    return "".join(f'static_assert({check}, "kernels_cu/views.py disagrees");\n' for check in checks)
