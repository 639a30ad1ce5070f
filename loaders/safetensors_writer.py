"""safetensors files, written in pieces by any number of threads."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from losart.loaders.safetensors_files import INDEX_FILE


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a file.

    Attributes
    ----------
    name : str
    dtype : str
        safetensors' name.
    shape : tuple of int
    itemsize : int
        Bytes of a value.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    itemsize: int

    @property
    def nbytes(self) -> int:
        """In the file."""
        return math.prod(self.shape) * self.itemsize


class SafetensorsWriter:
    """A file whose header is written at once: its length, the header in JSON, then the tensors.

    Parameters
    ----------
    file : Path
        Is overwritten.
    tensors : iterable of TensorEntry
    """

    def __init__(self, file: Path, tensors: Iterable[TensorEntry]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._offsets, end = {}, 0
        for tensor in tensors:
            start, end = end, end + tensor.nbytes
            self._offsets[tensor.name] = start
            header[tensor.name] = {
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._data_start = 8 + len(text)
        self._stream = file.open("wb")
        self._stream.write(len(text).to_bytes(8, "little") + text)
        self._stream.truncate(self._data_start + end)
        self._stream.flush()

    def write(self, name: str, first: int, values: np.ndarray) -> None:
        """Write values of a tensor from its byte number `first` on."""
        data, offset = memoryview(values.tobytes()), self._data_start + self._offsets[name] + first
        while data:  # one call writes at most 2 GiB
            count = os.pwrite(self._stream.fileno(), data, offset)
            data, offset = data[count:], offset + count

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


def shard_name(number: int, shards: int) -> str:
    """File `number`, counted from 0, of so many."""
    return "model.safetensors" if shards == 1 else f"model-{number + 1:05}-of-{shards:05}.safetensors"


def write_index(directory: Path, shards: list[list[TensorEntry]]) -> None:
    """Which tensors are in which file; nothing where there is one alone."""
    if len(shards) == 1:
        return
    weight_map = {
        tensor.name: shard_name(i, len(shards)) for i, shard in enumerate(shards) for tensor in shard
    }
    nbytes = sum(tensor.nbytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
