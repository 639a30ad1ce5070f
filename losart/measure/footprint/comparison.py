"""Both sides, measured one after the other."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from losart.backends import cuda_problem
from losart.config.options import DEFAULT_BLOCK_LENGTH, generation_config
from losart.config.precision import FORMATS
from losart.errors import ConfigError, DeviceError
from losart.loaders import Checkpoint
from losart.measure.environment import environment
from losart.measure.footprint.processes import Request, for_transformers, probe
from losart.measure.footprint.sides import Side
from losart.measure.inspection import inspection

OnStep = Callable[[str], None]
PROBES = {"losart": "probe_losart", "transformers": "probe_transformers"}


@dataclass(frozen=True)
class Generation:
    """A generation that both sides do, and the bytes of its keys and values in the checkpoint's format."""

    checkpoint: Checkpoint
    request: Request
    kv_bytes: int


def generation_of(
    checkpoint: Checkpoint, device: str = "cpu", prompt_tokens: int = 512, new_tokens: int = 32
) -> Generation:
    """The generation of a checkpoint.

    Raises
    ------
    LosartError
        The device does not work, or the checkpoint has no mask token or too few positions.
    """
    if device == "cuda" and (problem := cuda_problem()):
        raise DeviceError(f"device 'cuda' does not work here: {problem}")
    config = checkpoint.config
    if config.mask_token_id is None:
        raise ConfigError(f"{checkpoint.path}: config.json says no mask_token_id")
    block_length = config.block_length or DEFAULT_BLOCK_LENGTH
    # SDAR, or an ordinary architecture whose rows predict the next token: what the probe decodes.
    decoded = config.model_type == "sdar" or (checkpoint.base is not None and config.decoding.seeds)
    if not checkpoint.path.is_dir() or checkpoint.adapter is not None or not decoded:
        raise ConfigError(f"{checkpoint.path}: is no checkpoint that transformers loads as losart does")
    options = generation_config(config, {})
    threshold, shifted = options.confidence_threshold, config.decoding.shifted
    request = Request(
        device, prompt_tokens, new_tokens, block_length, config.mask_token_id, threshold, shifted
    )
    inspection(checkpoint, "cpu", "auto", [prompt_tokens + new_tokens])  # raises where it has no room
    row = 2 * config.num_layers * config.num_kv_heads * config.head_dim * FORMATS[checkpoint.dtype].itemsize
    return Generation(checkpoint, request, row * (prompt_tokens + new_tokens))


def compare(
    sides: dict[str, Side],
    device: str,
    generation: Generation | None,
    folder: Path,
    repeats: int = 3,
    on_step: OnStep = lambda step: None,
) -> dict[str, Any]:
    """Figures of losart, and of torch + transformers; JSON types alone.

    Parameters
    ----------
    sides : dict
        As `new_sides` or `installed_sides` makes them.
    device : {"cpu", "cuda"}
    generation : Generation, optional
        None: sizes alone, and nothing is run.
    folder : path
        For files that the processes need.
    repeats : int
    on_step : callable
        Called with a title as each of the `repeats + 1` processes of a side begins.

    Raises
    ------
    LosartError
        A process failed.
    """
    machine = environment()
    packages = {side: sides[side].sizes["packages"] for side in sides}
    figures: dict[str, Any] = {
        "cpu": machine["cpu"]["name"],
        "threads": machine["cpu"]["threads"],
        "gpu": machine["gpu"]["name"] if device == "cuda" and machine["gpu"] else None,
        "python": machine["python"],
        "system": machine["system"],
        "device": device,
        "versions": {
            "losart": packages["losart"]["losart"],
            **{name: packages["transformers"][name] for name in ("torch", "transformers")},
        },
    }
    measured: dict[str, dict[str, Any]] = {side: {} for side in sides}
    if generation:
        checkpoint, request = generation.checkpoint, generation.request
        figures |= {
            "checkpoint": checkpoint.path.name,
            "dtype_on_disk": sorted({tensor.dtype for tensor in checkpoint.tensors.values()}),
            "bytes_on_disk": sum(tensor.nbytes for tensor in checkpoint.tensors.values()),
            "kv_bytes": generation.kv_bytes,
            "block_length": request.block_length,
            "prompt_tokens": request.prompt_tokens,
            "new_tokens": request.new_tokens,
        }
        paths = {
            "losart": checkpoint.path,
            "transformers": for_transformers(checkpoint.path, folder / "qwen3"),
        }
        for side, name in PROBES.items():
            runs = []
            for number in range(repeats + 1):
                on_step(f"running {side}, {number} of {repeats}" if number else f"running {side} to warm up")
                report = probe(sides[side].python, name, paths[side], request)
                if number:  # the first compiles Python files and kernels, and brings files into memory
                    runs.append(_run_figures(report, generation))
            medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            measured[side] = (
                medians | {key: report[key] for key in ("weights", "kv", "tokens")} | {"runs": runs}
            )
    for name in sides:
        figures[name] = sides[name].sizes | {"package_count": len(packages[name])} | measured[name]
    return figures


def _run_figures(report: dict[str, Any], generation: Generation) -> dict[str, float]:
    """Seconds and bytes of one process by their keys in `losart.measure.footprint.table.ROWS`."""
    seconds, memory = report["seconds"], report["bytes"]
    imported, end, weights = memory["import"], memory["generate"], sum(report["weights"].values())
    figures = {
        "import_seconds": seconds["import"],
        "imported_bytes": imported["VmRSS"],
        "generated_bytes": end["VmRSS"] - weights,
        "generated_anonymous_bytes": end["RssAnon"],
        "generated_file_bytes": end["RssFile"],
        "peak_bytes": end["VmHWM"] - weights,
        "first_token_seconds": sum(seconds.values()) - seconds["generate"],
        "generate_seconds": seconds["generate"],
    }
    if "device" in end:
        device = end["device"] - memory["context"]["device"]
        figures["device_bytes"] = device - weights - generation.kv_bytes
    return figures
