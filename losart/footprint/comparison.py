"""Both sides, measured one after the other."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from losart.backends import cuda_problem
from losart.cache import BYTES
from losart.environment import environment
from losart.errors import ConfigError, DeviceError
from losart.footprint.environments import (
    cpu_index_arguments,
    new_environment,
    own_requirement,
    packages_of,
    rival_requirements,
)
from losart.footprint.measure import Held, measure
from losart.footprint.processes import Request, as_qwen3
from losart.inspection import inspection
from losart.loaders import Checkpoint
from losart.options import DEFAULT_BLOCK_LENGTH

Say = Callable[[str], None]
SIDES = {"losart": "probe_losart", "transformers": "probe_transformers"}


def compare(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    device: str = "cpu",
    installed: bool = False,
    losart_spec: str | None = None,
    prompt_tokens: int = 512,
    new_tokens: int = 32,
    repeats: int = 3,
    say: Say = lambda step: None,
) -> dict[str, Any]:
    """Figures of losart, and of torch + transformers for the same generation; JSON types alone.

    Parameters
    ----------
    checkpoint : Checkpoint
    folder : path
        Where environments are made.
    device : {"cpu", "cuda"}
    installed : bool
        Measure what the running interpreter has, and make no environments; no sizes then.
    losart_spec : str, optional
        What pip installs as losart. Default: what the running one was installed from.
    prompt_tokens, new_tokens, repeats : int
    say : callable
        Called with a title as each step begins; `step_count` says how often.

    Raises
    ------
    LosartError
        Something cannot be installed, or a process failed.
    """
    if device == "cuda" and (problem := cuda_problem()):
        raise DeviceError(f"device 'cuda' does not work here: {problem}")
    config = checkpoint.config
    if config.mask_token_id is None:
        raise ConfigError(f"{checkpoint.path}: config.json says no mask_token_id")
    block_length = config.block_length or DEFAULT_BLOCK_LENGTH
    request = Request(device, prompt_tokens, new_tokens, block_length, config.mask_token_id)
    facts = inspection(checkpoint, "cpu", "auto", [prompt_tokens + new_tokens])
    row = 2 * config.num_layers * config.num_kv_heads * config.head_dim * BYTES[checkpoint.dtype]
    held = Held(facts["weight_bytes"], row * (prompt_tokens + new_tokens))
    paths = {"losart": checkpoint.path, "transformers": as_qwen3(checkpoint.path, folder / "qwen3")}

    pythons = {side: Path(sys.executable) for side in SIDES}
    figures: dict[str, dict[str, Any]] = {side: {} for side in SIDES}
    if not installed:
        arguments = {
            "losart": [losart_spec or own_requirement(_extra() if device == "cuda" else "")],
            "transformers": rival_requirements(),
        }
        if device == "cpu":
            arguments["transformers"] += cpu_index_arguments()
        for side in SIDES:
            say(f"installing {side}")
            made = new_environment(folder / f"venv-{side}")
            made.install(*arguments[side])
            pythons[side] = made.python
            figures[side] = made.sizes()
            figures[side]["package_count"] = len(figures[side]["packages"])
    for side, name in SIDES.items():

        def begun(number: int, side: str = side) -> None:
            say(f"running {side}, {number} of {repeats}" if number else f"running {side} to warm up")

        figures[side] |= measure(pythons[side], name, paths[side], request, held, repeats, begun)

    here = environment()
    packages = {side: packages_of(pythons[side]) for side in SIDES}
    return {
        "cpu": here["cpu"]["name"],
        "threads": here["cpu"]["threads"],
        "gpu": here["gpu"]["name"] if device == "cuda" else None,
        "python": here["python"],
        "system": here["system"],
        "device": device,
        "versions": {
            "losart": packages["losart"]["losart"],
            **{name: packages["transformers"][name] for name in ("torch", "transformers")},
        },
        "checkpoint": checkpoint.path.name,
        "dtype": checkpoint.dtype,
        "weight_bytes": held.weights,
        "kv_bytes": held.kv,
        "block_length": block_length,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        **figures,
    }


def step_count(installed: bool, repeats: int) -> int:
    """How many steps `compare` says."""
    return len(SIDES) * (repeats + 1 + (not installed))


def _extra() -> str:
    """The extra for CUDA that the running losart has."""
    packages = packages_of(sys.executable)
    return next(extra for extra in ("cuda12x", "cuda13x") if f"cupy-{extra}" in packages)
