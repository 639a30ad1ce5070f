"""Models of released sizes whose weights, keys and values are noise made on the device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cupy
import numpy as np

from losart.backends.base import PassBody, Stack
from losart.backends.cuda.backend import CudaBackend
from losart.backends.cuda.batch import DeviceBatch
from losart.backends.cuda.experts import Experts, ExpertStack
from losart.backends.cuda.quantized import QuantizedForm, QuantizedWeight
from losart.backends.cuda.results import Weight
from losart.config.model import ModelConfig
from losart.config.options import AttentionConfig, GenerationConfig, generation_config
from losart.config.precision import KV_FLOAT8, KV_FORMATS, Format, Precision
from losart.engine.batch import PassBatch, PassKind, SequencePass
from losart.loaders.families.family import TensorPattern
from losart.loaders.families.qwen import EXPERTS
from losart.loaders.families.sdar_moe import SDAR_MOE
from losart.measure.random_checkpoint import SIZES

PIECE = 8192  # positions written at a time
BLOCK = 16
CACHED_BYTES = 400_000_000  # well past what the device's cache holds
BFLOAT16 = Precision.of("bfloat16")
DENSE = AttentionConfig()
SHARED = tuple(replace(pattern, part="shared") for pattern in EXPERTS if "{e}" in pattern.name)
ROUTER_BIAS = TensorPattern("router_bias", "router_bias", ("experts",), "router_bias")
EVERY_PART = replace(SDAR_MOE, layer=(*SDAR_MOE.layer, ROUTER_BIAS, *SHARED))

noise = cupy.ElementwiseKernel(
    "float32 scale",
    "uint16 bits",
    """
    unsigned x = (unsigned)i * 2654435761u;
    x ^= x >> 15; x *= 2246822519u; x ^= x >> 13; x *= 3266489917u; x ^= x >> 16;
    float value = ((int)x * 4.6566e-10f) * scale;
    bits = (unsigned short)(__float_as_uint(value) >> 16);
    """,
    "losart_noise",
)


random_bits = cupy.ElementwiseKernel(
    "uint32 mask",
    "uint32 bits",
    """
    unsigned x = (unsigned)i * 2654435761u;
    x ^= x >> 15; x *= 2246822519u; x ^= x >> 13; x *= 3266489917u; x ^= x >> 16;
    bits = x & mask;
    """,
    "losart_random_bits",
)
FORMATS = {"int4": ("int4", 64, 4.6), "int8": ("int8", 0, 74.0), "fp8": ("float8", 0, 1.0)}


class NoiseBackend(CudaBackend):
    """A CUDA backend that takes shapes in place of a checkpoint's tensors.

    Parameters
    ----------
    weights : str
        "bfloat16", or of `FORMATS`: of the layers' matrices, beside which the head is int8.
    """

    def __init__(
        self,
        config: ModelConfig,
        precision: Precision,
        deterministic: bool = False,
        weights: str = "bfloat16",
    ) -> None:
        super().__init__(config, precision, deterministic)
        self._weights = weights
        self._embedded = False

    def upload(self, *shapes: Any) -> Any:
        rows, inner = sum(rows for rows, _ in shapes), shapes[0][1]
        weights, experts = self._weights, self.config.experts
        if experts is not None and shapes[0] == (experts.count, self.config.hidden_size):
            weights = "bfloat16"  # the router
        if shapes[0] == (self.config.vocab_size, self.config.hidden_size) and weights != "bfloat16":
            weights = "int8" if self._embedded else "bfloat16"
            self._embedded = True
        return self.matrix(rows, inner, weights)

    def upload_experts(self, gate_up: Stack, down: Stack) -> tuple[Experts, Experts]:
        first, second = (self.stack(*stack_shape(stack), self._weights) for stack in (gate_up, down))
        return first, second

    def held(self, *shapes: Any) -> dict[str, int]:
        return {"noise": 2 * sum(map(math.prod, shapes))}

    def held_experts(self, gate_up: Stack, down: Stack) -> dict[str, int]:
        return self.held(stack_shape(gate_up), stack_shape(down))

    def stack(self, experts: int, rows: int, inner: int, weights: str) -> Experts:
        """A matrix of noise of each expert."""
        if weights == "bfloat16":
            return ExpertStack(self.matrix(experts * rows, inner, weights).values.reshape(-1, rows, inner))
        return self._coded(experts, rows, inner, weights)

    def matrix(self, rows: int, inner: int, weights: str) -> Any:
        """A matrix of noise held in some format."""
        with self.memory.stream:
            if weights == "bfloat16":
                held = cupy.empty((rows, inner), np.uint16)
                noise(np.float32(1.7 / inner**0.5), held)
                return Weight(held)
            return self._coded(1, rows, inner, weights)

    def _coded(self, count: int, rows: int, inner: int, weights: str) -> QuantizedWeight:
        with self.memory.stream:
            dtype, group, spread = FORMATS[weights]
            wide = dtype == "float8" and self.float8_activations
            form = QuantizedForm(rows, inner, dtype, group or -(-inner // 128) * 128, False, wide)
            codes = cupy.empty(count * form.code_bytes // 4, np.uint32)
            random_bits(np.uint32(0xBFBFBFBF if dtype == "float8" else 0xFFFFFFFF), codes)
            scales = cupy.empty((count * form.padded_rows, form.groups), np.uint16)
            noise(np.float32(1.7 / inner**0.5 / spread), scales)
            if wide:
                scales = (scales.astype(np.uint32) << 16).view(np.float32)
            return QuantizedWeight(form, codes, scales, None)

    def upload_vector(self, *shapes: Any) -> Any:
        with self.memory.stream:
            return cupy.ones(sum(shape[0] for shape in shapes), np.float32)


def stack_shape(stack: Stack) -> tuple[int, int, int]:
    """Of the matrices of all experts."""
    return len(stack), sum(rows for rows, _ in stack[0]), stack[0][0][1]


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Canonical tensor names to shapes, in place of a checkpoint's tensors; always with a head."""
    untied = replace(config, tie_embeddings=False)
    return {tensor.name: tensor.shape for tensor in EVERY_PART.expected_tensors(untied)}


