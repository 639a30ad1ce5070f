"""Quantized checkpoints, written code by code, and the matrices that they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from losart.backends.cpu.convert import widen

Tensors = dict[str, tuple[str, np.ndarray]]  # safetensors' dtype, and the values or their bits
Written = tuple[Tensors, np.ndarray]  # by the ends of names, and the matrix, float32

AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of eight consecutive rows in a word


def words_of(codes: np.ndarray, bits: int, places: tuple[int, ...] | None = None) -> np.ndarray:
    """Codes from 0 up along the last axis, packed in words of 32 bits: int32."""
    count = 32 // bits
    rows = codes.reshape(-1, codes.shape[-1])
    packed = np.zeros((len(rows), -(-codes.shape[-1] // count)), np.uint32)
    for row, values in enumerate(rows.tolist()):
        for column, code in enumerate(values):
            assert 0 <= code < 1 << bits
            place = column % count if places is None else places[column % count]
            packed[row, column // count] |= np.uint32(code << (bits * place))
    return packed.view(np.int32).reshape(*codes.shape[:-1], -1)


def scales_of(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Random scales as float32, and as a file holds them."""
    scales = rng.uniform(0.002, 0.02, shape).astype(np.float32)
    if dtype == "F32":
        return scales, scales
    if dtype == "F16":
        return scales.astype(np.float16).astype(np.float32), scales.astype(np.float16)
    bits = scales.view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32), (bits >> 16).astype(np.uint16)


def float8_value(code: int) -> float:
    """Of E4M3 without infinities, from its bits."""
    code = int(code)
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, code >> 3 & 15, code & 7
    if code & 127 == 127:
        return float("nan")
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def matrix_of(codes: Any, zeros: Any, scales: Any, column_groups: Any) -> np.ndarray:
    """(code - zero) * scale, rounded to float32 once."""
    values = np.asarray(codes, np.float64) - np.asarray(zeros, np.float64)[:, column_groups]
    return (values * np.asarray(scales, np.float64)[:, column_groups]).astype(np.float32)


def in_order(columns: int, group: int) -> np.ndarray:
    return np.arange(columns) // group


