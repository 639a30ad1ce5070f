"""Tokens and pages selected on the host, against in kernels: a whole later pass of LoSA by each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from benchmarks.cuda.later_pass import METHODS, measured
from benchmarks.cuda.planted import PlantedPrefix, planted_rows
from benchmarks.support.attempts import free_memory, ratio
from losart.attention import POLICIES, LosaPolicy
from losart.backends.cuda.host_selector import HostSelector
from losart.engine.batch import PassKind


def rows(quick: bool = False) -> Iterator[dict[str, Any]]:
    """One row per size and prefix, in milliseconds."""
    for size in ("1.7B",) if quick else ("1.7B", "8B"):
        yield from planted_rows(size, (32768,) if quick else (32768, 131072), rows_of)
        free_memory()


def rows_of(planted: PlantedPrefix) -> Iterator[dict[str, Any]]:
    """The row of one size and prefix."""
    model = planted.model
    host_config = replace(METHODS["losa"], planner="host")
    device_config = replace(METHODS["losa"], planner="device")
    device, density = measured(planted, device_config)
    launched, _ = measured(planted, replace(device_config, method="launched losa"))
    host, host_density = measured(planted, host_config)
    yield {
        "device": device,
        "device read": density,
        "device, no graph": launched,
        "host": host,
        "host read": host_density,
        "host/device": ratio(host, device),
        "launches, us a layer": per_layer(launched, device, model.config.num_layers),
        "transfers, us a layer": per_layer(host, launched, model.config.num_layers),
        "auto": "host" if isinstance(model.backend.selectors["auto"], HostSelector) else "device",
    }


def per_layer(slow: float | str, fast: float | str, layers: int) -> float | None:
    """Microseconds of a layer in the difference, where both were measured."""
    if isinstance(slow, str) or isinstance(fast, str):
        return None
    return (slow - fast) * 1e3 / layers


class LaunchedLosa(LosaPolicy):
    """LoSA whose passes are launched kernel by kernel, like those in which the host takes part."""

    def key(self, kind: PassKind) -> None:
        return None


POLICIES["launched losa"] = LaunchedLosa
