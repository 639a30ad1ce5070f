"""What a caller is told on the way: how far it is, and of each pass the block and what every layer read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from losart.attention.recorder import LayerRead


@dataclass(frozen=True)
class ObservedLayer:
    """What one layer of a pass read of the prefix.

    Attributes
    ----------
    active : int [any]
        Positions within the block whose prefix attention was computed, rising; the others reused
        their stored results.
    pages : tuple of int [any]
        For each kv head the pages that were read, rising; page i begins at position i * page_size.
    density : float or None
        Positions in those pages over the prefix length, a mean over kv heads (arXiv 2604.12056);
        None when the prefix is empty.
    dense : bool
        All tokens read all pages because the layer was dense.
    """

    active: np.ndarray
    pages: tuple[np.ndarray, ...]
    density: float | None
    dense: bool


@dataclass(frozen=True)
class ObservedPass:
    """One pass over a block.

    Attributes
    ----------
    kind : {"first", "later", "commit"}
    block_start : int
        Position in the sequence of the block's first token: the length of the prefix.
    block : list of int or None
        Tokens of the block after the pass; None where still masked.
    fixed : list of int
        Positions within the block that the pass fixed, rising; none in a commit pass.
    layers : tuple of ObservedLayer
    """

    kind: str
    block_start: int
    block: list[int | None]
    fixed: list[int]
    layers: tuple[ObservedLayer, ...]

    @property
    def density(self) -> float | None:
        """Mean over the layers; None when the prefix is empty."""
        known = [layer.density for layer in self.layers if layer.density is not None]
        return sum(known) / len(known) if known else None


Observer = Callable[[ObservedPass], None]
Progress = Callable[[int, int], None]  # done, in all: prompt tokens, layers of the weights, questions


def observed_layers(
    reads: Mapping[int, LayerRead],
    backend: Any,
    *,
    kv_heads: int,
    tokens: int,
    prefix_length: int,
    page_size: int,
) -> tuple[ObservedLayer, ...]:
    """Bring what a pass noted to the host.

    Parameters
    ----------
    reads : mapping of int to LayerRead
    backend : Backend
        Whose arrays they are.
    kv_heads, tokens, prefix_length, page_size : int
        Of the model, of the block, and of the cache during the pass.
    """
    pages = -(-prefix_length // page_size)
    sizes = np.minimum(page_size, prefix_length - page_size * np.arange(pages))

    def observed(read: LayerRead) -> ObservedLayer:
        if read.pages is None:
            every = np.arange(pages)
            return ObservedLayer(
                np.arange(tokens), (every,) * kv_heads, 1.0 if prefix_length else None, dense=True
            )
        active = np.arange(tokens) if read.tokens is None else backend.to_host(read.tokens)
        lists = tuple(ids.copy() for ids in backend.page_lists(read.pages))
        positions = sum(int(sizes[row].sum()) for row in lists)
        density = positions / (kv_heads * prefix_length) if prefix_length else None
        return ObservedLayer(active[active >= 0].copy(), lists, density, dense=False)

    return tuple(observed(reads[layer]) for layer in sorted(reads))
