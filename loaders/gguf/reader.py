"""The header of a GGUF file: metadata, and where which tensor is.

Everything is checked before it is used: each count and length against the bytes that are left, each tensor
against the file and the other tensors. Nothing is allocated that the file has not the bytes of.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from losart.errors import CheckpointError, ConfigError, TensorError
from losart.loaders.json_files import LARGEST_INTEGER
from losart.loaders.safetensors_files import MappedTensor

MAGIC, VERSIONS = b"GGUF", (2, 3)
ALIGNMENT = 32  # unless the metadata say otherwise
LARGEST_ALIGNMENT = 1 << 16
LARGEST_ARRAY = 1 << 22  # elements; vocabularies have 2^18
LARGEST_STRING = 1 << 24  # bytes
MOST_ENTRIES = 1 << 16  # keys, and tensors
MOST_DIMENSIONS = 4
STRING, ARRAY, BOOLEAN = 8, 9, 7
NUMBERS = {
    0: "u1",
    1: "i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


@dataclass(frozen=True)
class BlockType:
    """How numbers of a tensor are held: as blocks of neighbours in a row.

    Attributes
    ----------
    name : str
        As dtypes are called here.
    numbers, nbytes : int
        Of a block.
    """

    name: str
    numbers: int
    nbytes: int


TYPES = {
    0: BlockType("float32", 1, 4),
    1: BlockType("float16", 1, 2),
    2: BlockType("q4_0", 32, 18),
    3: BlockType("q4_1", 32, 20),
    8: BlockType("q8_0", 32, 34),
    12: BlockType("q4_k", 256, 144),
    14: BlockType("q6_k", 256, 210),
    30: BlockType("bfloat16", 1, 2),
}
OTHER_TYPES = {6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 13: "Q5_K", 15: "Q8_K", 39: "MXFP4"}


@dataclass(frozen=True)
class Metadata:
    """Keys and values of a GGUF file; errors name the file and the key.

    Attributes
    ----------
    file : Path
    values : dict
        Numbers, booleans and strings; arrays of numbers as NumPy's, of strings as lists.
    """

    file: Path
    values: dict[str, Any] = field(repr=False)

    def integer(self, key: str) -> int:
        """A positive integer; required."""
        value = self.optional_integer(key, 1)
        if value is None:
            raise self.missing(key)
        return value

    def optional_integer(self, key: str, minimum: int = 0) -> int | None:
        """An integer of `minimum` or more, None where absent."""
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= LARGEST_INTEGER:
            raise self.error(key, f"an integer from {minimum} to {LARGEST_INTEGER}")
        return value

    def optional_number(self, key: str) -> float | None:
        """A finite number, None where absent."""
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.error(key, "a finite number")
        return float(value)

    def optional_boolean(self, key: str) -> bool | None:
        """true or false, None where absent."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, "true or false")
        return value

    def text(self, key: str) -> str:
        """A string; required."""
        value = self.optional_text(key)
        if value is None:
            raise self.missing(key)
        return value

    def optional_text(self, key: str) -> str | None:
        """A string, None where absent."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, "a string")
        return value

    def texts(self, key: str) -> list[str]:
        """An array of strings; required."""
        value = self.values.get(key)
        if value is None:
            raise self.missing(key)
        if not isinstance(value, list):
            raise self.error(key, "an array of strings")
        return value

    def optional_integers(self, key: str) -> np.ndarray | None:
        """An array of integers, None where absent."""
        value = self.values.get(key)
        if value is not None and not (isinstance(value, np.ndarray) and value.dtype.kind in "iu"):
            raise self.error(key, "an array of integers")
        return value

    def missing(self, key: str) -> ConfigError:
        """The error for a required key that is absent."""
        return ConfigError(f"{self.file}: missing key {key!r}")

    def error(self, key: str, expected: str) -> ConfigError:
        """The error for a value that is not what was expected."""
        value = self.values[key]
        shown = f"an array of {len(value)}" if isinstance(value, (list, np.ndarray)) else f"{value!r:.60}"
        return ConfigError(f"{self.file}: {key} must be {expected}, not {shown}")


class _Cursor:
    """Reads on in a mapped file, and never past its end."""

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self.file, self.data, self.at = file, data, 0
        self.doing = "the header"

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: not a sound GGUF file: {self.doing}: {problem}")

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise self.error("the file ends within it")
        self.at += count
        return self.data[self.at - count : self.at]

    def integer(self, format: str) -> int:
        return struct.unpack(format, self.take(struct.calcsize(format)))[0]

    def count(self, least: int, most: int) -> int:
        """A number of things, at most so many, that take so many bytes at least."""
        number = self.integer("<Q")
        if number * least > len(self.data) - self.at:
            raise self.error(f"the file has no room for {number} of them")
        if number > most:
            raise self.error(f"{number} of them are more than {most}")
        return number

    def text(self) -> str:
        try:
            return self.take(self.count(1, LARGEST_STRING)).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"not UTF-8 text: {error}") from None

    def value(self, kind: int) -> Any:
        if kind in NUMBERS:
            return self.numbers(NUMBERS[kind], 1)[0].item()
        if kind == BOOLEAN:
            return self.boolean(self.take(1)[0])
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self.array()
        raise self.error(f"there is no type {kind}")

    def array(self) -> Any:
        kind = self.integer("<I")
        if kind in NUMBERS:
            size = np.dtype(NUMBERS[kind]).itemsize
            return self.numbers(NUMBERS[kind], self.count(size, LARGEST_ARRAY))
        if kind not in (BOOLEAN, STRING):
            raise self.error(f"arrays of type {kind} are not supported")
        number = self.count(1 if kind == BOOLEAN else 8, LARGEST_ARRAY)
        if kind == STRING:
            return [self.text() for _ in range(number)]
        return [self.boolean(byte) for byte in self.take(number)]

    def boolean(self, byte: int) -> bool:
        if byte > 1:
            raise self.error(f"a boolean is 0 or 1, not {byte}")
        return bool(byte)

    def numbers(self, dtype: str, number: int) -> np.ndarray:
        return np.frombuffer(self.take(number * np.dtype(dtype).itemsize), dtype)


def read_gguf(file: Path) -> tuple[Metadata, dict[str, MappedTensor]]:
    """Read the header of a GGUF file, and map its tensors.

    Returns
    -------
    Metadata
    dict of str to MappedTensor
        By name, with the shape [out, in] and one of the names of `TYPES` as dtype.

    Raises
    ------
    CheckpointError
        The file is missing, truncated or corrupt.
    TensorError
        A tensor is there twice, outside the file, on another one, or of a type that is not supported.
    """
    try:
        with file.open("rb") as stream:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # of an empty file
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    cursor = _Cursor(file, data)
    if cursor.take(4) != MAGIC:
        raise CheckpointError(f"{file}: not a GGUF file")
    version = cursor.integer("<I")
    if version not in VERSIONS:
        raise CheckpointError(f"{file}: GGUF version {version} is not supported; supported: 2, 3")
    tensors, keys = cursor.count(24, MOST_ENTRIES), cursor.count(13, MOST_ENTRIES)
    metadata = Metadata(file, dict(_read_keys(cursor, keys)))
    if (parts := metadata.optional_integer("split.count") or 1) > 1:
        raise CheckpointError(f"{file}: is one of {parts} files that make up a model, which is not supported")
    alignment = metadata.optional_integer("general.alignment")
    alignment = ALIGNMENT if alignment is None else alignment
    if alignment & (alignment - 1) or not 0 < alignment <= LARGEST_ALIGNMENT:
        raise metadata.error("general.alignment", f"a power of two up to {LARGEST_ALIGNMENT}")
    found = list(_read_tensors(cursor, tensors))
    start = -(-cursor.at // alignment) * alignment
    return metadata, _mapped(file, data, start, alignment, found)


def _read_keys(cursor: _Cursor, number: int) -> Iterator[tuple[str, Any]]:
    seen = set[str]()
    for index in range(number):
        cursor.doing = f"metadata key {index}"
        key = cursor.text()
        cursor.doing = f"metadata key {key!r}"
        if key in seen:
            raise cursor.error("is there twice")
        seen.add(key)
        yield key, cursor.value(cursor.integer("<I"))


def _read_tensors(cursor: _Cursor, number: int) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
    """Name, shape, type and offset of each."""
    for index in range(number):
        cursor.doing = f"tensor {index}"
        name = cursor.text()
        cursor.doing = f"tensor {name!r}"
        dimensions = cursor.integer("<I")
        if not 0 < dimensions <= MOST_DIMENSIONS:
            raise cursor.error(f"{dimensions} dimensions are not 1 to {MOST_DIMENSIONS}")
        shape = tuple(int(size) for size in cursor.numbers("<u8", dimensions)[::-1])
        yield name, shape, cursor.integer("<I"), cursor.integer("<Q")


def _mapped(
    file: Path,
    data: mmap.mmap,
    start: int,
    alignment: int,
    found: list[tuple[str, tuple[int, ...], int, int]],
) -> dict[str, MappedTensor]:
    tensors, ends = dict[str, MappedTensor](), list[tuple[int, int, str]]()
    for name, shape, kind, offset in found:
        where = f"{file}: tensor {name!r}"
        if name in tensors:
            raise TensorError(f"{where} is there twice")
        if kind not in TYPES:
            called = f"type {OTHER_TYPES.get(kind, kind)}"
            supported = ", ".join(one.name for one in TYPES.values())
            raise TensorError(f"{where} has the {called}, which is not supported; supported: {supported}")
        block, size = TYPES[kind], math.prod(shape)
        if shape[-1] % block.numbers or not size:
            raise TensorError(f"{where} has the shape {list(shape)}, not of blocks of {block.numbers}")
        nbytes = size // block.numbers * block.nbytes
        if offset % alignment:
            raise TensorError(f"{where} begins at {offset}, which is no multiple of {alignment}")
        if start + offset + nbytes > len(data):
            raise TensorError(f"{where} does not fit into the file: {nbytes} bytes from {start + offset} on")
        tensors[name] = MappedTensor(name, file, shape, block.name, nbytes, data, start + offset)
        ends.append((offset, offset + nbytes, name))
    ends.sort()
    for (_, end, one), (begin, _, other) in pairwise(ends):
        if begin < end:
            raise TensorError(f"{file}: tensors {one!r} and {other!r} overlap")
    return tensors
