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
        self._sparse_pass = False
        self._all = _Mean()
        self._sparse = _Mean()
        self._active = _Mean()

    def begin_pass(self, *, sparse: bool) -> None:
        """Later reads belong to a pass that the method reads sparsely, or to a dense one."""
        self._sparse_pass = sparse

    def dense(self, layers: int, prefix_length: int) -> None:
        """Some layers of the pass read the whole prefix for all tokens."""
        if prefix_length:
            self._add(1.0, layers)

    def sparse(self, positions: int, prefix_length: int, active: int) -> None:
        """A layer read `positions`, summed over kv heads, for `active` tokens."""
        self._active.add(active / self._block_length)
        if prefix_length:
            self._add(positions / (self._kv_heads * prefix_length))

    def _add(self, density: float, layers: int = 1) -> None:
        self._all.add(density, layers)
        if self._sparse_pass:
            self._sparse.add(density, layers)

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

    def add(self, value: float, count: int = 1) -> None:
        self._total += value * count
        self._count += count

    @property
    def value(self) -> float | None:
        return self._total / self._count if self._count else None
