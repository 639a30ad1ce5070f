"""Compiles kernels ahead of time, for cards that need not be at hand."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from losart.backends.cuda.variants import CARDS, variants
from losart.config.precision import DTYPES
from losart.kernels_cu import FILES, compile_options, source
from losart.kernels_cu.compiler import compile_cubin, cubin_name
from losart.kernels_cu.prebuilt import write_archive

Inputs = tuple[str, str, tuple[str, ...], str]


def prebuild(
    folder: Path,
    architectures: Collection[str] = tuple(CARDS),
    dtypes: Collection[str] = DTYPES,
    kernels: Collection[str] = tuple(FILES),
    progress: Callable[[int, int], None] | None = None,
) -> dict[Path, int]:
    """Compile kernels in every variant that cards run, and write the archives that installations look into.

    Parameters
    ----------
    folder : Path
        `losart.kernels_cu.prebuilt.FOLDER`, or another one to be copied there.
    architectures : collection of str
        Of `CARDS`.
    dtypes : collection of {"float32", "bfloat16", "float16"}
        In which weights, keys and values, and activations are held.
    kernels : collection of str
        Of `FILES`.
    progress : callable or None
        Called with the variants done and in all after each.

    Returns
    -------
    dict of Path to int
        The archives, and how many kernels each holds.

    Raises
    ------
    DeviceError
        There is no compiler, or a kernel does not compile.
    """
    jobs = {architecture: _jobs(architecture, dtypes, kernels) for architecture in architectures}
    done, total = 0, sum(map(len, jobs.values()))
    archives = {}
    threads = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
    try:
        for architecture, inputs in jobs.items():
            cubins = {}
            for name, cubin in threads.map(_compile, inputs):
                cubins[name] = cubin
                done += 1
                if progress is not None:
                    progress(done, total)
            archives[write_archive(architecture, cubins, folder)] = len(cubins)
    finally:
        threads.shutdown(cancel_futures=True)
    return archives


def _compile(inputs: Inputs) -> tuple[str, bytes]:
    return cubin_name(*inputs), compile_cubin(*inputs)[0]


def _jobs(architecture: str, dtypes: Collection[str], kernels: Collection[str]) -> list[Inputs]:
    """What `compile_cubin` takes for each variant."""
    return [
        (source(name), f"{name}.cu", compile_options(precision, defines), architecture)
        for name in kernels
        for precision in FILES[name].precisions(dtypes)
        for defines in variants(name, CARDS[architecture], precision)
    ]
