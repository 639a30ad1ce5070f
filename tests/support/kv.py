"""Keys and values for the tests of kernels and caches: as they are held, and in a table."""

from __future__ import annotations

import os

import numpy as np
import reference as ref
from hypothesis import HealthCheck, settings

from losart.backends.cpu import convert
from losart.backends.cpu.kv_index import PageTable
from losart.config.model import ModelConfig
from losart.config.precision import FORMATS, KV_FORMATS, Precision

HELD_AS = (*FORMATS, *KV_FORMATS)
LAYER = 1  # of two; the other is full of NaN, which shows if it is read


def at_most(examples: int) -> settings:
    """So many examples, or fewer if the environment asks for it, as in an emulator or compute-sanitizer."""
    examples = min(examples, int(os.environ.get("LOSART_TEST_EXAMPLES", examples)))
    slow = [HealthCheck.too_slow]  # there generating them is, too
    return settings(max_examples=examples, deadline=None, suppress_health_check=slow)


def steady(examples: int) -> settings:
    """The same examples each time: scores that all but tie would select other pages than float64."""
    return settings(at_most(examples), derandomize=True)


def bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 rounded to bfloat16, to the nearest, ties to even; as float64. By arithmetic, not by bits."""
    with np.errstate(invalid="ignore"):
        x = np.asarray(x, np.float64)
        unit = np.ldexp(1.0, np.maximum(np.frexp(x)[1], -125) - 8)
        rounded = np.where(np.isfinite(x), np.rint(x / unit) * unit, x)
    return np.where(np.abs(rounded) >= 2.0**128, np.copysign(np.inf, x), rounded)


def narrow(x: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values as arrays hold them."""
    return convert.narrow(x, FORMATS[dtype])


OUTERMOST = {"int8": 127, "fp8": 448}  # codes


def encoded(x: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Keys or values [..., channels] in 8 bits: the numbers that codes stand for, float32 scales [..., 1]."""
    finite = np.isfinite(x).all(axis=-1, keepdims=True)
    with np.errstate(all="ignore"):
        scales = np.where(
            finite, np.abs(x).max(axis=-1, keepdims=True) / np.float32(OUTERMOST[dtype]), np.nan
        )
        numbers = np.where(scales > 0, x / scales, 0).astype(np.float64)
    unit = 1.0 if dtype == "int8" else np.ldexp(1.0, np.maximum(np.frexp(numbers)[1], -5) - 4)
    numbers = np.clip(np.rint(numbers / unit) * unit, -OUTERMOST[dtype], OUTERMOST[dtype])
    return numbers, scales


def held(x: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values as `dtype` holds them, in float64. With 8 bits the last axis shares a scale."""
    if dtype == "bfloat16":
        return bfloat16(x)
    if dtype in KV_FORMATS:
        numbers, scales = encoded(x, dtype)
        return (numbers.astype(np.float32) * scales).astype(np.float64)
    with np.errstate(over="ignore"):
        return x.astype(FORMATS[dtype].array).astype(np.float64)


LEAST_STEP = {"float16": 2.0**-17}  # of coded bounds: less is subnormal to less than 8 bits


def precision_of(dtype: str, operands: str | None = None) -> Precision:
    """All in one format, or keys and values in 8 bits and all else as `operands`, by default bfloat16."""
    return Precision.of(dtype if dtype in FORMATS else operands or "bfloat16", dtype)


def rounded_up(x: np.ndarray, operands: str) -> np.ndarray:
    """float32 values, the least numbers of a format that are not below them; in float64. By arithmetic."""
    if operands == "float32":
        return x
    bits, least, most = {"bfloat16": (8, -125, 2.0**128 - 2.0**120), "float16": (11, -13, 65504)}[operands]
    with np.errstate(invalid="ignore"):
        unit = np.ldexp(1.0, np.maximum(np.frexp(x)[1], least) - bits)
        up = np.maximum(np.ceil(x / unit) * unit, -most)
        return np.where(up > most, np.inf, up)


def outward(low: np.ndarray, high: np.ndarray, operands: str) -> tuple[np.ndarray, np.ndarray]:
    """Bounds, rounded outwards to a format."""
    return -rounded_up(-low, operands), rounded_up(high, operands)


def held_page_bounds(
    k: np.ndarray, page_size: int, dtype: str, operands: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of the pages of float32 keys that `dtype` holds, themselves held as `operands`."""
    bounds = ref.page_bounds(held(k, dtype), page_size)
    return outward(*bounds, precision_of(dtype, operands).kv_operands.name) if dtype in KV_FORMATS else bounds


def coded_page_bounds(
    k: np.ndarray, page_size: int, dtype: str, operands: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The same as they are coded, by which pages are selected."""
    full = len(k) // (ref.CODED_PAGES * page_size)
    name = precision_of(dtype, operands).kv_operands.name
    bounds = held_page_bounds(k, page_size, dtype, operands)
    return ref.coded_bounds(*bounds, full, lambda x: held(x, name), LEAST_STEP.get(name, 0.0))


def empty_table(
    kv_heads: int,
    width: int,
    page_size: int,
    dtype: str = "float32",
    positions: int = 1,
    chunk_pages: int = 16,
    operands: str | None = None,
) -> tuple[PageTable, list[tuple[np.ndarray, np.ndarray]]]:
    """A table of two layers with room for `positions`, and its chunks of keys and values and of bounds."""
    formats = precision_of(dtype, operands)
    sizes = 2, kv_heads, width, page_size, chunk_pages * page_size
    table = PageTable(*sizes, formats.kv, formats.kv_operands)
    chunks = []
    while table.capacity < positions:
        chunks.append((np.zeros(table.kv_shape, formats.kv.array), np.zeros(table.bounds_shape, np.float32)))
        table.add_chunk(*chunks[-1])
    return table, chunks


def table_of(
    k: np.ndarray, v: np.ndarray, page_size: int, dtype: str = "float32", operands: str | None = None
) -> PageTable:
    """A table that holds k and v [positions, kv_heads, width] in its layer `LAYER`."""
    positions, kv_heads, width = k.shape
    table, _ = empty_table(kv_heads, width, page_size, dtype, positions, operands=operands)
    table.write(LAYER, 0, k, v)
    poison = np.full_like(k, np.nan)
    table.write(1 - LAYER, 0, poison, poison)
    return table


def model_config(kv_heads: int, group: int, width: int, layers: int = 1, **changes: int) -> ModelConfig:
    """The shape of a model's attention; all else is of no matter."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "max_positions": 4096} | changes
    return ModelConfig(
        model_type="sdar",
        num_layers=layers,
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=width,
        **sizes,
    )
