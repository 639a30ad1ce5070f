"""The CUDA backend but for sparse attention: CuPy arrays and our own kernels.

The residual stream, queries, keys and values of a block are float32; weights, the cache and what
enters a product are held in the backend's dtype, 16-bit ones as their bits.
"""

from __future__ import annotations

from ctypes import c_double
from typing import Any

import cupy
import numpy as np

from losart.backends.base import PassInputs
from losart.backends.cuda.graph import outside_passes
from losart.backends.cuda.pages import HELD_AS, CudaPageTable
from losart.backends.cuda.passes import CudaPasses
from losart.backends.cuda.plans import (
    COLUMNS,
    SKINNY_TOKENS,
    Card,
    Plan,
    causal_plan,
    prefix_plan,
    product_plan,
)
from losart.backends.cuda.products import blas_product
from losart.backends.cuda.results import NO_PRODUCT, PrefixParts, Product, RefreshedPrefix
from losart.backends.cuda.weights import WeightLoader
from losart.config.checks import require
from losart.config.model import ModelConfig
from losart.config.options import GenerationConfig
from losart.config.rope import inverse_frequencies
from losart.engine.kv_cache import PagedKVCache, chunk_positions
from losart.engine.sampling import float32_temperature
from losart.errors import ConfigError
from losart.kernels_cu import kernel
from losart.kernels_cu.tensor_map import tensor_map

LARGEST_HEAD_DIM = 256  # attention.cuh
BLOCK_ROWS = 4  # of a thread block; split_heads.cu, block_attention.cu, merge_parts.cu
LOGIT_SLICES = 64
NORM_BYTES = 8  # of shared memory for each channel; add_rms_norm.cu
ROW_BYTES = 32  # of logit_row.cuh's Row


