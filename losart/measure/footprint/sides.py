"""The two sides, each in a new environment or already installed, and how large they are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from losart.errors import DeviceError, LosartError
from losart.kernels_cu.compiler import HOW_TO_INSTALL
from losart.measure.footprint.environments import (
    Environment,
    cpu_index_arguments,
    own_requirement,
    rival_requirements,
)
from losart.measure.footprint.processes import Interpreter

CUDA_EXTRAS = ("cuda12x", "cuda13x")
PACKAGES = {"losart": {"losart"}, "transformers": {"torch", "transformers"}}


@dataclass(frozen=True)
class Side:
    """An interpreter that has a side's packages.

    Attributes
    ----------
    python : Interpreter
    sizes : dict
        `installed_bytes` and `packages`, names to versions. Of an environment that was made for the side:
        all that it holds. Of another one: the side's `requirements` and all that they require, except what
        is `not_installed`.
    """

    python: Interpreter
    sizes: dict[str, Any]


def new_sides(
    folder: Path,
    device: str,
    losart_specs: Sequence[str] | None,
    rival_specs: Sequence[str] | None,
    on_step: Callable[[str], None],
) -> dict[str, Side]:
    """Both sides, installed by pip into new environments in a folder.

    Raises
    ------
    LosartError
        Something cannot be installed, or torch's build is not one for the device.
    """
    extra = (_cuda_extra() or CUDA_EXTRAS[0]) if device == "cuda" else ""
    arguments = {
        "losart": list(losart_specs or [own_requirement(extra)]),
        "transformers": list(rival_specs or rival_requirements()),
    }
    if device == "cpu" and not rival_specs:
        arguments["transformers"] += cpu_index_arguments()
    sides = {}
    for side, specs in arguments.items():
        on_step(f"installing {side}")
        made = Environment(folder / f"venv-{side}")
        made.install(*specs)
        sides[side] = Side(Interpreter(made.python), made.sizes())
        if lacking := sorted(PACKAGES[side] - sides[side].sizes["packages"].keys()):
            raise LosartError(f"pip install {' '.join(specs)} installs no {' and no '.join(lacking)}")
    return {"losart": sides["losart"], "transformers": _rival(sides["transformers"], device)}


def installed_sides(device: str, rival_python: Path | None) -> dict[str, Side]:
    """losart as it runs, and torch and transformers in another interpreter or, None, in the same.

    Raises
    ------
    LosartError
        A package is not installed, or has no metadata.
    """
    ours = Interpreter(Path(sys.executable), isolated=False)
    theirs = ours if rival_python is None else Interpreter(rival_python)
    # An editable installation's RECORD does not list the package, which then lies in several folders.
    specs = filter(None, map(find_spec, ("losart", "losart.loaders", "losart.kernels_cu")))
    folders = [folder for spec in specs for folder in spec.submodule_search_locations or ()]
    try:
        distribution("losart")
    except PackageNotFoundError:
        raise LosartError(
            f"what losart requires is not known: {folders[0]} comes without the metadata of an installation "
            "(losart-*.dist-info beside it, as pip install --target makes it)"
        ) from None
    extra = _cuda_extra() if device == "cuda" else ""
    if extra is None:
        raise DeviceError(f"CuPy is not installed; install it: {HOW_TO_INSTALL}")
    rival = Side(theirs, _installed_sizes(theirs, {"torch": [], "transformers": []}))
    return {
        "losart": Side(ours, _installed_sizes(ours, {"losart": [extra] if extra else []}, folders)),
        "transformers": _rival(rival, device),
    }


def _installed_sizes(
    python: Interpreter, packages: dict[str, list[str]], folders: Sequence[str] = ()
) -> dict[str, Any]:
    names = [f"{name}[{','.join(extras)}]" if extras else name for name, extras in packages.items()]
    sizes = python.report("probe_packages", {"packages": packages, "folders": folders})
    return sizes | {"requirements": names}


def _rival(side: Side, device: str) -> Side:
    """The side with `torch_cuda` among its sizes: for which CUDA torch was built, if for any."""
    torch_cuda = side.python.report("probe_torch", {})
    if device == "cuda" and torch_cuda is None:
        raise LosartError(f"torch {side.sizes['packages']['torch']} was built without CUDA")
    return Side(side.python, side.sizes | {"torch_cuda": torch_cuda})


def _cuda_extra() -> str | None:
    """The extra for CUDA that the running losart has."""
    names = {package.name for package in distributions()}
    return next((extra for extra in CUDA_EXTRAS if f"cupy-{extra}" in names), None)
