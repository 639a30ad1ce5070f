"""Results of the CUDA backend as NumPy arrays."""

from __future__ import annotations

import numpy as np


def on_host(backend, *arrays):
    backend.stream.synchronize()
    found = tuple(array.get() for array in arrays)
    return found if len(found) > 1 else found[0]


def product_array(backend, product):
    """A product's planes added up as product.cuh has it, with the bias. No others are read."""
    total = np.zeros(product.values.shape[1:])
    for panel in range(-(-product.rows // 128)):
        columns = slice(panel * 128, min(product.rows, panel * 128 + 128))
        first, last = panel * product.steps, (panel + 1) * product.steps - 1
        planes = last // product.share - first // product.share + 1
        with backend.stream:
            used = product.values[:planes, :, columns].copy()
        total[:, columns] = on_host(backend, used).astype(np.float64).sum(axis=0)
    return total + (0 if product.bias is None else on_host(backend, product.bias))
