"""Results of the CUDA backend as NumPy arrays."""

from __future__ import annotations

import numpy as np


def on_host(backend, *arrays):
    backend.memory.stream.synchronize()
    found = tuple(array.get() for array in arrays)
    return found if len(found) > 1 else found[0]


def stored_array(backend, slot, name, layer=0):
    """A layer of one of a slot's arrays."""
    if name == "top_pages":
        stored, kv_heads = slot.stored, backend.config.num_kv_heads
        shape = (kv_heads, stored.top_pages_rows, stored.top_pages)
        return slot.array(slot.offset(name, layer), shape, np.int32)
    tokens, heads, width = slot.stored.tokens, backend.config.num_heads, backend.config.head_dim
    shape = (tokens, heads) if name == "lse" else (tokens, heads, width)
    return slot.array(slot.offset(name, layer), shape, np.float32)


def matmul_array(backend, matmul):
    """A matmul's planes added up as planes.cuh has it, with the bias. No others are read."""
    total = np.zeros(matmul.planes.shape[1:])
    size = matmul.panel_rows
    for panel in range(-(-matmul.rows // size)):
        columns = slice(panel * size, min(matmul.rows, panel * size + size))
        first, last = panel * matmul.steps, (panel + 1) * matmul.steps - 1
        planes = last // matmul.share - first // matmul.share + 1
        with backend.memory.stream:
            used = matmul.planes[:planes, :, columns].copy()
        total[:, columns] = on_host(backend, used).astype(np.float64).sum(axis=0)
    return total + (0 if matmul.bias is None else on_host(backend, matmul.bias))