def model_config(size: str, **changes: Any) -> ModelConfig:
    """SDAR's sizes."""
    sizes = dict(SIZES[size])
    fixed = {"model_type": "sdar", "tie_embeddings": sizes.pop("tied", False), "dtype": "bfloat16"}
    longer = {"max_positions": 262144, "mask_token_id": 151669}
    return ModelConfig(**{**sizes, **fixed, **longer, **changes})


def filled_cache(backend: CudaBackend, prefix: int, room: int = 0) -> Any:
    """A cache full of noise."""
    cache = backend.new_cache(16, prefix + room)
    cache.reserve(prefix + room)
    with backend.memory.stream:
        for kv, _ in cache.table.chunks:
            fill_with_noise(kv, backend.precision.kv, backend.config.head_dim)
    cache.length = prefix
    return cache


def fill_with_noise(kv: Any, format: Format, head_dim: int) -> None:
    """Keys and values of a chunk, and where they are codes of 8 bits one scale for all."""
    if not format.scale_bytes:
        noise(np.float32(1.0), kv)
        return
    words = kv.view(np.uint32).reshape(-1, 2 * (head_dim + format.scale_bytes))  # of 8 positions
    codes = cupy.empty((len(words), 2 * head_dim), np.uint32)
    random_bits(np.uint32(0xBFBFBFBF if format is KV_FLOAT8 else 0xFFFFFFFF), codes)
    words[:, : 2 * head_dim] = codes
    scale = np.float32(1.6 if format is KV_FLOAT8 else 1 / 74)  # of numbers with deviation 1
    words[:, 2 * head_dim :] = int(scale.view(np.uint32))


def written_cache(
    backend: CudaBackend, prefix: int, room: int, draw: Callable[[int, int, int], tuple[Any, Any]]
) -> Any:
    """A cache with keys, values and page bounds: `draw` of layer, start and count gives keys and values."""
    cache = backend.new_cache(16, prefix + room)
    cache.reserve(prefix + room)
    layers = range(backend.config.num_layers)
    for start in range(0, prefix, PIECE):
        count = min(PIECE, prefix - start)

        def write(batch: DeviceBatch, start: int = start, count: int = count) -> Any:
            for layer in layers:
                backend.write_kv(layer, *draw(layer, start, count), batch)
            return None, []

        backend.begin(pass_after(cache, count, PassKind.PREFILL), PassBody(write))()
        cache.advance(count)
    return cache


def block_options(config: ModelConfig, attention: AttentionConfig) -> GenerationConfig:
    """Options of passes over a block."""
    return replace(generation_config(config, {"block_length": BLOCK}), attention=attention)


def pass_after(
    cache: Any, tokens: int, kind: PassKind, attention: AttentionConfig = DENSE, slot: Any = None
) -> PassBatch:
    """A pass over so many tokens after a cache's prefix."""
    options = block_options(model_config("8B"), attention)
    rows = np.arange(0 if kind is PassKind.PREFILL else tokens, dtype=np.int32)
    ids = np.zeros(tokens, np.int64)
    return PassBatch(
        (SequencePass(kind, ids, cache.length, options, cache, slot, rows, np.zeros(len(rows))),)
    )


def placed_queries(
    backend: CudaBackend, cache: Any, tokens: int, kind: PassKind = PassKind.LATER
) -> tuple[Any, DeviceBatch]:
    """Queries of so many tokens after a cache's prefix, and their pass, placed on the device."""
    c = backend.config
    with backend.memory.stream:
        batch = backend.runner.place(pass_after(cache, tokens, kind))
        return cupy.random.standard_normal((tokens, c.num_heads, c.head_dim), np.float32), batch


def uncached(size: int) -> int:
    """How many arrays of so many bytes do not fit into the device's cache together; 2 at least."""
    return max(2, -(-CACHED_BYTES // size))


def kv_bytes(config: ModelConfig, prefix: int, kv: str = "auto") -> int:
    """Bytes of one layer's keys and values."""
    row = 2 * config.head_dim if kv == "auto" else config.head_dim + KV_FORMATS[kv].scale_bytes
    return 2 * prefix * config.num_kv_heads * row


def weight_bytes(config: ModelConfig) -> int:
    """Bytes of the weights that a pass must read: all, but of the embedding only a few rows."""
    return sum(2 * math.prod(shape) for name, shape in shapes(config).items() if name != "embed")


def held_bytes(matrix: Any) -> int:
    """Bytes of a matrix, or of those of all experts, as they are held."""
    return matrix.nbytes if isinstance(matrix, QuantizedWeight) else matrix.values.nbytes
