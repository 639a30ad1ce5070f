"""Tensors of a GGUF file: blocks of codes with their scales, and what they stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from losart.config.precision import DTYPES
from losart.errors import TensorError
from losart.loaders.gguf.reader import TYPES
from losart.loaders.quantized.tensor import QuantizedTensor
from losart.loaders.safetensors_files import MappedTensor

GROUP = 32  # columns of a block
_BLOCKS = {block.name: block for block in TYPES.values()}


@dataclass(frozen=True)
class OrderedTensor(MappedTensor):
    """A tensor of float32, float16 or bfloat16 whose rows are in another order in the file.

    Attributes
    ----------
    order : int array
        The file's row of each row.
    """

    order: np.ndarray

    def _values(self, name: str, start: int, stop: int | None) -> np.ndarray:
        return super()._values(name, 0, None)[self.order[start:stop]]


@dataclass(frozen=True)
class BlockTensor(QuantizedTensor):
    """A matrix whose blocks are codes with scales of groups, as kernels take them.

    Attributes
    ----------
    order : int array or None
        The file's row of each row; None where they are in order.
    """

    order: np.ndarray | None

    @property
    def scale_dtype(self) -> str:
        return "float16"

    @property
    def block_type(self) -> str:
        """Of `TYPES`."""
        return self._raw.dtype

    @property
    def _raw(self) -> MappedTensor:
        return self.parts["scales"]

    def _blocks(self, start: int, stop: int) -> np.ndarray:
        return blocks_of(self._raw, self.order, start, stop)


class Q8(BlockTensor):
    """Q8_0: a scale in float16 and 32 codes of 8 bits."""

    def codes(self, start: int, stop: int) -> np.ndarray:
        codes = self._blocks(start, stop)[:, :, 2:].view(np.int8)
        return codes.astype(np.int32).reshape(stop - start, -1)

    def scales(self, start: int, stop: int) -> np.ndarray:
        return halves(self._blocks(start, stop), 0)


class Q4(BlockTensor):
    """Q4_0: a scale in float16 and 32 codes of 4 bits, from -8 on."""

    def codes(self, start: int, stop: int) -> np.ndarray:
        return (_nibbles(self._blocks(start, stop)[:, :, 2:]) - 8).reshape(stop - start, -1)

    def scales(self, start: int, stop: int) -> np.ndarray:
        return halves(self._blocks(start, stop), 0)


class Q4WithMinimum(BlockTensor):
    """Q4_1: a scale and a minimum in float16, and 32 codes of 4 bits, from 0 on: code * scale + minimum.

    `rows` has that as (code - zero) * scale, with zeros that are no integers, to rounding.
    """

    whole_zeros: ClassVar[bool] = False

    @property
    def has_zeros(self) -> bool:
        return True

    @property
    def uses_zeros(self) -> bool:
        return True

    def codes(self, start: int, stop: int) -> np.ndarray:
        blocks = self._blocks(start, stop)
        codes = _nibbles(blocks[:, :, 4:]) - 8
        codes[halves(blocks, 0) == 0] = 0  # as `scales_and_zeros` has it
        return codes.reshape(stop - start, -1)

    def scales(self, start: int, stop: int) -> np.ndarray:
        return scales_and_zeros(*self._halves(start, stop))[0]

    def zeros(self, start: int, stop: int) -> np.ndarray:
        return scales_and_zeros(*self._halves(start, stop))[1]

    def float32(self, start: int, stop: int) -> np.ndarray:
        scales, minima = self._halves(start, stop)
        if not (np.isfinite(scales).all() and np.isfinite(minima).all()):
            raise TensorError(f"{self.file}: tensor {self._raw.name!r} has scales that are not finite")
        values = _nibbles(self._blocks(start, stop)[:, :, 4:], np.float32)
        values *= scales[:, :, None]
        values += minima[:, :, None]
        return values.reshape(stop - start, -1)

    def _halves(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        blocks = self._blocks(start, stop)
        return halves(blocks, 0), halves(blocks, 2)


def scales_and_zeros(scales: np.ndarray, minima: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zeros of (code - zero) * scale, codes from -8 on, for code * scale + minimum, from 0 on.

    Groups without a scale have their minimum in its place, and must have the code 0.
    """
    flat = scales == 0
    zeros = -minima.astype(np.float64) / np.where(flat, 1, scales) - 8
    return np.where(flat, minima, scales), np.where(flat, -1, zeros).astype(np.float32)


