"""Writes a quantized checkpoint, in the format of compressed-tensors."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from losart.backends.cpu.convert import narrow
from losart.config.precision import FORMATS
from losart.errors import OptionError
from losart.loaders import Checkpoint, MappedTensor
from losart.loaders.json_files import read_json_object
from losart.loaders.quantized.tensor import WORD_BITS, bits_of
from losart.loaders.safetensors_writer import TensorEntry
from losart.observe.step import Progress
from losart.quantization.calibration import LEAST_TOKENS, Calibration, calibration_ids
from losart.quantization.rounding import RoundedTensor, WeightFormat, rounded_tensors
from losart.quantization.writing import (
    PIECE,
    Written,
    copy_others,
    incomplete,
    refuse_existing,
    write_tensors,
)


def quantize_checkpoint(
    checkpoint: Checkpoint,
    destination: str | os.PathLike[str],
    weights: WeightFormat,
    head: WeightFormat | None = None,
    progress: Progress | None = None,
    calibration: str | os.PathLike[str] | None = None,
) -> Path:
    """Write a checkpoint whose layers' matrices are quantized: rounded to nearest, or calibrated.

    Embedding, gains and biases stay as they are. All other files of the directory are copied. It is complete
    when it is there under its name: it is written beside that, in one that ends in ".incomplete".

    Parameters
    ----------
    checkpoint : Checkpoint
    destination : path
        A directory that does not exist yet.
    weights : WeightFormat
        Of the matrices of all layers.
    head : WeightFormat, optional
        Of the output projection, which stays as it is without it.
    progress : callable, optional
        Called with the MiB read and the MiB in all.
    calibration : path, optional
        A text: by GPTQ each layer's errors are made small for what enters it when this is read. That takes
        memory for four hidden states of 16,384 tokens, and five times the largest [in, in] in float64; with
        experts also for the inputs of a layer's, up to 2,048 of each, or [in, in] where there are more.
        Experts that too few go to are rounded to nearest, which a warning says.

    Raises
    ------
    OptionError
        The checkpoint is quantized, its head is its embedding, or groups do not divide a matrix.
    CheckpointError
        The destination exists.
    TensorError
        A weight is not finite.
    DataError
        The text is none, or too short.
    """
    destination = Path(destination)
    if not checkpoint.path.is_dir():
        raise OptionError(f"{checkpoint.path}: is a GGUF file; quantize the checkpoint that it was made of")
    refuse_existing(destination)
    chosen: dict[str, Any] = rounded_tensors(checkpoint, checkpoint.tensors, weights, head)
    calibrated = None
    if calibration is not None:
        calibrated = Calibration(checkpoint, calibration_ids(checkpoint, Path(calibration)), weights)
        chosen |= calibrated.tensors()
    tensors = [
        _rounded(tensor) if isinstance(tensor, RoundedTensor) else _kept(tensor) for tensor in chosen.values()
    ]
    with incomplete(destination) as directory:
        copy_others(checkpoint.path, directory)
        _write_config(checkpoint, directory, weights, head)
        write_tensors(directory, tensors, progress)
    if calibrated is not None and calibrated.nearest:
        warnings.warn(
            f"{calibrated.nearest} of {calibrated.matrices} matrices are rounded to nearest: of experts that "
            f"fewer than {LEAST_TOKENS} inputs went to",
            stacklevel=2,
        )
    return destination


def _kept(tensor: MappedTensor) -> Written:
    held, rows = FORMATS[tensor.dtype], tensor.shape[0]
    entry = TensorEntry(tensor.name, held.safetensors, tensor.shape, held.itemsize)

    def values(start: int, stop: int) -> tuple[np.ndarray, ...]:
        return (tensor.array(start, stop),)

    step = max(1, PIECE * rows // max(1, tensor.size))
    return Written((entry,), rows, step, values, tensor.nbytes, tensor.release)


def _rounded(rounded: RoundedTensor) -> Written:
    module, held = rounded.name.removesuffix(".weight"), FORMATS[rounded.source.dtype]
    rows, columns = rounded.shape
    groups = rows, columns // rounded.group
    scales_entry = TensorEntry(f"{module}.weight_scale", held.safetensors, groups, held.itemsize)
    entries: tuple[TensorEntry, ...]
    if rounded.dtype == "float8":
        entries = (TensorEntry(rounded.name, "F8_E4M3", (rows, columns), 1), scales_entry)
    else:
        words = -(-columns * bits_of(rounded.dtype) // WORD_BITS)
        entries = (
            TensorEntry(f"{module}.weight_packed", "I32", (rows, words), 4),
            scales_entry,
            TensorEntry(f"{module}.weight_shape", "I64", (2,), 8),
        )

    def values(start: int, stop: int) -> tuple[np.ndarray, ...]:
        codes, scales, _ = rounded.rows(start, stop)
        saved = narrow(scales, held)
        if rounded.dtype == "float8":
            return codes, saved
        shape = np.array([rows, columns][: 2 if start == 0 else 0], np.int64)
        return packed(codes, bits_of(rounded.dtype)), saved, shape

    source = rounded.source
    return Written(entries, rows, max(1, PIECE // columns), values, source.nbytes, source.release)


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [rows, columns] in words of 32 bits along rows, the lowest bits first, offset to be 0 or more."""
    rows, columns = codes.shape
    count = WORD_BITS // bits
    unsigned = np.zeros((rows, -(-columns // count) * count), np.uint8)
    unsigned[:, :columns] = codes + np.int16(1 << (bits - 1))
    if bits == 4:
        unsigned = unsigned[:, ::2] | unsigned[:, 1::2] << 4
    return np.ascontiguousarray(unsigned).view("<i4")


def _write_config(
    checkpoint: Checkpoint, destination: Path, weights: WeightFormat, head: WeightFormat | None
) -> None:
    config = read_json_object(checkpoint.path / "config.json").values
    groups, kept = {"group_0": _config_group(weights, ["Linear"])}, list[str]()
    for name, tensor in checkpoint.tensors.items():
        module = tensor.name.removesuffix(".weight")
        if name == "head" and head is not None:
            groups["group_1"] = _config_group(head, [f"re:.*{re.escape(module)}"])
        elif name == "head" or name.endswith(".router"):
            kept.append(module)
    formats = {group["format"] for group in groups.values()}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": kept or ([] if head is not None else ["lm_head"]),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    (destination / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _config_group(format: WeightFormat, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": 4 if format.name == "int4" else 8,
        "type": "float" if format.name == "fp8" else "int",
        "symmetric": True,
        "strategy": "channel" if format.group is None else "group",
        "group_size": format.group,
        "dynamic": False,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": "float-quantized" if format.name == "fp8" else "pack-quantized",
    }
