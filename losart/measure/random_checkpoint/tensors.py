"""Random tensors, written to safetensors files chunk by chunk by several threads."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from losart.backends.cpu.convert import narrow
from losart.config.precision import Format
from losart.loaders.safetensors_writer import SafetensorsWriter, TensorEntry, shard_name, write_index
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

    def entry(self, format: Format) -> TensorEntry:
        """In a file."""
        return TensorEntry(self.name, format.safetensors, self.shape, format.itemsize)


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

    parts: list[list[RandomTensor]] = [[] for _ in range(shards)]
    written = 0
    for tensor in tensors:
        parts[min(shards - 1, written * shards // total)].append(tensor)
        written += tensor.size
    entries = [[tensor.entry(format) for tensor in part] for part in parts]
    for i, (part, of_part) in enumerate(zip(parts, entries, strict=True)):
        with SafetensorsWriter(directory / shard_name(i, shards), of_part) as writer:
            _write_tensors(writer, part, format, seed, wrote)
    write_index(directory, entries)


def _write_tensors(
    writer: SafetensorsWriter,
    tensors: list[RandomTensor],
    format: Format,
    seed: int,
    wrote: Callable[[int], None],
) -> None:
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        jobs = [
            pool.submit(_write_chunk, writer, tensor, first, format, seed)
            for tensor in tensors
            for first in range(0, tensor.size, _CHUNK)
        ]
        try:
            for job in jobs:
                wrote(job.result())
        except BaseException:  # after an interrupt, do not wait for chunks that have not started
            pool.shutdown(cancel_futures=True)
            raise


def _write_chunk(
    writer: SafetensorsWriter, tensor: RandomTensor, first: int, format: Format, seed: int
) -> int:
    """Returns the number of bytes."""
    # Seeded by name and position, so that the values depend neither on threads nor on shards.
    generator = np.random.default_rng([seed, first, *tensor.name.encode()])
    values = generator.standard_normal(min(_CHUNK, tensor.size - first), dtype=np.float32)
    values *= np.float32(tensor.std)
    values += np.float32(tensor.mean)
    writer.write(tensor.name, first * format.itemsize, narrow(values, format))
    return values.size * format.itemsize
