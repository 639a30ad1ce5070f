"""A matrix as codes and scales, however a checkpoint's files hold it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np

from losart.errors import TensorError
from losart.loaders.json_files import JsonObject
from losart.loaders.quantized.float8 import FLOAT8_VALUES
from losart.loaders.safetensors_files import MappedTensor

FLOATS = ("float32", "bfloat16", "float16")
WORD_BITS = 32


@dataclass(frozen=True)
class QuantizedTensor(ABC):
    """A matrix [out, in] of entries (code - zero) * scale; those of a group share zero and scale.

    Attributes
    ----------
    name : str
        As an unquantized checkpoint would call it.
    shape : (int, int)
    dtype : {"int4", "int8", "float8"}
        Of the codes; float8 is E4M3, which has no infinities.
    group : int
        Consecutive columns that share a scale; the last group of a row may be shorter.
    parts : dict of str to MappedTensor
        What it is made of, the codes first, by the ends of their names. "g_idx" has columns' groups where
        these are not in order.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    group: int
    parts: dict[str, MappedTensor]
    whole_zeros: ClassVar[bool] = True  # whether zeros are integers

    @abstractmethod
    def codes(self, start: int, stop: int) -> np.ndarray:
        """Codes of some rows, [stop - start, in]: int32, from -2^(bits - 1) on; float8's bits as uint8."""

    @abstractmethod
    def scales(self, start: int, stop: int) -> np.ndarray:
        """Scales of some rows, float32 [stop - start, groups]."""

    def zeros(self, start: int, stop: int) -> np.ndarray | None:
        """Zeros of some rows, [stop - start, groups]: int32, without `whole_zeros` float32; None: all 0."""
        return None

    @property
    def has_zeros(self) -> bool:
        """Whether some zeros may be others than 0."""
        return "weight_zero_point" in self.parts or "qzeros" in self.parts

    @property
    def uses_zeros(self) -> bool:
        """Whether some are: symmetric GPTQ has zeros that are all 0."""
        if not self.has_zeros:
            return False
        zeros = self.zeros(0, self.shape[0])
        return zeros is not None and bool(zeros.any())

    @property
    def scale_dtype(self) -> str:
        """In which the files have scales."""
        return next(part.dtype for end, part in self.parts.items() if "scale" in end)

    @property
    def has_invalid_codes(self) -> bool:
        """Whether some codes, of float8, are NaN."""
        if self.dtype != "float8":
            return False
        step = max(1, (1 << 22) // max(1, self.shape[1]))
        for start in range(0, self.shape[0], step):
            if (self.codes(start, min(self.shape[0], start + step)) & 0x7F == 0x7F).any():
                return True
            self.release()
        return False

    @property
    def in_order(self) -> bool:
        """Whether groups are of consecutive columns."""
        return "g_idx" not in self.parts

    @cached_property
    def group_of_column(self) -> np.ndarray:
        """int [in]"""
        index = self.parts.get("g_idx")
        return np.arange(self.shape[1]) // self.group if index is None else index.codes().astype(np.int64)

    @property
    def bits(self) -> int:
        """Of a code."""
        return bits_of(self.dtype)

    @property
    def groups(self) -> int:
        """Of a row."""
        return -(-self.shape[1] // self.group)

    @property
    def file(self) -> Path:
        """That holds the codes."""
        return next(iter(self.parts.values())).file

    @property
    def nbytes(self) -> int:
        """Bytes in the files."""
        return sum(part.nbytes for part in self.parts.values())

    def rows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Codes, scales and zeros of some rows.

        Raises
        ------
        TensorError
            A scale is not finite.
        """
        scales = self.scales(start, stop)
        if not np.isfinite(scales).all():
            part = next(part for end, part in self.parts.items() if "scale" in end)
            raise TensorError(f"{part.file}: tensor {part.name!r} has scales that are not finite")
        return self.codes(start, stop), scales, self.zeros(start, stop)

    def float32(self, start: int, stop: int) -> np.ndarray:
        """Some rows of the matrix; errors are those of `rows`."""
        codes, scales, zeros = self.rows(start, stop)
        values = FLOAT8_VALUES[codes] if self.dtype == "float8" else codes
        if zeros is not None:
            values = values - zeros[:, self.group_of_column]
        return values.astype(np.float32, copy=False) * scales[:, self.group_of_column]

    def stored(self) -> tuple[MappedTensor, ...]:
        """What it is made of."""
        return tuple(self.parts.values())

    def release(self) -> None:
        """Return its pages to the operating system."""
        for part in self.parts.values():
            part.release()


class Quantization(ABC):
    """What a checkpoint's `quantization_config` says, and where its matrices are.

    Parameters
    ----------
    config : JsonObject
        The `quantization_config`.

    Raises
    ------
    ConfigError
    """

    harmless: ClassVar[tuple[str, ...]] = ()  # patterns of tensors that are not needed

    @abstractmethod
    def __init__(self, config: JsonObject) -> None: ...

    @abstractmethod
    def find(
        self, name: str, shape: tuple[int, ...], saved: Mapping[str, MappedTensor]
    ) -> QuantizedTensor | None:
        """The matrix of an unquantized name; None where it is not quantized.

        Raises
        ------
        TensorError
            A part of it is missing or has the wrong shape or dtype.
        """


def bits_of(dtype: str) -> int:
    """Of a code of "int4", "int8" or "float8"."""
    return 4 if dtype == "int4" else 8


def find_parts(
    module: str, ends: Mapping[str, bool], saved: Mapping[str, MappedTensor]
) -> dict[str, MappedTensor]:
    """Tensors of a module by the ends of their names, those first that it must have.

    Raises
    ------
    TensorError
        One is missing that `ends` says is needed.
    """
    parts = {end: saved[f"{module}.{end}"] for end in ends if f"{module}.{end}" in saved}
    for end, needed in ends.items():
        if needed and end not in parts:
            file = next(iter(parts.values())).file
            raise TensorError(f"{file}: tensor {f'{module}.{end}'!r} is missing")
    return parts


def check_part(part: MappedTensor, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    """See that a part has a shape and one of some dtypes.

    Raises
    ------
    TensorError
    """
    if part.shape != shape:
        raise TensorError(
            f"{part.file}: tensor {part.name!r} has the shape {list(part.shape)}; expected: {list(shape)}"
        )
    if part.dtype not in dtypes:
        raise TensorError(
            f"{part.file}: tensor {part.name!r} has the dtype {part.dtype}; expected: {', '.join(dtypes)}"
        )


def check_groups(parts: dict[str, MappedTensor], columns: int, group: int) -> None:
    """See that "g_idx", if there is one, names a group for each column.

    One that is full of -1, or has groups of `group` consecutive columns, is left out of the parts.

    Raises
    ------
    TensorError
    """
    index = parts.get("g_idx")
    if index is None:
        return
    check_part(index, (columns,), ("int32",))
    numbers, groups = index.codes(), -(-columns // group)
    if (numbers == -1).all() or np.array_equal(numbers, np.arange(columns) // group):
        del parts["g_idx"]
    elif not 0 <= numbers.min() <= numbers.max() < groups:
        raise TensorError(f"{index.file}: tensor {index.name!r} names groups beyond 0 to {groups - 1}")


def unpacked(words: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> np.ndarray:
    """Codes from words of 32 bits along the last axis, the lowest bits first: int32.

    `order` says which of a word's codes each place holds.
    """
    count = WORD_BITS // bits
    places = np.arange(count) if order is None else np.argsort(order)
    shifts = (places * bits).astype(np.uint32)
    codes = words.view(np.uint32)[..., None] >> shifts & np.uint32((1 << bits) - 1)
    return codes.astype(np.int32).reshape(*words.shape[:-1], -1)


def widened(values: np.ndarray) -> np.ndarray:
    """Scales as float32; bfloat16 comes as its bits."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)
