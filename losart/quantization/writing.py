"""A checkpoint's directory, written tensor by tensor; it has its name only when it is complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from losart.errors import CheckpointError
from losart.loaders.safetensors_writer import SafetensorsWriter, TensorEntry, shard_name, write_index
from losart.observe.step import Progress

SHARD_BYTES = 4 << 30
PIECE = 1 << 20  # values that a thread has at a time
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pth", "*.gguf")


@dataclass(frozen=True)
class Written:
    """A tensor of the old checkpoint, and what it becomes.

    Attributes
    ----------
    entries : tuple of TensorEntry
        Of the new one.
    rows : int
    step : int
        Rows that are taken at a time.
    values : callable
        First row and the one after the last to the values of each of `entries` for them.
    nbytes : int
        That are read for it.
    release : callable
        Returns them to the operating system.
    """

    entries: tuple[TensorEntry, ...]
    rows: int
    step: int
    values: Callable[[int, int], tuple[np.ndarray, ...]]
    nbytes: int
    release: Callable[[], None]


def refuse_existing(destination: Path) -> None:
    """Raise CheckpointError where there is something of this name."""
    if os.path.lexists(destination):
        raise CheckpointError(f"{destination}: exists")


@contextmanager
def incomplete(destination: Path) -> Iterator[Path]:
    """A directory beside `destination`, which becomes it where nothing fails, and else is removed."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    directory = Path(
        tempfile.mkdtemp(prefix=f"{destination.name}.", suffix=".incomplete", dir=destination.parent)
    )
    directory.chmod(0o777 & ~_umask())
    try:
        yield directory
        directory.rename(destination)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def copy_others(source: Path, destination: Path) -> None:
    """Copy a checkpoint's files, but for its weights."""
    for file in sorted(source.iterdir()):
        if file.is_file() and not any(file.match(pattern) for pattern in WEIGHT_FILES):
            shutil.copyfile(file, destination / file.name)


def write_tensors(directory: Path, tensors: list[Written], progress: Progress | None) -> None:
    """Write model.safetensors, or several files and their index, a tensor at a time, by threads."""
    shards: list[list[Written]] = [[]]
    size = 0
    for tensor in tensors:
        nbytes = sum(entry.nbytes for entry in tensor.entries)
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    entries = [[entry for tensor in shard for entry in tensor.entries] for shard in shards]
    for number, (shard, of_shard) in enumerate(zip(shards, entries, strict=True)):
        with (
            SafetensorsWriter(directory / shard_name(number, len(shards)), of_shard) as writer,
            ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool,
        ):
            for tensor in shard:
                list(pool.map(partial(_write_rows, writer, tensor), range(0, tensor.rows, tensor.step)))
                tensor.release()
                done += tensor.nbytes
                if progress is not None:
                    progress(done >> 20, total >> 20)
    write_index(directory, entries)


def _write_rows(writer: SafetensorsWriter, tensor: Written, start: int) -> None:
    stop = min(tensor.rows, start + tensor.step)
    for entry, values in zip(tensor.entries, tensor.values(start, stop), strict=True):
        if values.size:
            writer.write(entry.name, start * (entry.nbytes // entry.shape[0]), values)


def _umask() -> int:
    """That of the process, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
