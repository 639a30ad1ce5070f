"""Random tensors, written to safetensors files chunk by chunk by several threads."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from losart.backends.cpu.convert import narrow
from losart.config.precision import Format
from losart.observe.step import Progress

_CHUNK = 1 << 22  # values that one thread holds at a time


@dataclass(frozen=True)
class RandomTensor:
    """A tensor whose values are drawn from a normal distribution."""

    name: str
    shape: tuple[int, ...]
    std: float
    mean: float = 0.0

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def write_tensors(
    directory: Path,
    tensors: list[RandomTensor],
    format: Format,
    shards: int,
    seed: int,
    progress: Progress | None = None,
) -> None:
    """Write `tensors`, in this order, as model.safetensors or as `shards` files and their index.

    `progress` is called with the MiB written and the MiB in total.
    """
    for stale in directory.glob("model*.safetensors*"):
        stale.unlink()
    total = sum(tensor.size for tensor in tensors)
    done = 0

    def wrote(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done >> 20, total * format.itemsize >> 20)

    if shards == 1:
        _write_file(directory / "model.safetensors", tensors, format, seed, wrote)
        return
    parts: list[list[RandomTensor]] = [[] for _ in range(shards)]
    written = 0
    for tensor in tensors:
        parts[min(shards - 1, written * shards // total)].append(tensor)
        written += tensor.size
    weight_map: dict[str, str] = {}
    for i, part in enumerate(parts):
        name = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        _write_file(directory / name, part, format, seed, wrote)
        weight_map |= {tensor.name: name for tensor in part}
    index = {"metadata": {"total_size": total * format.itemsize}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_file(
    file: Path, tensors: list[RandomTensor], format: Format, seed: int, wrote: Callable[[int], None]
) -> None:
    """A safetensors file is the header's length, the header in JSON, and the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.size * format.itemsize
        entry = {"dtype": format.safetensors, "shape": list(tensor.shape), "data_offsets": [start, end]}
        header[tensor.name] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data_start = 8 + len(text)

    with file.open("wb") as stream, ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(data_start + end)
        stream.flush()
        jobs = []
        for tensor in tensors:
            offset = data_start + header[tensor.name]["data_offsets"][0]
            for first in range(0, tensor.size, _CHUNK):
                chunk_offset = offset + first * format.itemsize
                jobs.append(pool.submit(_write_chunk, stream, chunk_offset, tensor, first, format, seed))
        try:
            for job in jobs:
                wrote(job.result())
        except BaseException:  # after an interrupt, do not wait for chunks that have not started
            pool.shutdown(cancel_futures=True)
            raise


def _write_chunk(
    stream: BinaryIO, offset: int, tensor: RandomTensor, first: int, format: Format, seed: int
) -> int:
    """Returns the number of bytes."""
    # Seeded by name and position, so that the values depend neither on threads nor on shards.
    generator = np.random.default_rng([seed, first, *tensor.name.encode()])
    values = generator.standard_normal(min(_CHUNK, tensor.size - first), dtype=np.float32)
    values *= np.float32(tensor.std)
    values += np.float32(tensor.mean)
    data = memoryview(narrow(values, format).tobytes())
    while data:  # one call writes at most 2 GiB
        count = os.pwrite(stream.fileno(), data, offset)
        data, offset = data[count:], offset + count
    return values.size * format.itemsize
