"""Tokens and pages selected on the host, against in kernels: a whole later pass of LoSA by each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from attempts import attempt, free_memory, ratio
from cuda_later_pass import METHODS, measured
from cuda_model import NoiseModel
from cuda_planted import PlantedPrefix

from losart.backends.cuda_host_planner import HostPlanner


def rows(quick: bool = False) -> Iterator[dict[str, Any]]:
    """One row a size and prefix, in milliseconds."""
    for size in ("1.7B",) if quick else ("1.7B", "8B"):
        yield from rows_of(size, (32768,) if quick else (32768, 131072))
        free_memory()


def rows_of(size: str, prefixes: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """The rows of one size."""
    model = attempt(NoiseModel, size)
    for prefix in prefixes:
        row = {"size": size, "prefix": prefix}
        planted = model if isinstance(model, str) else attempt(PlantedPrefix, model, prefix)
        if isinstance(planted, str):
            yield row | {"device": planted}
            continue
        device, density = measured(planted, replace(METHODS["losa"], planner="device"))
        host, host_density = measured(planted, replace(METHODS["losa"], planner="host"))
        more = None
        if not isinstance(device, str) and not isinstance(host, str):
            more = (host - device) * 1e3 / model.config.num_layers
        yield row | {
            "device": device,
            "device read": density,
            "host": host,
            "host read": host_density,
            "host/device": ratio(host, device),
            "microseconds more a layer": more,
            "auto": "host" if isinstance(model.backend.planned("auto"), HostPlanner) else "device",
        }
