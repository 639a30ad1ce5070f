"""Weights that are quantized as they are loaded."""

from __future__ import annotations

from typing import Any

from losart.errors import OptionError
from losart.loaders import Checkpoint
from losart.quantization.rounding import WeightFormat, rounded_tensors

LOADED = ("auto", "int8", "int4")


def loaded_tensors(checkpoint: Checkpoint, weights: str, device: str) -> dict[str, Any]:
    """A checkpoint's tensors as a backend takes them.

    Parameters
    ----------
    checkpoint : Checkpoint
    weights : {"auto", "int8", "int4"}
        "auto": as they are. Else the matrices of all layers are rounded, and a head of its own to int8.
    device : str
        The backend's name.

    Raises
    ------
    OptionError
        There is no such format or not on the device, or the checkpoint is quantized.
    """
    if weights not in LOADED:
        raise OptionError(f"weights must be one of {', '.join(LOADED)}, not {weights!r}")
    if weights == "auto":
        return dict(checkpoint.tensors)
    if device != "cpu":
        raise OptionError(f"weights={weights!r} is for the CPU; on {device} they are held in 16 or 32 bits")
    head = None if checkpoint.config.tie_embeddings else WeightFormat("int8")
    return dict(rounded_tensors(checkpoint, WeightFormat.by_default(weights), head))