@dataclass(frozen=True)
class WideTensor:
    """A matrix that no kernel takes as it is in the file, and whose numbers are held.

    Attributes
    ----------
    raw : MappedTensor
    order : int array or None
        As of `BlockTensor`.
    """

    raw: MappedTensor
    order: np.ndarray | None = None

    @property
    def name(self) -> str:
        """As in the file."""
        return self.raw.name

    @property
    def file(self) -> Path:
        """That holds it."""
        return self.raw.file

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)"""
        return self.raw.shape

    @property
    def dtype(self) -> str:
        """Of `TYPES`."""
        return self.raw.dtype

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.raw.nbytes

    @property
    def codes(self) -> QuantizedTensor | None:
        """The same matrix as codes, if kernels take such blocks."""
        return None if self.dtype not in HELD else HELD[self.dtype](self.raw, self.order)

    def float32(self, start: int, stop: int) -> np.ndarray:
        """Some rows.

        Raises
        ------
        TensorError
            A scale is not finite.
        """
        codes = self.codes
        if codes is not None:
            return codes.float32(start, stop)
        with np.errstate(invalid="ignore"):
            values = WIDENED[self.dtype](blocks_of(self.raw, self.order, start, stop))
        if not np.isfinite(values).all():
            raise TensorError(f"{self.file}: tensor {self.name!r} has scales that are not finite")
        return values.reshape(stop - start, -1)

    def stored(self) -> tuple[MappedTensor, ...]:
        """What it is made of."""
        return (self.raw,)

    def release(self) -> None:
        """Return its pages to the operating system."""
        self.raw.release()


def _held(kind: type[BlockTensor], dtype: str) -> Callable[[MappedTensor, np.ndarray | None], BlockTensor]:
    def of(raw: MappedTensor, order: np.ndarray | None) -> BlockTensor:
        rows, columns = raw.shape
        return kind(raw.name, (rows, columns), dtype, GROUP, {"scales": raw}, order)

    return of


# Blocks that kernels take, and others.
HELD = {"q8_0": _held(Q8, "int8"), "q4_0": _held(Q4, "int4"), "q4_1": _held(Q4WithMinimum, "int4")}


def q4_k(blocks: np.ndarray) -> np.ndarray:
    """Q4_K: 8 groups of 32 codes of 4 bits, with scales and minima in 6 bits of two in float16."""
    packed = blocks[:, :, 4:16].reshape(*blocks.shape[:2], 3, 4)
    first, second, third = packed[:, :, 0], packed[:, :, 1], packed[:, :, 2]
    scales = np.concatenate([first & 63, (third & 15) | (first >> 2 & 48)], axis=-1).astype(np.float32)
    minima = np.concatenate([second & 63, (third >> 4) | (second >> 2 & 48)], axis=-1).astype(np.float32)
    scales = (halves(blocks, 0)[:, :, None] * scales)[..., None]
    minima = (halves(blocks, 2)[:, :, None] * minima)[..., None]
    pairs = blocks[:, :, 16:].reshape(
        *blocks.shape[:2], 4, 1, 32
    )  # low halves of a group, high ones of the next
    codes = np.concatenate([pairs & 15, pairs >> 4], axis=3).reshape(*blocks.shape[:2], 8, 32)
    return scales * codes.astype(np.float32) - minima


def q6_k(blocks: np.ndarray) -> np.ndarray:
    """Q6_K: 16 groups of 16 codes of 4 and 2 bits, with scales in 8 bits of one in float16."""
    shape = blocks.shape[:2]
    low = blocks[:, :, :128].reshape(*shape, 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], axis=3).reshape(*shape, 8, 32)
    high = blocks[:, :, 128:192].reshape(*shape, 2, 1, 32)
    high = np.concatenate([high >> bits & 3 for bits in (0, 2, 4, 6)], axis=3).reshape(*shape, 8, 32)
    codes = (low | high << 4).astype(np.int8) - np.int8(32)
    scales = np.ascontiguousarray(blocks[:, :, 192:208]).view(np.int8).astype(np.float32)
    scales = halves(blocks, 208)[:, :, None] * scales
    return scales[..., None] * codes.reshape(*shape, 16, 16).astype(np.float32)


WIDENED: dict[str, Callable[[np.ndarray], np.ndarray]] = {"q4_k": q4_k, "q6_k": q6_k}


def blocks_of(raw: MappedTensor, order: np.ndarray | None, start: int, stop: int) -> np.ndarray:
    """Blocks of some rows: uint8 [rows, blocks, bytes]."""
    rows = raw.bytes().reshape(raw.shape[0], -1, _BLOCKS[raw.dtype].nbytes)
    return rows[start:stop] if order is None else rows[order[start:stop]]


def halves(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 number of each block, as float32."""
    return np.ascontiguousarray(blocks[:, :, at : at + 2]).view("<f2")[:, :, 0].astype(np.float32)


def _nibbles(packed: np.ndarray, dtype: Any = np.int32) -> np.ndarray:
    """The low halves of a block's bytes, and after them the high ones: [rows, blocks, 32]."""
    codes = np.empty((*packed.shape[:-1], 2, packed.shape[-1]), dtype)
    np.bitwise_and(packed, 15, out=codes[..., 0, :], casting="unsafe")
    np.right_shift(packed, 4, out=codes[..., 1, :], casting="unsafe")
    return codes.reshape(*packed.shape[:-1], -1)


def tensor_of(
    raw: MappedTensor, order: np.ndarray | None, looked_up: bool
) -> MappedTensor | BlockTensor | WideTensor:
    """A tensor of the file as backends take it; one that is `looked_up` row by row is not held as codes."""
    if raw.dtype in DTYPES:
        if order is None:
            return raw
        where = raw.name, raw.file, raw.shape, raw.dtype, raw.nbytes, raw._mapping, raw._offset
        return OrderedTensor(*where, order)
    if raw.dtype in HELD and not looked_up:
        return HELD[raw.dtype](raw, order)
    return WideTensor(raw, order)
