"""Results of the CUDA backend as NumPy arrays."""

from __future__ import annotations

import numpy as np


def on_host(backend, *arrays):
    backend.stream.synchronize()
    found = tuple(array.get() for array in arrays)
    return found if len(found) > 1 else found[0]


def product_array(backend, product):
    """A product's planes added up as product.cuh has it, with the bias."""
    values = on_host(backend, product.values).astype(np.float64)
    total = np.zeros(values.shape[1:])
    for panel in range(-(-product.rows // 128)):
        columns = slice(panel * 128, min(product.rows, panel * 128 + 128))
        first, last = panel * product.steps, (panel + 1) * product.steps - 1
        planes = last // product.share - first // product.share + 1
        total[:, columns] = values[:planes, :, columns].sum(axis=0)
    return total + (0 if product.bias is None else on_host(backend, product.bias))
