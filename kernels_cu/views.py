"""Structs that kernels take by value, field by field as common/views.cuh declares them.

`layout_checks` has the compiler verify that both declarations agree.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_longlong, c_void_p


def _fields(pointers: str, ints: str) -> list[tuple[str, type]]:
    """Fields by their names: first pointers, then numbers."""
    return [*((name, c_void_p) for name in pointers.split()), *((name, c_int) for name in ints.split())]


class CachesView(ctypes.Structure):
    """A layer of the KV caches of a pass's sequences."""

    _fields_ = _fields("tables table lengths", "layer kv_heads head_dim chunk_positions page_size max_chunks")


class BatchView(ctypes.Structure):
    """The pass's inputs, where the host has copied them."""

    _fields_ = _fields(
        "uniforms top_p ids positions rotations proposed_count proposed logits mask_token top_k temperature",
        "",
    )


class WeightView(ctypes.Structure):
    """A matrix [rows, inner] of weights."""

    _fields_ = _fields("values", "rows inner")


class QuantizedView(ctypes.Structure):
    """A matrix [rows, inner] of codes with scales."""

    _fields_ = _fields("codes scales zeros", "rows inner group groups")


class MatmulView(ctypes.Structure):
    """The result of a matmul, whose partial sums are accumulated by the kernel that reads it."""

    _fields_ = _fields("planes bias", "tokens rows panel_rows steps share")


class PartsView(ctypes.Structure):
    """Attention over the prefix in parts that are not merged yet."""

    _fields_ = _fields("o tops totals first", "parts tokens")


class StoredView(ctypes.Structure):
    """An array in each sequence's slot, whose address the device reads; `slot` null: none."""

    _fields_ = (("slot", c_void_p), ("offset", c_longlong))


class PagesView(ctypes.Structure):
    """Pages that each kv head of each sequence reads: marks, or the top pages of rows."""

    _fields_ = [*_fields("marks", ""), ("top", StoredView), *_fields("", "words rows count")]


class RoutingView(ctypes.Structure):
    """Which experts tokens go to, and which rows experts have."""

    _fields_ = _fields("experts weights places items item_count", "tokens slots")


VIEWS = (
    CachesView,
    BatchView,
    WeightView,
    QuantizedView,
    MatmulView,
    PartsView,
    StoredView,
    PagesView,
    RoutingView,
)


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