def gptq(
    rng: np.random.Generator,
    rows: int,
    columns: int,
    *,
    bits: int,
    group: int,
    version: int,
    shuffled: bool,
    symmetric: bool = False,
) -> Written:
    """`group` -1: all columns; `symmetric`: zeros are all in the middle."""
    group = columns if group == -1 else group
    groups = -(-columns // group)
    codes = rng.integers(0, 1 << bits, (rows, columns))
    zeros = np.full((rows, groups), 1 << (bits - 1))
    if not symmetric:
        zeros = rng.integers(0, 1 << bits, zeros.shape)
    scales, saved = scales_of(rng, (rows, groups), "F16")
    index = in_order(columns, group)
    if shuffled:
        index = rng.permutation(index)
    tensors = {
        "qweight": ("I32", _packed_rows(codes.T, bits)),
        "qzeros": ("I32", words_of((zeros - (version == 1)).T % (1 << bits), bits)),
        "scales": ("F16", saved.T),
        "g_idx": ("I32", index.astype(np.int32)),
    }
    return tensors, matrix_of(codes, zeros, scales, index)


def _packed_rows(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packed along the first axis."""
    return words_of(np.ascontiguousarray(codes.T), bits).T


def awq(rng: np.random.Generator, rows: int, columns: int, *, group: int) -> Written:
    groups = -(-columns // group)
    codes, zeros = rng.integers(0, 16, (rows, columns)), rng.integers(0, 16, (rows, groups))
    scales, saved = scales_of(rng, (rows, groups), "F16")
    tensors = {
        "qweight": ("I32", words_of(codes.T, 4, AWQ_PLACES)),
        "qzeros": ("I32", words_of(zeros.T, 4, AWQ_PLACES)),
        "scales": ("F16", saved.T),
    }
    return tensors, matrix_of(codes, zeros, scales, in_order(columns, group))


def compressed(
    rng: np.random.Generator,
    rows: int,
    columns: int,
    *,
    format: str,
    dtype: str,
    block: tuple[int, int],
    symmetric: bool = True,
    scales: str = "BF16",
    shuffled: bool = False,
) -> Written:
    """`block`: rows and columns that share a scale, 0 for all."""
    block_rows, group = block[0] or rows, block[1] or columns
    places = -(-rows // block_rows), -(-columns // group)
    of_row, index = np.arange(rows) // block_rows, in_order(columns, group)
    if shuffled:
        index = rng.permutation(index)
    wide, saved = scales_of(rng, places, scales)
    tensors: Tensors = {"weight_scale": (scales, saved)}
    zeros = np.zeros(places, int)
    if dtype == "float8":
        bits = rng.integers(0, 256, (rows, columns)).astype(np.uint8)
        bits[bits & 127 == 127] = 0
        codes = np.vectorize(float8_value)(bits)
        tensors["weight"] = ("F8_E4M3", bits)
    else:
        half = 1 << (int(dtype[3:]) - 1)
        codes = rng.integers(-half, half, (rows, columns))
        if not symmetric:
            zeros = rng.integers(-half, half, places)
        if format == "pack-quantized":
            tensors["weight_packed"] = ("I32", words_of(codes + half, int(dtype[3:])))
            tensors["weight_shape"] = ("I64", np.array([rows, columns]))
        else:
            tensors["weight"] = ("I8", codes.astype(np.int8))
        if not symmetric and format == "pack-quantized" and block_rows == 1:
            tensors["weight_zero_point"] = ("I32", _packed_rows(zeros + half, int(dtype[3:])))
        elif not symmetric:
            tensors["weight_zero_point"] = ("I8", zeros.astype(np.int8))
    if shuffled:
        tensors["weight_g_idx"] = ("I32", index.astype(np.int32))
    return tensors, matrix_of(codes, zeros[of_row], wide[of_row], index)


def fp8(
    rng: np.random.Generator,
    rows: int,
    columns: int,
    *,
    block: tuple[int, int],
    end: str = "weight_scale_inv",
    axes: int = 2,
) -> Written:
    """`axes`: of the scales, of which all but the first have one."""
    tensors, matrix = compressed(
        rng, rows, columns, format="float-quantized", dtype="float8", block=block, scales="F32"
    )
    dtype, scales = tensors.pop("weight_scale")
    tensors[end] = (dtype, scales if axes == 2 else scales.reshape(scales.shape[:1] if axes else ()))
    return tensors, matrix


def save_tensors(file: Path, tensors: Tensors) -> None:
    """A safetensors file; safetensors itself takes no float8 from NumPy."""
    header, data = {}, b""
    for name, (dtype, values) in tensors.items():
        start, data = len(data), data + np.ascontiguousarray(values).tobytes()
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [start, len(data)]}
    head = json.dumps(header).encode()
    file.write_bytes(len(head).to_bytes(8, "little") + head + data)


def quantize_checkpoint(
    directory: Path, config: dict[str, Any], write: Callable[[np.random.Generator, int, int], Written]
) -> dict[str, np.ndarray]:
    """Replace all matrices of the layers of a checkpoint in float32; returns what stands for them by name."""
    rng, saved = np.random.default_rng(0), load_file(directory / "model.safetensors")
    tensors: Tensors = {}
    matrices: dict[str, np.ndarray] = {}
    for name, values in saved.items():
        if name.endswith("_proj.weight"):
            parts, matrices[name] = write(rng, *values.shape)
            tensors |= {f"{name.removesuffix('weight')}{end}": part for end, part in parts.items()}
        else:
            tensors[name] = ("F32", values)
    save_tensors(directory / "model.safetensors", tensors)
    keys = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(keys | {"quantization_config": config}))
    return matrices


def with_rounded_embedding(model: Any) -> Any:
    """A model on the CPU, from now on with the embedding that a device has where weights are rounded."""
    from losart.quantization import WeightFormat
    from losart.quantization.rounding import RoundedTensor

    embedding, runner = RoundedTensor(model._tensors["embed"], WeightFormat("int8")), model._engine.runner
    runner.embedding = replace(runner.embedding, matrices=(embedding.float32(0, embedding.shape[0]),))
    return model


def with_plain_weights(model: Any) -> Any:
    """A model on the CPU, from now on with the numbers that its quantized matrices stand for.

    So it is the oracle of one that does not round activations as the CPU does for such matrices.
    """
    from losart.backends.cpu.quantized_linear import multiply_all
    from losart.config.precision import FORMATS

    def plain(weight: Any) -> Any:
        matrices = []
        for matrix in weight.matrices:
            if not isinstance(matrix, np.ndarray):
                transposed = np.empty((matrix.columns, matrix.rows), np.float32)
                multiply_all([(np.eye(matrix.columns, dtype=np.float32), matrix, transposed, 0)])
                matrix = np.ascontiguousarray(transposed.T)
            matrices.append(widen(matrix))
        return replace(weight, matrices=tuple(matrices), format=FORMATS["float32"])

    runner = model._engine.runner

    def plain_parts(part: Any, *names: str) -> Any:
        held = {name: getattr(part, name) for name in names}
        return replace(
            part,
            **{
                name: tuple(map(plain, one)) if isinstance(one, tuple) else plain(one)  # of experts
                for name, one in held.items()
            },
        )

    runner.layers = [
        replace(
            plain_parts(layer, "qkv", "o"), feed_forward=plain_parts(layer.feed_forward, "gate_up", "down")
        )
        for layer in runner.layers
    ]
    runner.head, runner.embedding = plain(runner.head), plain(runner.embedding)
    return model
