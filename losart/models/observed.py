"""What the layers of a pass read of the prefix, brought to the host for an observer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from losart.backends.base import Backend, HostSelection, Selection
from losart.engine.batch import PassBatch, SequencePass
from losart.observe.step import ObservedLayer


def observed_layers(
    reads: Sequence[Selection | None], backend: Backend, batch: PassBatch, kv_heads: int
) -> list[tuple[ObservedLayer, ...]]:
    """Per sequence, its layers.

    Parameters
    ----------
    reads : sequence of Selection or None
        Per layer, of the pass that was run last.
    backend : Backend
        Whose arrays they are.
    batch : PassBatch
    kv_heads : int
    """
    layers = []
    for selection in reads:
        if selection is None:
            layers.append([_dense(sequence, kv_heads) for sequence in batch.sequences])
        else:
            found = zip(batch.sequences, backend.on_host(selection, batch), strict=True)
            layers.append([_sparse(sequence, read) for sequence, read in found])
    return list(zip(*layers, strict=True))


def _dense(sequence: SequencePass, kv_heads: int) -> ObservedLayer:
    pages = np.arange(sequence.pages)
    density = 1.0 if sequence.prefix_length else None
    return ObservedLayer(np.arange(len(sequence.ids)), (pages,) * kv_heads, density, dense=True)


def _sparse(sequence: SequencePass, read: HostSelection) -> ObservedLayer:
    page_size, length = sequence.cache.page_size, sequence.prefix_length
    sizes = np.minimum(page_size, length - page_size * np.arange(sequence.pages))
    positions = sum(int(sizes[ids].sum()) for ids in read.pages)
    density = positions / (len(read.pages) * length) if length else None
    pages = tuple(ids.copy() for ids in read.pages)
    return ObservedLayer(read.tokens.copy(), pages, density, dense=False, change=read.change)
