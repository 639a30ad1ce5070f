"""One side's figures: the medians of several processes."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from losart.measure.footprint.processes import Interpreter, Request, probe


@dataclass(frozen=True)
class Held:
    """What any runtime must hold for the generation, in bytes: weights, and keys and values."""

    weights: int
    kv: int


def measure(
    python: Interpreter,
    name: str,
    checkpoint: Path,
    request: Request,
    held: Held,
    repeats: int,
    begun: Callable[[int], None],
) -> dict[str, Any]:
    """Figures of one side, medians of `repeats` processes after one that does not count.

    Parameters
    ----------
    python, name, checkpoint, request
        As :func:`losart.measure.footprint.processes.probe`'s.
    held : Held
    repeats : int
    begun : callable
        Called with the number of the process before each, from 0.

    Returns
    -------
    dict
        Seconds and bytes by their keys in `losart.measure.footprint.table.ROWS`; `runs`: the same of each
        process; `tokens`: the new token ids.
    """
    runs = []
    for number in range(repeats + 1):
        begun(number)
        report = probe(python, name, checkpoint, request)
        if number:  # the first compiles Python files and kernels, and brings files into memory
            runs.append(_figures(report, held))
    medians: dict[str, Any] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    return medians | {"runs": runs, "tokens": report["tokens"]}


def _figures(report: dict[str, Any], held: Held) -> dict[str, float]:
    seconds, memory = report["seconds"], report["bytes"]
    imported, end = memory["import"], memory["generate"]
    figures = {
        "import_seconds": seconds["import"],
        "imported_bytes": imported["VmRSS"],
        "generated_bytes": end["VmRSS"] - held.weights,
        "generated_anonymous_bytes": end["RssAnon"],
        "generated_file_bytes": end["RssFile"],
        "peak_bytes": end["VmHWM"] - held.weights,
        "first_token_seconds": sum(seconds.values()) - seconds["generate"],
        "generate_seconds": seconds["generate"],
    }
    if "device" in end:
        figures["device_bytes"] = end["device"] - memory["context"]["device"] - held.weights - held.kv
    return figures
