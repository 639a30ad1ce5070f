"""A file with the keys, values and page bounds of a prefix.

    preamble    magic, version, length of the header, crc32 of the header
    header      JSON: what the prefix belongs to, and the bytes of each section; filled up with spaces
    sections    token ids (int64), then of each chunk keys and values, and page bounds, laid out as the device
                holds them; each filled up with zeros to a multiple of 4096
    trailer     crc32 of each section

All numbers are little-endian.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from losart.config.options import AttentionConfig, GenerationConfig
from losart.config.precision import GROUP_PAGES
from losart.engine.kv_cache import FEW_POSITIONS, HostArrays, PagedKVCache
from losart.engine.kv_pool import Prefix, PrefixKind
from losart.errors import PrefixError

MAGIC = b"LOSARTKV"
VERSION = 1  # raised when the file or a device's layout of chunks changes
UNIT = 4096  # sections are mapped: they begin with a page of memory
PREAMBLE = struct.Struct("<8sIII")


def save_prefix(file: Path, prefix: Prefix, cache: PagedKVCache, facts: dict[str, Any]) -> None:
    """Write a prefix to a file, all of it or nothing.

    Parameters
    ----------
    file : Path
        Is overwritten once the new one is complete.
    prefix : Prefix
    cache : PagedKVCache
        One of its kind, with chunks of the same size.
    facts : dict
        What must be the same where it is loaded.

    Raises
    ------
    PrefixError
        The file cannot be written.
    """
    sizes = {"positions_per_chunk": prefix.positions_per_chunk, "positions": len(prefix.ids)}
    facts = facts | dataclasses.asdict(prefix.kind) | sizes
    write_sections(file, facts, _sizes(cache, len(prefix.ids)), _sections(prefix, cache.arrays))


def open_prefix(file: Path, runner: Any, facts: dict[str, Any]) -> tuple[int, Callable[[], Prefix]]:
    """Map a file with a prefix, and check it.

    Parameters
    ----------
    file : Path
    runner : Runner
    facts : dict
        What must be the same as where it was saved.

    Returns
    -------
    size : int
        Bytes of its chunks.
    load : callable
        Brings them to where the runner's caches lie.

    Raises
    ------
    PrefixError
        The file is missing, damaged, or of something else.
    """
    found = read_facts(file)
    for name, value in facts.items():
        if found.get(name) != value:
            raise PrefixError(f"{file}: was saved with {name} {found.get(name)}, and here it is {value}")
    kind = PrefixKind(*(found[field.name] for field in dataclasses.fields(PrefixKind)))
    per_chunk, positions = found["positions_per_chunk"], found["positions"]
    cache = _cache_of(runner, kind, per_chunk, file)
    ids, *sections = map_sections(file, _sizes(cache, positions))
    table = cache.table

    def load() -> Prefix:
        chunks = [
            (
                cache.arrays.from_host(kv, table.kv_shape, table.kv_format),
                cache.arrays.from_host(bounds, table.bounds_shape, table.bounds_format),
            )
            for kv, bounds in zip(sections[::2], sections[1::2], strict=True)
        ]
        return Prefix(kind, per_chunk, np.array(ids.view("<i8")), chunks)

    return cache.bytes_for(positions), load


def _cache_of(runner: Any, kind: PrefixKind, per_chunk: int, file: Path) -> PagedKVCache:
    attention = AttentionConfig(page_size=kind.page_size)
    options = GenerationConfig(kind.block_length, mask_token_id=0, denoising_steps=1, attention=attention)
    for expected in (1, FEW_POSITIONS + 1):
        cache = runner.new_cache(options, expected)
        if cache.positions_per_chunk == per_chunk:
            return cache
    raise PrefixError(f"{file}: has chunks of {per_chunk} positions, which no cache has here")


def _sizes(cache: PagedKVCache, positions: int) -> list[int]:
    table, chunks = cache.table, -(-positions // cache.positions_per_chunk)
    kv = math.prod(table.kv_shape) * table.kv_format.itemsize
    return [8 * positions, *[kv, cache.chunk_bytes - kv] * chunks]


def _sections(prefix: Prefix, arrays: HostArrays) -> Iterator[np.ndarray]:
    per_chunk = prefix.positions_per_chunk
    yield prefix.ids.astype("<i8")
    for first, chunk in zip(range(0, len(prefix.ids), per_chunk), prefix.chunks, strict=True):
        positions = min(per_chunk, len(prefix.ids) - first)
        groups = -(-positions // (GROUP_PAGES * prefix.kind.page_size))
        for array, axis, count in zip(chunk, (3, 2), (positions, groups), strict=True):
            held = arrays.to_host(array)
            whole = np.zeros_like(held)  # keys after the prefix may be another sequence's
            HostArrays().copy(whole, 0, held, 0, axis, count)
            yield whole


def write_sections(
    file: Path, facts: dict[str, Any], sizes: Sequence[int], sections: Iterable[np.ndarray]
) -> None:
    """Write a file, all of it or nothing.

    Parameters
    ----------
    file : Path
        Is overwritten once the new one is complete.
    facts : dict
        What `read_facts` gives back.
    sizes : sequence of int
        Bytes of the sections.
    sections : iterable of array

    Raises
    ------
    PrefixError
        The file cannot be written.
    """
    header = json.dumps({"facts": facts, "sizes": list(sizes)}).encode()
    header += b" " * (-(PREAMBLE.size + len(header)) % UNIT)
    try:
        number, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
        try:
            with open(number, "wb") as out:
                out.write(PREAMBLE.pack(MAGIC, VERSION, len(header), zlib.crc32(header)) + header)
                checksums = []
                for section in sections:
                    data = np.ascontiguousarray(section).reshape(-1).view(np.uint8)
                    fill = bytes(-len(data) % UNIT)
                    out.write(data.data)
                    out.write(fill)
                    checksums.append(zlib.crc32(fill, zlib.crc32(data.data)))
                out.write(struct.pack(f"<{len(checksums)}I", *checksums))
                out.flush()
                os.fsync(out.fileno())
            os.replace(name, file)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise PrefixError(f"{file}: cannot be written: {error.strerror or error}") from error


def read_facts(file: Path) -> dict[str, Any]:
    """What a file says that it belongs to; its sections are not looked at.

    Raises
    ------
    PrefixError
        The file cannot be read, is something else or damaged.
    """
    facts = _read_header(file)[0]
    # Files from before keys and values had formats of their own do not say which.
    return {"kv": facts["dtype"]} | facts if "dtype" in facts else facts


def map_sections(file: Path, sizes: Sequence[int]) -> list[np.ndarray]:
    """Map the sections of a file, which are checked.

    Parameters
    ----------
    file : Path
    sizes : sequence of int
        The bytes that they must have.

    Returns
    -------
    list of uint8 [bytes]
        Written to, they are copied; the file stays as it is.

    Raises
    ------
    PrefixError
        The file is cut short, damaged, or has other sections.
    """
    _, found, first = _read_header(file)
    if found != list(sizes):
        raise PrefixError(f"{file}: its sections are not those of such a prefix")
    starts = np.cumsum([first, *(-(-size // UNIT) * UNIT for size in sizes)]).tolist()
    end = starts[-1]
    length = end + 4 * len(sizes)
    try:
        mapped = np.memmap(file, np.uint8, "c")
    except (OSError, ValueError) as error:
        raise PrefixError(f"{file}: cannot be read: {error}") from error
    if len(mapped) != length:
        raise PrefixError(f"{file}: has {len(mapped)} bytes, not {length}: it is cut short or damaged")
    filled = [mapped[start:stop] for start, stop in pairwise(starts)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        checksums = list(threads.map(zlib.crc32, filled))
    if checksums != mapped[end:].view("<u4").tolist():
        raise PrefixError(f"{file}: is damaged: a checksum differs")
    return [section[:size] for section, size in zip(filled, sizes, strict=True)]


def _read_header(file: Path) -> tuple[dict[str, Any], list[int], int]:
    """Facts, sizes, and where the header ends."""
    try:
        with file.open("rb") as source:
            preamble = source.read(PREAMBLE.size)
            if preamble[: len(MAGIC)] != MAGIC:
                raise PrefixError(f"{file}: not a saved prefix")
            if len(preamble) < PREAMBLE.size:
                raise PrefixError(f"{file}: is cut short")
            _, version, length, checksum = PREAMBLE.unpack(preamble)
            if version != VERSION:
                raise PrefixError(f"{file}: has version {version} of the format; this losart reads {VERSION}")
            header = source.read(length)
    except OSError as error:
        raise PrefixError(f"{file}: cannot be read: {error.strerror or error}") from error
    if len(header) != length or zlib.crc32(header) != checksum:
        raise PrefixError(f"{file}: its header is cut short or damaged")
    values = json.loads(header)
    return values["facts"], values["sizes"], PREAMBLE.size + length
