"""What an adapter changes in one tensor of its base."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from losart.errors import TensorError
from losart.loaders.quantized.tensor import widened
from losart.loaders.safetensors_files import MappedTensor


@dataclass(frozen=True)
class LowRank:
    """A product that is added to a matrix [out, in].

    Attributes
    ----------
    a, b : MappedTensor
        [rank, in] and [out, rank]; of an embedding, whose product is transposed, [rank, out] and [in, rank].
    scale : float
    transposed : bool
    """

    a: MappedTensor
    b: MappedTensor
    scale: float
    transposed: bool = False

    @property
    def rank(self) -> int:
        """Of the product."""
        return self.a.shape[0]

    def delta(self, start: int, stop: int) -> np.ndarray:
        """Some rows of the product, scaled, float32.

        Raises
        ------
        TensorError
            A value is not finite.
        """
        if self.transposed:
            rows = _finite(self.a, self._a[:, start:stop]).T
        else:
            rows = _finite(self.b, widened(self.b.array(start, stop)))
        return (rows @ self._inner) * np.float32(self.scale)

    @cached_property
    def _a(self) -> np.ndarray:
        return widened(self.a.array())

    @cached_property
    def _inner(self) -> np.ndarray:
        """[rank, in]"""
        if self.transposed:
            return _finite(self.b, widened(self.b.array())).T
        return _finite(self.a, self._a)


@dataclass(frozen=True)
class Rows:
    """Rows of a matrix that are replaced: `values` [rows, in] has them in the order of `indices`."""

    indices: tuple[int, ...]
    values: MappedTensor

    def place(self, matrix: np.ndarray, start: int) -> None:
        """Write those that are among a matrix's rows from `start` on.

        Raises
        ------
        TensorError
            A value is not finite.
        """
        for number, index in enumerate(self.indices):
            if start <= index < start + len(matrix):
                row = widened(self.values.array(number, number + 1))
                matrix[index - start] = _finite(self.values, row)[0]


@dataclass(frozen=True)
class Change:
    """What becomes of a tensor.

    Attributes
    ----------
    whole : MappedTensor or None
        What replaces it.
    product : LowRank or None
        What is added then.
    rows : Rows or None
        What replaces rows of that.
    """

    whole: MappedTensor | None = None
    product: LowRank | None = None
    rows: Rows | None = None

    @property
    def adds(self) -> bool:
        """Whether values of the base are computed with."""
        return self.product is not None or self.rows is not None

    def stored(self) -> Iterator[MappedTensor]:
        """What it is made of."""
        if self.whole is not None:
            yield self.whole
        if self.product is not None:
            yield from (self.product.a, self.product.b)
        if self.rows is not None:
            yield self.rows.values


def _finite(tensor: MappedTensor, values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise TensorError(f"{tensor.file}: tensor {tensor.name!r} has values that are not finite")
    return values
