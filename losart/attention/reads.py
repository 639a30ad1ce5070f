"""Counts what passes read of the prefix: density and active fraction."""

from __future__ import annotations


class ReadLog:
    """Density as the LoSA paper has it (arXiv 2604.12056): positions read over the prefix length.

    It is taken per kv head, layer and pass, and averaged; a pass over an empty prefix does not
    count.

    Parameters
    ----------
    kv_heads : int
    block_length : int
    """

    def __init__(self, kv_heads: int, block_length: int) -> None:
        self._kv_heads = kv_heads
        self._block_length = block_length
        self._pass = (False, 0, 0, 0)
        self._all = _Mean()
        self._sparse = _Mean()
        self._active = _Mean()

    def begin_pass(self, sparse: bool, prefix_length: int, dense_layers: int, sparse_layers: int) -> None:
        """A pass reads the whole prefix for all tokens in some layers, and some of it in others.

        `sparse`: whether the method reads sparsely in it, where it may.
        """
        self._pass = (sparse, prefix_length, dense_layers, sparse_layers)

    def end_pass(self, positions: int, active: int) -> None:
        """Its sparse layers read `positions`, summed over layers and kv heads, for `active` tokens each."""
        sparse, prefix_length, dense_layers, sparse_layers = self._pass
        self._active.add(sparse_layers * active / self._block_length, sparse_layers)
        if prefix_length:
            total = dense_layers + positions / (self._kv_heads * prefix_length)
            self._all.add(total, dense_layers + sparse_layers)
            if sparse:
                self._sparse.add(total, dense_layers + sparse_layers)

    @property
    def density(self) -> float | None:
        """Mean over all passes, dense ones included; None before any read."""
        return self._all.value

    @property
    def sparse_density(self) -> float | None:
        """Mean over the passes that the method reads sparsely; None without one."""
        return self._sparse.value

    @property
    def active_fraction(self) -> float | None:
        """Mean share of the block's tokens that were recomputed in sparse reads; None without one."""
        return self._active.value


class _Mean:
    def __init__(self) -> None:
        self._total = 0.0
        self._count = 0

    def add(self, total: float, count: int) -> None:
        self._total += total
        self._count += count

    @property
    def value(self) -> float | None:
        return self._total / self._count if self._count else None
