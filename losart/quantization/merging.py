"""A checkpoint's tensors with what an adapter changes in them, merged as they are loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from losart.backends.cpu.convert import float32_of
from losart.config.precision import FLOAT32, FORMATS
from losart.loaders import Checkpoint, MappedTensor, QuantizedTensor
from losart.loaders.adapters import Change
from losart.quantization.rounding import requantized


@dataclass(frozen=True)
class MergedTensor:
    """A matrix of a base, changed: W + scale * B A in float32, which its backend rounds once.

    Attributes
    ----------
    source : MappedTensor or QuantizedTensor
        What is changed: the base's matrix, or what replaces it.
    change : Change
        Its product, and the rows that it replaces.
    """

    source: Any
    change: Change

    @property
    def name(self) -> str:
        """The matrix's."""
        return self.source.name

    @property
    def file(self) -> Path:
        """That holds the matrix."""
        return self.source.file

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix's: (out, in)."""
        return self.source.shape

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> str:
        """The matrix's; float32 where that is of codes."""
        return self.source.dtype if self.source.dtype in FORMATS else FLOAT32.name

    @property
    def parameters(self) -> str:
        """What distinguishes it beside the values that it is made of."""
        product, rows = self.change.product, self.change.rows
        return f"{None if product is None else product.scale} {None if rows is None else rows.indices} "

    def float32(self, start: int, stop: int) -> np.ndarray:
        """Some rows.

        Raises
        ------
        TensorError
            A value of the adapter is not finite.
        """
        values = float32_of(self.source, start, stop)
        if not values.flags.writeable:  # it is the file's, mapped
            values = values.copy()
        if self.change.product is not None:
            values += self.change.product.delta(start, stop)
        if self.change.rows is not None:
            self.change.rows.place(values, start)
        return values

    def stored(self) -> Iterator[MappedTensor]:
        """What it is made of."""
        yield from self.source.stored()
        for tensor in self.change.stored():
            if tensor is not self.source:
                yield tensor

    def release(self) -> None:
        """Return the matrix's pages to the operating system."""
        self.source.release()


@dataclass(frozen=True)
class MergedQuantized(MergedTensor):
    """The same of a matrix of codes: they are chosen anew, with the format and the groups that it had.

    What of a product is less than half a step is lost so. Rows that are only replaced leave the others' codes
    as they are. `float32` has the entries before that, for backends that hold others than codes.
    """

    @property
    def dtype(self) -> str:
        """Of the codes."""
        return self.source.dtype

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.source.group

    @property
    def in_order(self) -> bool:
        """Whether groups are of consecutive columns."""
        return self.source.in_order

    @property
    def uses_zeros(self) -> bool:
        """Whether groups have zeros."""
        return self.source.uses_zeros

    @property
    def whole_zeros(self) -> bool:
        """Whether those are integers."""
        return self.source.whole_zeros

    @property
    def scale_dtype(self) -> str:
        """Whose numbers scales are."""
        return self.source.scale_dtype

    @property
    def has_invalid_codes(self) -> bool:
        """Whether some codes of the matrix, of float8, are NaN."""
        return self.source.has_invalid_codes

    def rows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Codes, scales and zeros of some rows; errors are those of `float32`."""
        if self.change.product is not None:
            return requantized(self.float32(start, stop), self.source)
        held = [None if part is None else np.array(part) for part in self.source.rows(start, stop)]
        for index in () if self.change.rows is None else self.change.rows.indices:
            if start <= index < stop:
                row = requantized(self.float32(index, index + 1), self.source)
                for part, of_row in zip(held, row, strict=True):
                    if part is not None and of_row is not None:
                        part[index - start] = of_row[0]
        codes, scales, zeros = held
        assert codes is not None and scales is not None
        return codes, scales, zeros


def is_merged(tensor: Any) -> bool:
    """Whether it is computed with what an adapter adds, rounded afterwards or not."""
    return isinstance(tensor, MergedTensor) or isinstance(getattr(tensor, "source", None), MergedTensor)


def merged_tensors(checkpoint: Checkpoint, merge: str) -> dict[str, Any]:
    """The tensors of a checkpoint, with its adapter's changes.

    `merge` says what becomes of codes that a product is added to: "dtype": numbers; "codes": other codes.
    """
    tensors: dict[str, Any] = dict(checkpoint.tensors)
    changes = checkpoint.changes
    lora = checkpoint.adapter
    replaced = "embed" in changes and changes["embed"].whole is not None
    if replaced and checkpoint.config.tie_embeddings and lora is not None and not lora.config.ties:
        tensors["head"] = tensors["embed"]  # as in PEFT, only the embedding is replaced
    for name, change in changes.items():
        source = change.whole if change.whole is not None else tensors.get(name, tensors["embed"])
        if not change.adds:
            tensors[name] = source
        elif isinstance(source, QuantizedTensor) and (merge == "codes" or change.product is None):
            tensors[name] = MergedQuantized(source, change)
        else:
            tensors[name] = MergedTensor(source, change)
    return tensors
