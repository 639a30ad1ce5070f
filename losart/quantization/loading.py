"""Weights that are quantized as they are loaded."""

from __future__ import annotations

from typing import Any

from losart.errors import OptionError
from losart.loaders import Checkpoint
from losart.quantization.rounding import RoundedTensor, WeightFormat, rounded_tensors

LOADED = ("auto", "int8", "int4")


def loaded_tensors(checkpoint: Checkpoint, weights: str, device: str) -> dict[str, Any]:
    """A checkpoint's tensors as a backend takes them.

    Parameters
    ----------
    checkpoint : Checkpoint
    weights : {"auto", "int8", "int4"}
        "auto": as they are. Else the matrices of all layers are rounded, and the head to int8, beside the
        embedding where it is one with it.
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
    tied, head = checkpoint.config.tie_embeddings, WeightFormat("int8")
    tensors: dict[str, Any] = {}
    tensors |= rounded_tensors(checkpoint, WeightFormat.by_default(weights), None if tied else head)
    if tied:
        tensors["head"] = RoundedTensor(tensors["embed"], head)
    return tensors
