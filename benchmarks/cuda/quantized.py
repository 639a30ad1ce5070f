"""Matmuls by quantized weights, whole passes and generations with them, against the memory's floor."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import cupy
import numpy as np

from benchmarks.cuda.matmuls import matmul_shapes
from benchmarks.cuda.model import LaterPasses, NoiseModel
from benchmarks.cuda.noise import (
    BFLOAT16,
    BLOCK,
    NoiseBackend,
    filled_cache,
    held_bytes,
    kv_bytes,
    model_config,
    noise,
    uncached,
)
from benchmarks.cuda.timing import graph_microseconds, queued_microseconds
from benchmarks.cuda.torch_attention import run_microseconds
from benchmarks.support.attempts import attempt, free_memory, ratio, teraflops
from losart.backends.cuda.float8 import Float8Products
from losart.config.options import AttentionConfig, generation_config
from losart.config.precision import Precision
from losart.engine.engine import Engine

FORMATS = ("bfloat16", "int4", "int8", "fp8")
TOKENS = (4, 16, 32, 64)
MANY_TOKENS = (128, 512, 2048)
FLOAT8 = Precision.of("bfloat16", activations="fp8")
MODELS = (  # weights, kv, activations
    ("bfloat16", "auto", "auto"),
    ("bfloat16", "int8", "auto"),
    ("int4", "auto", "auto"),
    ("int4", "int8", "auto"),
    ("int8", "auto", "auto"),
    ("fp8", "auto", "auto"),
    ("fp8", "auto", "fp8"),
    ("fp8", "fp8", "auto"),
)
PREFIXES = (2048, 8192, 65536)
NEW_TOKENS = 512
FIXED = 4  # tokens a pass


def matmul_rows(bandwidth: float, quick: bool = False) -> Iterator[dict[str, Any]]:
    """One row per matmul, format and number of tokens, in microseconds; weights are read from memory."""
    for name, (rows, inner) in matmul_shapes("8B").items():
        for weights in FORMATS:
            for tokens in (16,) if quick else TOKENS:
                measured = attempt(microseconds, rows, inner, weights, tokens)
                ours, size = (measured, None) if isinstance(measured, str) else measured
                floor = None if size is None else size / bandwidth * 1e6
                row = {"matmul": name, "weights": weights, "tokens": tokens, "floor": floor, "losart": ours}
                row |= {"losart/floor": ratio(ours, floor)}
                if weights == "int4":
                    theirs = attempt(torch_microseconds, rows, inner, tokens)
                    row |= {"torch int4": theirs, "torch/losart": ratio(theirs, ours)}
                yield row


def microseconds(rows: int, inner: int, weights: str, tokens: int) -> tuple[float, int]:
    """Of one matmul, and the bytes of its matrix."""
    backend = NoiseBackend(model_config("8B"), BFLOAT16)
    matrices = [backend.matrix(rows, inner, weights)]
    size = held_bytes(matrices[0])
    copies = uncached(size)
    matrices += [backend.matrix(rows, inner, weights) for _ in range(copies - 1)]
    turn = itertools.cycle(matrices)
    with backend.memory.stream:
        x = cupy.empty((tokens, inner), np.uint16)
        noise(np.float32(1.0), x)
    calls = max(24, copies)
    return graph_microseconds(backend.memory.stream, lambda: backend.linear(x, next(turn)), calls), size


def float8_rows(bandwidth: float, quick: bool = False) -> Iterator[dict[str, Any]]:
    """One row per matmul and number of tokens, in microseconds: bfloat16, fp8 widened, both operands fp8."""
    for name, shape in matmul_shapes("8B").items():
        for tokens in () if name == "head" or (quick and name != "gate_up") else MANY_TOKENS:
            row: dict[str, Any] = {"matmul": name, "tokens": tokens}
            for column, weights, precision in (
                ("bfloat16", "bfloat16", BFLOAT16),
                ("fp8, widened", "fp8", BFLOAT16),
                ("fp8", "fp8", FLOAT8),
            ):
                row[column] = attempt(many_microseconds, *shape, weights, precision, tokens)
            rounding = attempt(rounding_microseconds, shape[1], tokens)
            operations = 2 * tokens * shape[0] * shape[1]
            yield row | {
                "of it rounding": rounding,
                "rounding's floor": 3 * tokens * shape[1] / bandwidth * 1e6,
                "TFLOP/s": teraflops(operations, row["fp8"]),
                "bfloat16/fp8": ratio(row["bfloat16"], row["fp8"]),
                "widened/fp8": ratio(row["fp8, widened"], row["fp8"]),
                "error": attempt(rounding_error, *shape, tokens),
            }


def many_microseconds(rows: int, inner: int, weights: str, precision: Precision, tokens: int) -> float:
    """Of one matmul with many tokens; gate and up with silu(gate) * up."""
    backend = NoiseBackend(model_config("8B"), precision)
    copies = uncached(rows * inner)
    turn = itertools.cycle([backend.matrix(rows, inner, weights) for _ in range(copies)])
    x = _tokens(backend, tokens, inner)
    gated = rows == 2 * backend.config.intermediate_size

    def launch() -> Any:
        matrix = next(turn)
        return backend.gated_linear(x, matrix, True) if gated else backend.prefill_linear(x, matrix)

    return queued_microseconds(backend.memory.stream, launch, max(20, copies))


def rounding_microseconds(inner: int, tokens: int) -> float:
    """Of rounding tokens to fp8."""
    backend = NoiseBackend(model_config("8B"), FLOAT8)
    products, x = Float8Products(backend.kernels), _tokens(backend, tokens, inner)
    return queued_microseconds(backend.memory.stream, lambda: products.quantized(x), 50)


def rounding_error(rows: int, inner: int, tokens: int) -> float:
    """The norm of what rounding tokens to fp8 changes over that of the sums; of noise."""
    sums = []
    for precision in (BFLOAT16, FLOAT8):
        backend = NoiseBackend(model_config("8B"), precision)
        x, matrix = _tokens(backend, tokens, inner), backend.matrix(rows, inner, "fp8")
        with backend.memory.stream:
            sums.append(backend.prefill_linear(x, matrix).planes.sum(axis=0))
            backend.memory.stream.synchronize()
    change = sums[1] - sums[0]
    return float(cupy.sqrt((change * change).sum() / (sums[0] * sums[0]).sum()))


def _tokens(backend: NoiseBackend, tokens: int, inner: int) -> Any:
    with backend.memory.stream:
        x = cupy.empty((tokens, inner), np.uint16)
        noise(np.float32(1.0), x)
    return x


def torch_microseconds(rows: int, inner: int, tokens: int) -> float:
    """Of torch's matmul by 4-bit weights in groups of 64."""
    import torch

    copies = uncached(rows * inner // 2)
    packed, scales = [], []
    for _ in range(copies):
        codes = torch.randint(0, 256, (rows, inner // 2), dtype=torch.uint8, device="cuda")
        packed.append(torch.ops.aten._convert_weight_to_int4pack(codes, 8))
        scales.append(torch.randn(inner // 64, rows, 2, dtype=torch.bfloat16, device="cuda"))
    x = torch.randn(tokens, inner, dtype=torch.bfloat16, device="cuda")

    def run() -> None:
        for weight, of_groups in zip(packed, scales, strict=True):
            torch.ops.aten._weight_int4pack_mm(x, weight, 64, of_groups)

    graph = torch.cuda.CUDAGraph()
    run()
    with torch.cuda.graph(graph):
        run()
    return run_microseconds(graph.replay) / copies


def pass_rows(bandwidth: float, quick: bool = False) -> Iterator[dict[str, Any]]:
    """One row per format and prefix: a pass over a block, in milliseconds; and generations and prefill."""
    for weights, kv, activations in MODELS[1:3] if quick else MODELS:
        row: dict[str, Any] = {"weights": weights, "kv": kv, "activations": activations}
        model = attempt(NoiseModel, "8B", **row)
        if isinstance(model, str):
            yield row | {"pass ms": model}
            continue
        for prefix in (8192,) if quick else PREFIXES:
            read = model.read_bytes + model.config.num_layers * kv_bytes(model.config, prefix, kv)
            floor = read / bandwidth * 1e3
            ours = attempt(pass_milliseconds, model, prefix)
            yield row | {
                "weights GB": model.read_bytes / 1e9,
                "prefix": prefix,
                "floor ms": floor,
                "pass ms": ours,
                "pass/floor": ratio(ours, floor),
            }
        prefilled, decoded = attempt(prefill_speed, model), attempt(decode_speed, model)
        yield row | {"prefix": 2048, "prefilled tokens/s": prefilled, "decoded tokens/s": decoded}
        del model
        free_memory()


def pass_milliseconds(model: NoiseModel, prefix: int) -> float:
    """Of a later pass over a block after a cache of noise."""
    cache = filled_cache(model.backend, prefix, BLOCK)
    return LaterPasses(model, cache, [np.arange(BLOCK)], AttentionConfig()).milliseconds()


def prefill_speed(model: NoiseModel) -> float:
    """Tokens a second of a prompt of 2,048."""
    return 2048 / _fastest(lambda: _generated(model, 1)[0])


def decode_speed(model: NoiseModel) -> float:
    """New tokens a second after it, BLOCK // FIXED passes a block."""
    return NEW_TOKENS / _fastest(lambda: _generated(model, NEW_TOKENS)[1])


def _fastest(run: Callable[[], float]) -> float:
    return min(run() for _ in range(3))


def _generated(model: NoiseModel, tokens: int) -> tuple[float, float]:
    """Seconds of prefill, and of what follows."""
    fixed = {"remasking": "low_confidence_static", "stop_token_ids": [], "max_new_tokens": tokens}
    options = generation_config(
        model.config, fixed | {"block_length": BLOCK, "denoising_steps": BLOCK // FIXED}
    )
    prompt = np.random.default_rng(0).integers(model.config.vocab_size, size=2048).tolist()
    engine = Engine(model.transformer)
    began = time.perf_counter()
    stats = engine.submit(prompt, options).result().stats
    return stats.prefill_seconds, time.perf_counter() - began - stats.prefill_seconds