class DenseCudaBackend(CudaPasses):
    """Implements `losart.backends.base.Backend`.

    Parameters
    ----------
    config : ModelConfig
    dtype : {"float32", "bfloat16", "float16"}
        In which weights, keys and values are held.
    """

    name = "cuda"
    prefill_tokens = 2048

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        for name, unit in (("hidden_size", 4), ("intermediate_size", 4), ("head_dim", 8)):
            size = getattr(config, name)
            require(size % unit == 0, ConfigError, f"{name} must be a multiple of {unit} on CUDA, not {size}")
        if config.head_dim > LARGEST_HEAD_DIM:
            raise ConfigError(f"head_dim must be {LARGEST_HEAD_DIM} at most on CUDA, not {config.head_dim}")
        super().__init__(config.max_positions)
        self.config = config
        self.dtype = dtype
        self.card = _card(self.device)
        norm_bytes = NORM_BYTES * config.hidden_size
        if norm_bytes > self.card.shared_per_block:
            raise ConfigError(f"hidden_size {config.hidden_size} is too large for this GPU's shared memory")
        self._loader = WeightLoader(dtype, self.stream)
        frequencies, self._rope_factor = inverse_frequencies(config.rope, config.head_dim)
        with self.stream:
            self._frequencies = cupy.asarray(frequencies / np.pi)  # in half turns per position
        self._ones: dict[int, Any] = {}
        self._tensor = dtype != "float32"

    def _launch(self, name: str, grid: tuple[int, ...], threads: int, *args: Any, shared: int = 0) -> None:
        kernel(name, self.dtype)(grid, threads, *args, shared=shared)

    def _launch_rows(self, name: str, tokens: int, heads: int, *args: Any, shared: int = 0) -> None:
        """A kernel in which a warp has a row, a head of a token."""
        self._launch(name, (tokens, -(-heads // BLOCK_ROWS)), 32 * BLOCK_ROWS, *args, shared=shared)

    def _launch_plan(self, plan: Plan, *args: Any) -> None:
        kernel(plan.kernel, self.dtype, plan.defines)(plan.grid, plan.threads, *args, shared=plan.shared)

    # -- weights and cache

    def upload(self, *tensors: Any) -> Any:
        with self._running("the weights"):
            return self._loader.matrix(*tensors)

    def upload_vector(self, *tensors: Any) -> Any:
        with self._running("the weights"):
            return self._loader.vector(*tensors)

    def new_cache(self, page_size: int, expected: int | None = None) -> PagedKVCache:
        positions = chunk_positions(page_size, expected)
        table = CudaPageTable(self.config, page_size, positions, self.dtype, self._write)

        def allocate(shape: tuple[int, ...], dtype: str) -> Any:
            with self._running("the KV cache"):
                self._prefill_pool.free_all_blocks()  # an interrupted prompt may have left some
                return cupy.zeros(shape, HELD_AS[dtype])

        return PagedKVCache(table, allocate)

    # -- transformer

    def embed(self, table: Any, ids: Any) -> Any:
        x = cupy.empty((len(ids), table.shape[1]), np.float32)
        self._launch("embedding", (-(-table.shape[1] // 256), len(ids)), 256, table, ids, x, table.shape[1])
        return x

    def linear(self, x: Any, matrix: Any, bias: Any | None = None) -> Product:
        (tokens, inner), rows = x.shape, len(matrix)
        plan = product_plan(self.card, self._tensor, tokens, rows, inner)
        if self.blas and tokens > SKINNY_TOKENS and plan.kernel != "linear_hopper":
            values = blas_product(x, matrix, self.dtype)
            if values is not None:
                return Product(values[None], bias)
        values = cupy.empty((plan.parts, tokens, rows), np.float32)
        operands: tuple[Any, ...] = (x, matrix)
        if plan.boxes:
            maps = zip(operands, plan.boxes, strict=True)
            operands = tuple(tensor_map(array.data.ptr, *array.shape, box) for array, box in maps)
        share = (plan.share,) if plan.kernel == "linear_tensor" else ()
        self._launch_plan(plan, *operands, values, tokens, rows, inner, *share)
        steps = -(-inner // COLUMNS) if share else 1
        return Product(values, bias, steps, plan.share)

    def add_rms_norm(self, x: Any, delta: Product | None, gain: Any) -> tuple[Any, Any]:
        tokens, hidden = x.shape
        total, y = cupy.empty_like(x), cupy.empty(x.shape, HELD_AS[self.dtype])
        self._launch(
            "add_rms_norm",
            (tokens,),
            min(1024, -(-hidden // 128) * 32),
            *(x, *(delta.arguments if delta else NO_PRODUCT), gain, total, y, hidden),
            self.config.rms_norm_eps,
            shared=NORM_BYTES * hidden,
        )
        return total, y

    def split_heads(
        self, qkv: Product, q_norm: Any, k_norm: Any, cache: PagedKVCache
    ) -> tuple[Any, Any, Any]:
        c, tokens = self.config, len(qkv)
        q = cupy.empty((tokens, c.num_heads, c.head_dim), np.float32)
        k = cupy.empty((tokens, c.num_kv_heads, c.head_dim), np.float32)
        v = cupy.empty_like(k)
        self._launch_rows(
            "split_heads",
            tokens,
            c.num_heads + 2 * c.num_kv_heads,
            *(*qkv.arguments, q_norm, k_norm, self._frequencies, float(self._rope_factor)),
            *(self._given.length, q, k, v, c.num_heads, c.num_kv_heads, c.head_dim, c.rms_norm_eps),
        )
        return q, k, v

    def silu_gate(self, gate_up: Product) -> Any:
        tokens, ffn = len(gate_up), gate_up.rows // 2
        y = cupy.empty((tokens, ffn), HELD_AS[self.dtype])
        self._launch("silu_gate", (-(-ffn // 512), tokens), 128, *gate_up.arguments, y, ffn)
        return y

    # -- attention

    def _cache_arguments(self, table: CudaPageTable, layer: int) -> tuple[Any, ...]:
        c = self.config
        sizes = (layer, c.num_kv_heads, table.positions_per_chunk, c.head_dim)
        return self._pages.kv, self._given.length, *sizes

    def _write(self, table: CudaPageTable, layer: int, k: Any, v: Any) -> None:
        self._launch(
            "cache_write",
            (self.config.num_kv_heads, -(-len(k) // table.page_size) + 1),
            -(-self.config.head_dim // 32) * 32,
            *(*self._cache_arguments(table, layer), self._pages.bounds, table.page_size, k, v, len(k)),
        )

    def causal_attention(self, q: Any, cache: PagedKVCache, layer: int, block_length: int) -> Any:
        o = cupy.empty(q.shape, HELD_AS[self.dtype])
        plan = causal_plan(self.card, self._tensor, *self._shape(q))
        arguments = self._cache_arguments(cache.table, layer)
        self._launch_plan(plan, q, *arguments, o, len(q), self.config.num_heads, block_length)
        return o

    def prefix_attention(self, q: Any, cache: PagedKVCache, layer: int) -> PrefixParts:
        plan = prefix_plan(self.card, self._tensor, *self._shape(q))
        parts = PrefixParts.empty(plan.parts, *q.shape)
        arguments = self._cache_arguments(cache.table, layer)
        self._launch_plan(plan, q, *arguments, parts.o, parts.tops, parts.totals, *q.shape[:2])
        return parts

    def _shape(self, q: Any) -> tuple[int, int, int, int]:
        return len(q), self.config.num_heads, self.config.num_kv_heads, self.config.head_dim

    def as_parts(self, prefix: Any) -> PrefixParts:
        """Prefix attention as parts: as it is, or o and log-sum-exp as the only part."""
        if isinstance(prefix, PrefixParts):
            return prefix
        o, lse = prefix
        if lse.size not in self._ones:
            with outside_passes():
                self._ones[lse.size] = cupy.asarray(np.ones(lse.size, np.float32))
        return PrefixParts(o[None], lse[None], self._ones[lse.size])

    def block_attention(self, q: Any, k: Any, v: Any, prefix: Any) -> Any:
        tokens, heads, dim = q.shape
        o = cupy.empty(q.shape, HELD_AS[self.dtype])
        if isinstance(prefix, RefreshedPrefix):
            arguments = prefix.arguments
        else:
            arguments = *self.as_parts(prefix).arguments, None, 0, None, None
        self._launch_rows(
            "block_attention",
            tokens,
            heads,
            *(q, k, v, *arguments, o, tokens, heads, self.config.num_kv_heads, dim),
            shared=4 * BLOCK_ROWS * tokens,
        )
        return o

    def merge(self, prefix: PrefixParts | RefreshedPrefix) -> tuple[Any, Any]:
        """o [tokens, heads, head_dim] and log-sum-exp [tokens, heads] of attention over the prefix."""
        if isinstance(prefix, RefreshedPrefix):
            parts, tokens, into = prefix.parts, prefix.tokens, prefix.kept
        else:
            parts, tokens, into = prefix, None, self._new_result(prefix)
        self._merge(parts, tokens, into)
        return into

    def _new_result(self, parts: PrefixParts) -> tuple[Any, Any]:
        shape = parts.o.shape[1:]
        return cupy.empty(shape, np.float32), cupy.empty(shape[:2], np.float32)

    def _merge(self, parts: PrefixParts, tokens: Any, into: tuple[Any, Any]) -> None:
        """Merge parts into rows of o and log-sum-exp: those of `tokens`, None: all."""
        count, heads, dim = parts.o.shape[1:]
        self._launch_rows("merge_parts", count, heads, *parts.arguments, tokens, *into, heads, dim)

    # -- sampling

    def propose(self, hidden: Any, inputs: PassInputs, head: Any, config: GenerationConfig) -> Any:
        logits = self.linear(hidden, head)
        tokens, vocab, given = len(logits), logits.rows, self._given
        slices = cupy.empty((tokens, LOGIT_SLICES, ROW_BYTES), np.uint8)
        kept = cupy.empty((tokens, vocab), np.float32) if config.temperature else None
        temperature = float32_temperature(config.temperature)
        self._launch(
            "logit_slices",
            (LOGIT_SLICES, tokens),
            256,
            *(*logits.arguments, given.rows, given.count, config.mask_token_id),
            *(temperature, slices, kept),
            shared=16 * -(-vocab // (4 * LOGIT_SLICES)),
        )
        results = given.results
        self._launch(
            "sample",
            (tokens,),
            1024,
            *(slices, LOGIT_SLICES, kept, vocab, given.rows, given.count, given.uniforms),
            *(temperature, config.top_k, c_double(config.top_p), *results),
        )
        return results


def _card(device: Any) -> Card:
    limits = device.attributes
    major, minor = divmod(int(device.compute_capability), 10)
    return Card(
        (major, minor),
        limits["MultiProcessorCount"],
        limits["MaxSharedMemoryPerBlockOptin"],
        limits["MaxSharedMemoryPerMultiprocessor"],
    )
