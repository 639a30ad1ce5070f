"""Tensors of a checkpoint's safetensors files, mapped into memory."""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import safetensors

from losart.config.precision import FORMATS
from losart.errors import CheckpointError, TensorError
from losart.loaders.json_files import read_json_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# dtypes by safetensors' name: ours, and NumPy's of an array of such values.
_NUMBERS = {format.safetensors: (format.name, format.array) for format in FORMATS.values()}
_CODES = {"I8": "int8", "I32": "int32", "I64": "int64", "F8_E4M3": "float8"}
_CODE_ARRAYS = {"int8": "int8", "int32": "int32", "int64": "int64", "float8": "uint8"}
_DTYPES = _NUMBERS | {saved: (name, _CODE_ARRAYS[name]) for saved, name in _CODES.items()}


@dataclass(frozen=True)
class MappedTensor:
    """A tensor in a mapped file.

    Attributes
    ----------
    name : str
        As in the file.
    file : Path
    shape : tuple of int
    dtype : {"float32", "bfloat16", "float16", "int8", "int32", "int64", "float8"}
        Or safetensors' name of another dtype.
    nbytes : int
    """

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    _mapping: mmap.mmap = field(repr=False)
    _offset: int = field(repr=False)

    def array(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The values, or some rows, read-only and not copied: float32, float16, or bfloat16 as uint16 bits.

        The array stays usable after `release`: its pages are then read from the file again.

        Raises
        ------
        TensorError
            If the dtype is not one of the three.
        """
        if self.dtype not in FORMATS:
            raise TensorError(f"{self.file}: tensor {self.name!r} has the unsupported dtype {self.dtype}")
        return self._values(FORMATS[self.dtype].array, start, stop)

    def codes(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """As `array`, of integers, and of float8 as its bits: int8, int32, int64 or uint8.

        Raises
        ------
        TensorError
            If the dtype is none of these.
        """
        if self.dtype not in _CODE_ARRAYS:
            raise TensorError(f"{self.file}: tensor {self.name!r} has the unsupported dtype {self.dtype}")
        return self._values(_CODE_ARRAYS[self.dtype], start, stop)

    def bytes(self) -> np.ndarray:
        """The values as they are in the file: uint8 [nbytes]."""
        return np.frombuffer(self._mapping, np.uint8, self.nbytes, self._offset)

    def stored(self) -> tuple[MappedTensor, ...]:
        """Itself, as a quantized tensor has several."""
        return (self,)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def _values(self, name: str, start: int, stop: int | None) -> np.ndarray:
        dtype, count = np.dtype(name).newbyteorder("<"), self.size
        array = np.frombuffer(self._mapping, dtype, count, self._offset).reshape(self.shape)
        if start or stop is not None:
            array = array[start:stop]
        if self._offset % dtype.itemsize:
            # Compiled code must not read misaligned values.
            array = array.copy()
            array.flags.writeable = False
        return array

    def release(self) -> None:
        """Return the tensor's pages to the operating system, where it supports that."""
        if not hasattr(mmap, "MADV_DONTNEED") or not self.nbytes:
            return
        # The first and last page may be shared with other tensors; they are clean, so nothing is lost.
        start = self._offset - self._offset % mmap.PAGESIZE
        self._mapping.madvise(mmap.MADV_DONTNEED, start, self._offset + self.nbytes - start)


def map_tensors(directory: Path) -> dict[str, MappedTensor]:
    """Map every tensor of the checkpoint in `directory`.

    Parameters
    ----------
    directory : Path
        Holds model.safetensors, or several files and model.safetensors.index.json.

    Returns
    -------
    dict of str to MappedTensor
        By the name in the files.

    Raises
    ------
    CheckpointError
        If a file is missing, truncated or corrupt, or the index names one outside the directory.
    TensorError
        If a tensor of the index is not in its file, or a tensor is in two files.
    """
    if (directory / SINGLE_FILE).exists():
        return map_file(directory / SINGLE_FILE)
    if not (directory / INDEX_FILE).exists():
        raise CheckpointError(f"{directory}: {_why_no_tensors(directory)}")

    weight_map = _read_weight_map(directory / INDEX_FILE)
    tensors: dict[str, MappedTensor] = {}
    for file_name in dict.fromkeys(weight_map.values()):
        for name, tensor in map_file(directory / file_name).items():
            if name in tensors:
                raise TensorError(f"tensor {name!r} is both in {tensors[name].file} and in {tensor.file}")
            tensors[name] = tensor
    for name, file_name in weight_map.items():
        file = directory / file_name
        if name not in tensors or tensors[name].file != file:
            raise TensorError(f"{file}: tensor {name!r} is missing, although {INDEX_FILE} lists it")
    return tensors


def map_file(file: Path) -> dict[str, MappedTensor]:
    """Map every tensor of one safetensors file, by name.

    Raises
    ------
    CheckpointError
        If the file is missing, truncated or corrupt.
    """
    if not file.exists():
        raise CheckpointError(f"{file}: no such file")
    try:
        # Checks that the header is valid and that the tensors fill the file without gaps or overlaps.
        with safetensors.safe_open(file, framework="numpy"):
            pass
        with file.open("rb") as stream:
            mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        data_start = 8 + int.from_bytes(mapping[:8], "little")
        header = json.loads(mapping[8:data_start])
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            dtype = entry["dtype"]
            name_of_dtype, array = _DTYPES.get(dtype, (dtype, None))
            # Checked again, since a wrong size would make NumPy or the kernel read past the file.
            wrong_size = array is not None and end - start != math.prod(shape) * np.dtype(array).itemsize
            if wrong_size or data_start + end > len(mapping):
                raise CheckpointError(f"{file}: tensor {name!r} does not fit its place in the file")
            where = end - start, mapping, data_start + start
            tensors[name] = MappedTensor(name, file, shape, name_of_dtype, *where)
        return tensors
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file}: not a sound safetensors file: {error}") from error
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must be an object of tensor names and file names")
    for name, file_name in weight_map.items():
        # Checked by name only: in the hub's cache every file is a link out of the directory.
        if not isinstance(file_name, str) or not _is_inside(file_name):
            raise CheckpointError(
                f"{index}: tensor {name!r} is in {file_name!r}, which is not a file of this directory"
            )
    return weight_map


def _is_inside(file_name: str) -> bool:
    for path in (PurePosixPath(file_name), PureWindowsPath(file_name)):
        if path.anchor or ".." in path.parts or not path.parts:
            return False
    return "\0" not in file_name


def _why_no_tensors(directory: Path) -> str:
    if any(directory.glob("*.bin")) or any(directory.glob("*.bin.index.json")):
        return "only safetensors checkpoints are supported; this one has PyTorch .bin files"
    if any(directory.glob("*.safetensors")):
        return f"several safetensors files need {INDEX_FILE}, which is missing"
    return f"neither {SINGLE_FILE} nor {INDEX_FILE} exists"
