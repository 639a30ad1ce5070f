"""The CUDA backend but for sparse attention: CuPy arrays, our own kernels, one CUDA graph per denoising pass.

The residual stream, queries, keys and values of a block are float32; weights, the cache and what
enters a product are held in the backend's dtype, 16-bit ones as their bits. The host tells a pass its
ids, random numbers and the prefix's length through device buffers that stay in place, so that a
captured pass can be replayed as the prefix grows.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from ctypes import c_double
from typing import Any

import cupy
import numpy as np

from losart.backends.base import PassInputs
from losart.backends.cuda_graph import CapturedPass, PassBuffers, capture, outside_passes
from losart.backends.cuda_pages import HELD_AS, CudaPageTable, PagesInPlace
from losart.backends.cuda_plans import (
    COLUMNS,
    SKINNY_TOKENS,
    Card,
    Plan,
    causal_plan,
    prefix_plan,
    product_plan,
)
from losart.backends.cuda_products import blas_product
from losart.backends.cuda_results import NO_PRODUCT, PrefixParts, Product, RefreshedPrefix
from losart.backends.cuda_weights import WeightLoader, memory_errors
from losart.cache import PagedKVCache, chunk_positions
from losart.checks import require
from losart.config import ModelConfig
from losart.errors import ConfigError, NumericalError, OutOfMemoryError
from losart.kernels_cu import kernel
from losart.kernels_cu.tensor_map import tensor_map
from losart.options import GenerationConfig
from losart.rope import inverse_frequencies
from losart.sampling import NOT_FINITE, Proposals, float32_temperature

LARGEST_HEAD_DIM = 256  # attention.cuh
BLOCK_ROWS = 4  # of a thread block; split_heads.cu, block_attention.cu, merge_parts.cu
LOGIT_SLICES = 64
NORM_BYTES = 8  # of shared memory for each channel; add_rms_norm.cu
CAPTURED_PASSES = 32  # kept, of those used last
ROW_BYTES = 32  # of logit_row.cuh's Row


class DenseCudaBackend:
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
        self.config = config
        self.dtype = dtype
        self.device = cupy.cuda.Device()
        self.card = _card(self.device)
        norm_bytes = NORM_BYTES * config.hidden_size
        if norm_bytes > self.card.shared_per_block:
            raise ConfigError(f"hidden_size {config.hidden_size} is too large for this GPU's shared memory")
        self.stream = cupy.cuda.Stream(non_blocking=True)
        # What passes allocate from, and captured graphs hold addresses of.
        self._pool = cupy.cuda.MemoryPool(self._allocate)
        # What pieces of a prompt allocate from: much, which the next pass or chunk of a cache gives back.
        self._prefill_pool = cupy.cuda.MemoryPool(_from_driver)
        self._loader = WeightLoader(dtype, self.stream)
        # None where one has been run once: it is captured when it comes again.
        self._passes: OrderedDict[Hashable, CapturedPass | None] = OrderedDict()
        self._lock = threading.RLock()
        self._buffers: dict[int, PassBuffers] = {}
        frequencies, self._rope_factor = inverse_frequencies(config.rope, config.head_dim)
        with self.stream:
            self._frequencies = cupy.asarray(frequencies / np.pi)  # in half turns per position
            self._pages = PagesInPlace(config.max_positions)
            self._ones: dict[int, Any] = {}
        self._tensor = dtype != "float32"
        self.counted = False  # whether the pass counts the positions that it reads
        self.captures = True  # whether the pass can be captured: the host takes no part in it
        # Whether products of many tokens may go to cuBLAS, where no kernel of ours does as well: in prefill,
        # for it cannot be captured.
        self.blas = False

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

    # -- running

    @contextmanager
    def _running(self, purpose: str) -> Iterator[None]:
        """On the backend's device and stream, one thread at a time."""
        with self._lock, self.device, self.stream, memory_errors(purpose):
            yield

    def _allocate(self, size: int) -> Any:
        """Memory for the pool of passes.

        When there is none, CuPy frees the pool's free blocks, and captured graphs work in those: first
        the cached blocks of all else go, and then the graphs.
        """
        try:
            return _from_driver(size)
        except cupy.cuda.runtime.CUDARuntimeError:
            self._passes.clear()
            raise

    def run_pass(
        self, shape: Hashable, inputs: PassInputs, cache: PagedKVCache, body: Callable[[Any], Any]
    ) -> tuple[Any, int]:
        tokens = len(inputs.ids)
        cache.reserve(cache.length + tokens)
        with self._running("a pass"), cupy.cuda.using_allocator(self._pool.malloc):
            self._prefill_pool.free_all_blocks()
            self._place(inputs, cache)
            key = (shape, tokens, cache.page_size, cache.table.positions_per_chunk)
            captured = self._captured(key, body)
            if captured is not None:
                captured.launch()
                return self._fetch(inputs, captured.proposes, captured.counts)
            # By launches, which compiles the kernels and fills the pool.
            self.counted, self.captures = False, True
            proposes = body(self._given.ids) is not None
            if not self.captures:
                self._passes.pop(key, None)  # as if it had never come; out of memory, all are dropped
            return self._fetch(inputs, proposes, self.counted)

    def _captured(self, key: Hashable, body: Callable[[Any], Any]) -> CapturedPass | None:
        """The captured pass of this key; None when it comes for the first time, or there is no memory."""
        passes = self._passes
        if key not in passes:
            passes[key] = None
        elif passes[key] is None:
            with suppress(OutOfMemoryError), memory_errors("a captured pass"):
                passes[key] = self._capture(body)
        captured = passes.setdefault(key, None)  # out of memory, all are dropped
        passes.move_to_end(key)
        if len(passes) > CAPTURED_PASSES:
            passes.popitem(last=False)
        return captured

    def _capture(self, body: Callable[[Any], Any]) -> CapturedPass:
        self.counted = False
        graph, given = capture(self.stream, lambda: body(self._given.ids))
        return CapturedPass(self.stream, graph, given is not None, self.counted)

    def run_prefill(self, ids: np.ndarray, cache: PagedKVCache, body: Callable[[Any], Any]) -> None:
        cache.reserve(cache.length + len(ids))
        with self._running("a piece of the prompt"), cupy.cuda.using_allocator(self._prefill_pool.malloc):
            self._place(PassInputs(ids), cache)
            self.blas = True
            try:
                body(self._given.ids)
            finally:
                self.blas = False
            self.stream.synchronize()

    def _place(self, inputs: PassInputs, cache: PagedKVCache) -> None:
        """Bring the pass's inputs to where its kernels look for them."""
        tokens = len(inputs.ids)
        if tokens not in self._buffers:
            with outside_passes():
                self._buffers[tokens] = PassBuffers(tokens)
        self._given = self._buffers[tokens]
        self._given.set(inputs, cache.length, self.stream)
        self._pages.place(cache.table, self.stream)

    def _fetch(self, inputs: PassInputs, proposes: bool, counts: bool) -> tuple[Proposals | None, int]:
        """The pass's proposals, if it makes any, and the positions that sparse attention read."""
        if not proposes and not counts:
            return None, 0
        positions, results = self._given.get()
        if not proposes:
            return None, positions
        tokens, confidence, entropy, finite = results[:, : len(inputs.rows)]
        if not finite.all():
            raise NumericalError(NOT_FINITE)
        proposals = Proposals(tokens.astype(np.int64), confidence.view(np.float32), entropy.view(np.float32))
        return proposals, positions

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


def _from_driver(size: int) -> Any:
    """Memory for a pool; if need be of what the default one has cached, such as chunks of past caches."""
    memory = cupy.cuda.memory
    try:
        return memory.MemoryPointer(memory.Memory(size), 0)
    except cupy.cuda.runtime.CUDARuntimeError:
        cupy.get_default_memory_pool().free_all_blocks()
    return memory.MemoryPointer(memory.Memory(size), 0)


def _card(device: Any) -> Card:
    limits = device.attributes
    major, minor = divmod(int(device.compute_capability), 10)
    return Card(
        (major, minor),
        limits["MultiProcessorCount"],
        limits["MaxSharedMemoryPerBlockOptin"],
        limits["MaxSharedMemoryPerMultiprocessor"],
    )
