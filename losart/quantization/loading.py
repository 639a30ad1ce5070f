"""Weights that are quantized as they are loaded."""

from __future__ import annotations

from typing import Any

from losart.errors import OptionError
from losart.loaders import Checkpoint
from losart.loaders.gguf import WideTensor
from losart.quantization.merging import MergedQuantized, merged_tensors
from losart.quantization.rounding import WEIGHTS, RoundedTensor, WeightFormat, rounded_tensors

LOADED = ("auto", *WEIGHTS)
MERGED = ("dtype", "codes")


def loaded_tensors(checkpoint: Checkpoint, weights: str, device: str, merge: str = "dtype") -> dict[str, Any]:
    """A checkpoint's tensors as a backend takes them, with its adapter's changes.

    Parameters
    ----------
    checkpoint : Checkpoint
    weights : {"auto", "int8", "int4", "fp8"}
        "auto": as they are. Else the matrices of all layers are rounded, and the head to int8.
    device : str
        The backend's name. The CPU has the embedding mapped from its file, beside the head where they are
        one; elsewhere it is rounded to int8 too.
    merge : {"dtype", "codes"}
        What a matrix of codes becomes that an adapter's product is added to: numbers, or codes again.

    Raises
    ------
    OptionError
        There is no such format, or the checkpoint is quantized, but for what an adapter is merged into.
    """
    if weights not in LOADED:
        raise OptionError(f"weights must be one of {', '.join(LOADED)}, not {weights!r}")
    if merge not in MERGED:
        raise OptionError(f"merge must be one of {', '.join(MERGED)}, not {merge!r}")
    merged = merged_tensors(checkpoint, merge)
    if weights == "auto":
        return merged | (_head_as_codes(checkpoint) if device == "cpu" else {})
    tied, head = "head" not in merged, WeightFormat("int8")
    by_default = WeightFormat.by_default(weights)
    tensors = rounded_tensors(checkpoint, merged, by_default, None if tied else head)
    if device != "cpu":
        tensors["embed"] = RoundedTensor(tensors["embed"], head)
    elif tied:
        tensors["head"] = RoundedTensor(tensors["embed"], head)
    return tensors


def _head_as_codes(checkpoint: Checkpoint) -> dict[str, Any]:
    """The head, where it is an embedding that a GGUF file has as codes, and that is not replaced.

    The embedding's numbers are held beside it, to be looked up. A GPU has kernels for none of these codes.
    """
    embed, changes = checkpoint.tensors["embed"], checkpoint.changes
    codes = embed.codes if isinstance(embed, WideTensor) and checkpoint.config.tie_embeddings else None
    change = changes.get("embed")
    if codes is None or "head" in changes or (change is not None and change.whole is not None):
        return {}
    return {"head": codes if change is None else MergedQuantized(codes, change)}
