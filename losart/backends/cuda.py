"""The CUDA backend: CuPy arrays, our own kernels (kernels_cu), one CUDA graph per denoising pass.

Activations are float32; weights, keys and values are held in the backend's dtype, 16-bit ones as
their bits. The host tells a pass its ids, random numbers and the prefix's length through device
buffers that stay in place, so that a captured pass can be replayed as the prefix grows.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any

import cupy
import numpy as np

from losart.backends.base import PassInputs
from losart.backends.cpu import narrow, widen
from losart.backends.cuda_graph import CapturedPass, DeviceInputs
from losart.backends.cuda_pages import HELD_AS, CudaPageTable
from losart.cache import PagedKVCache, chunk_positions
from losart.config import ModelConfig
from losart.errors import NumericalError
from losart.kernels_cu import Defines, kernel
from losart.options import GenerationConfig
from losart.rope import inverse_frequencies
from losart.sampling import NOT_FINITE, Proposals

STAGING_BYTES = 32 << 20  # of pinned memory, through which weights go to the device
ROWS = 16  # query rows of an attention block; attention.cuh
ATTENTION_THREADS = 256
LINEAR_TOKENS = 16  # linear.cu
LINEAR_ROWS = 8
SKINNY_TOKENS = 64  # linear_tensor.cu takes products of no more tokens
LINEAR_PANEL = 128  # rows and columns of weights that a block takes at a time
LINEAR_COLUMNS = 64
TENSOR_HEAD_DIMS = (64, 128)


class CudaBackend:
    """Implements `losart.backends.base.Backend`.

    Parameters
    ----------
    config : ModelConfig
    dtype : {"float32", "bfloat16", "float16"}
        In which weights, keys and values are held.
    """

    name = "cuda"
    sparse = False

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        self.config = config
        self.dtype = dtype
        self._stream = cupy.cuda.Stream(non_blocking=True)
        # What passes allocate from: its blocks are never handed to anyone else, so that the
        # addresses in captured graphs stay good.
        self._pool = cupy.cuda.MemoryPool()
        self._staging = cupy.cuda.alloc_pinned_memory(STAGING_BYTES)
        self._passes: dict[Hashable, CapturedPass] = {}
        frequencies, self._rope_factor = inverse_frequencies(config.rope, config.head_dim)
        self._inputs = DeviceInputs()
        with self._stream:
            self._frequencies = cupy.asarray(frequencies)
            self._length = cupy.zeros(1, np.int32)
            chunks = -(-config.max_positions // chunk_positions(16)) + 2
            self._chunks = cupy.zeros((2, chunks), np.uint64)
        self._table_in_place: Callable[[], CudaPageTable | None] = lambda: None
        self._chunks_in_place = 0
        device = cupy.cuda.Device().attributes
        self._processors = device["MultiProcessorCount"]
        self._shared_limit = device["MaxSharedMemoryPerBlockOptin"]
        self._tensor = dtype != "float32"

    def _launch(
        self,
        name: str,
        grid: tuple[int, ...],
        threads: int,
        *args: Any,
        shared: int = 0,
        defines: Defines = (),
    ) -> None:
        function = kernel(name, self.dtype, defines)
        if shared > function.max_dynamic_shared_size_bytes:
            function.max_dynamic_shared_size_bytes = shared
        function(grid, (threads,), args, shared_mem=shared)

    # -- weights and cache

    def upload(self, tensor: Any) -> Any:
        # All work on weights is on the one stream: an array that is freed may be used again at once.
        with self._stream:
            held = cupy.empty(tensor.shape, HELD_AS[self.dtype])
            source, out = tensor.array().reshape(-1), held.reshape(-1)
            piece = STAGING_BYTES // out.itemsize
            staging = np.frombuffer(self._staging, out.dtype, piece)
            for start in range(0, out.size, piece):
                values = source[start : start + piece]
                if tensor.dtype != self.dtype:
                    values = narrow(widen(values), self.dtype)
                staging[: len(values)] = values.view(out.dtype)
                out[start : start + piece].set(staging[: len(values)], stream=self._stream)
                self._stream.synchronize()
        del source, values
        tensor.release()
        return held

    def upload_vector(self, *tensors: Any) -> Any:
        with self._stream:
            return cupy.asarray(np.concatenate([widen(tensor.array()) for tensor in tensors]))

    def join(self, *weights: Any) -> Any:
        with self._stream:
            return weights[0] if len(weights) == 1 else cupy.concatenate(weights)

    def new_cache(self, page_size: int) -> PagedKVCache:
        table = CudaPageTable(self.config, page_size, chunk_positions(page_size), self.dtype, self._write)

        def allocate(shape: tuple[int, ...], dtype: str) -> Any:
            try:
                with self._stream:
                    return cupy.zeros(shape, HELD_AS[dtype])
            except cupy.cuda.memory.OutOfMemoryError as error:
                free, _ = cupy.cuda.runtime.memGetInfo()
                needed = int(np.prod(shape)) * np.dtype(HELD_AS[dtype]).itemsize
                raise MemoryError(f"{needed >> 20} MiB more are needed, {free >> 20} MiB are free") from error

        return PagedKVCache(table, allocate)

    # -- running

    def run_pass(
        self, shape: Hashable, inputs: PassInputs, cache: PagedKVCache, body: Callable[[Any], Any]
    ) -> Any:
        tokens = len(inputs.ids)
        cache.reserve(cache.length + tokens)
        with self._stream, cupy.cuda.using_allocator(self._pool.malloc):
            self._place(inputs, cache)
            key = (shape, tokens, cache.page_size)
            ids = self._inputs.ids(tokens)
            captured = self._passes.get(key)
            if captured is None:
                # By launches, which compiles the kernels and fills the pool; captured for next time.
                result = self._fetch(body(ids), inputs)
                self._passes[key] = CapturedPass(self._stream, body, ids)
                return result
            return self._fetch(captured.launch(), inputs)

    def run_prefill(self, ids: np.ndarray, cache: PagedKVCache, body: Callable[[Any], Any]) -> None:
        cache.reserve(cache.length + len(ids))
        with self._stream:
            self._place(PassInputs(ids), cache)
            body(self._inputs.ids(len(ids)))
            self._stream.synchronize()

    def _place(self, inputs: PassInputs, cache: PagedKVCache) -> None:
        """Bring the pass's inputs to where its kernels look for them."""
        self._inputs.set(inputs, self._stream)
        self._length.fill(cache.length)
        table: CudaPageTable = cache.table
        if self._table_in_place() is not table or self._chunks_in_place != len(table.chunks):
            addresses = [[array.data.ptr for array in kind] for kind in zip(*table.chunks, strict=True)]
            for row, values in zip(self._chunks, addresses, strict=False):
                row[: len(values)] = cupy.asarray(np.array(values, np.uint64))
            self._table_in_place, self._chunks_in_place = weakref.ref(table), len(table.chunks)

    def _fetch(self, given: Any, inputs: PassInputs) -> Proposals | None:
        if given is None:
            return None
        tokens, confidence, entropy, finite = (array[inputs.rows] for array in given.get())
        if not finite.all():
            raise NumericalError(NOT_FINITE)
        return Proposals(tokens.astype(np.int64), confidence.view(np.float32), entropy.view(np.float32))

    # -- transformer

    def embed(self, table: Any, ids: Any) -> Any:
        x = cupy.empty((len(ids), table.shape[1]), np.float32)
        self._launch("embedding", (len(ids),), 256, table, ids, x, np.int32(table.shape[1]))
        return x

    def linear(self, x: Any, matrix: Any, bias: Any | None = None) -> Any:
        tokens, inner = x.shape
        rows = len(matrix)
        y = cupy.empty((tokens, rows), np.float32)
        if self._tensor and tokens <= SKINNY_TOKENS and inner % 8 == 0:
            self._skinny_linear(x, matrix, bias, y)
            return y
        grid = (-(-rows // LINEAR_ROWS), -(-tokens // LINEAR_TOKENS))
        sizes = (np.int32(n) for n in (tokens, rows, inner, rows))
        self._launch("linear", grid, 32 * LINEAR_ROWS, x, matrix, bias if bias is not None else 0, y, *sizes)
        return y

    def _skinny_linear(self, x: Any, matrix: Any, bias: Any | None, y: Any) -> None:
        (tokens, inner), rows = x.shape, len(matrix)
        panels, tiles = -(-rows // LINEAR_PANEL), -(-tokens // 8)
        splits = self._linear_splits(panels, inner, tokens)
        split_inner = -(-inner // (splits * LINEAR_COLUMNS)) * LINEAR_COLUMNS
        splits = -(-inner // split_inner)
        whole = splits == 1 and bias is None
        parts = y if whole else cupy.empty((splits, tokens, rows), np.float32)
        defines = (("LINEAR_TILES", tiles),)
        self._launch(
            "linear_tensor",
            (panels, splits),
            256,
            *(x, matrix, parts),
            *(np.int32(n) for n in (tokens, rows, inner, split_inner)),
            shared=4 * (LINEAR_PANEL * LINEAR_COLUMNS * 2 + tiles * 8 * (LINEAR_COLUMNS + 4) * 4),
            defines=defines,
        )
        if not whole:
            self._launch(
                "sum_splits",
                (min(-(-tokens * rows // 256), 4 * self._processors),),
                256,
                *(parts, bias if bias is not None else 0, y),
                *(np.int32(n) for n in (splits, tokens, rows)),
                defines=defines,
            )

    def _linear_splits(self, panels: int, inner: int, tokens: int) -> int:
        """Splits of inner that leave the fewest processors idle, for the partial sums they cost."""

        def cost(splits: int) -> float:
            blocks = panels * splits
            idle = -(-blocks // self._processors) * self._processors / blocks
            partial_sums = 8 * tokens * splits / (2 * inner) if splits > 1 else 0.0
            return idle * (1.0 + partial_sums)

        return min(range(1, max(1, inner // (4 * LINEAR_COLUMNS)) + 1), key=cost)

    def add_rms_norm(self, x: Any, delta: Any | None, gain: Any) -> tuple[Any, Any]:
        total, y = cupy.empty_like(x), cupy.empty_like(x)
        self._launch(
            "add_rms_norm",
            (len(x),),
            256,
            *(x, delta if delta is not None else 0, gain, total, y),
            *(np.int32(x.shape[1]), np.float32(self.config.rms_norm_eps)),
        )
        return total, y

    def split_heads(self, qkv: Any, q_norm: Any, k_norm: Any, cache: PagedKVCache) -> tuple[Any, Any, Any]:
        c, tokens = self.config, len(qkv)
        q = cupy.empty((tokens, c.num_heads, c.head_dim), np.float32)
        k = cupy.empty((tokens, c.num_kv_heads, c.head_dim), np.float32)
        v = cupy.empty_like(k)
        self._launch(
            "split_heads",
            (tokens, c.num_heads + 2 * c.num_kv_heads),
            -(-c.head_dim // 64) * 32,
            *(qkv, q_norm, k_norm, self._frequencies, np.float32(self._rope_factor), self._length, q, k, v),
            *(np.int32(n) for n in (c.num_heads, c.num_kv_heads, c.head_dim)),
            np.float32(c.rms_norm_eps),
        )
        return q, k, v

    def silu_gate(self, gate_up: Any) -> Any:
        tokens, ffn = len(gate_up), gate_up.shape[1] // 2
        y = cupy.empty((tokens, ffn), np.float32)
        grid = (min(-(-tokens * ffn // 256), 1 << 16),)
        self._launch("silu_gate", grid, 256, gate_up, y, np.int32(tokens), np.int32(ffn))
        return y

    # -- attention

    def _cache_arguments(self, table: CudaPageTable, layer: int) -> tuple[Any, ...]:
        c = self.config
        sizes = (layer, c.num_kv_heads, table.positions_per_chunk, c.head_dim)
        return (self._chunks[0], self._length, *(np.int32(n) for n in sizes))

    def _write(self, table: CudaPageTable, layer: int, k: Any, v: Any) -> None:
        self._launch(
            "cache_write",
            (self.config.num_kv_heads,),
            -(-self.config.head_dim // 32) * 32,
            *self._cache_arguments(table, layer),
            *(self._chunks[1], np.int32(table.page_size), k, v, np.int32(len(k))),
        )

    @property
    def _attention_shared(self) -> int:
        dim = self.config.head_dim
        return 4 * (ROWS * dim + 2 * 32 * (dim + 1))

    def _row_tiles(self, tokens: int) -> int:
        return -(-tokens * self.config.group_size // ROWS)

    def causal_attention(self, q: Any, cache: PagedKVCache, layer: int, block_length: int) -> Any:
        o = cupy.empty_like(q)
        self._launch(
            "causal_attention",
            (self.config.num_kv_heads, self._row_tiles(len(q))),
            ATTENTION_THREADS,
            *(q, *self._cache_arguments(cache.table, layer), o),
            *(np.int32(n) for n in (len(q), self.config.num_heads, block_length)),
            shared=self._attention_shared,
        )
        return o

    def prefix_attention(self, q: Any, cache: PagedKVCache, layer: int) -> tuple[Any, Any]:
        tokens, heads, dim = q.shape
        if self._tensor and dim in TENSOR_HEAD_DIMS:
            return self._merge_parts(q, *self._prefix_attention_tensor(q, cache, layer))
        parts = max(1, 2 * self._processors // self.config.num_kv_heads)
        part_o = cupy.empty((parts, *q.shape), np.float32)
        tops, totals = (cupy.empty((parts, tokens, heads), np.float32) for _ in range(2))
        self._launch(
            "prefix_attention",
            (self.config.num_kv_heads, parts, self._row_tiles(tokens)),
            ATTENTION_THREADS,
            *(q, *self._cache_arguments(cache.table, layer), part_o, tops, totals),
            *(np.int32(tokens), np.int32(heads)),
            shared=self._attention_shared,
        )
        return self._merge_parts(q, part_o, tops, totals)

    def _prefix_attention_tensor(self, q: Any, cache: PagedKVCache, layer: int) -> tuple[Any, Any, Any]:
        tokens, heads, dim = q.shape
        kv_heads = self.config.num_kv_heads
        row_tiles = -(-tokens * self.config.group_size // 16)
        row_warps = next((n for n in (1, 2, 4) if n >= row_tiles), 8)
        key_warps = 4 if row_warps == 1 else max(1, 8 // row_warps)
        blocks = -(-row_tiles // row_warps)
        stage_bytes = 2 * 64 * dim * 2
        stages = min(6, self._shared_limit // stage_bytes)
        splits = max(1, self._processors // (kv_heads * blocks))
        parts = splits * key_warps
        part_o = cupy.empty((parts, *q.shape), np.float32)
        tops, totals = (cupy.empty((parts, tokens, heads), np.float32) for _ in range(2))
        self._launch(
            "prefix_attention_tensor",
            (kv_heads, splits, blocks),
            32 * row_warps * key_warps,
            *(q, *self._cache_arguments(cache.table, layer), part_o, tops, totals),
            *(np.int32(n) for n in (tokens, heads, stages)),
            shared=stages * stage_bytes,
            defines=(("HEAD_DIM", dim), ("ROW_WARPS", row_warps), ("KEY_WARPS", key_warps)),
        )
        return part_o, tops, totals

    def _merge_parts(self, q: Any, part_o: Any, tops: Any, totals: Any) -> tuple[Any, Any]:
        tokens, heads, dim = q.shape
        o, lse = cupy.empty_like(q), cupy.empty((tokens, heads), np.float32)
        self._launch(
            "merge_parts",
            (tokens, heads),
            -(-dim // 32) * 32,
            *(part_o, tops, totals, o, lse, np.int32(len(part_o)), np.int32(dim)),
        )
        return o, lse

    def block_attention(self, q: Any, k: Any, v: Any, o_prefix: Any, lse_prefix: Any) -> Any:
        o = cupy.empty_like(q)
        self._launch(
            "block_attention",
            (self.config.num_kv_heads, self._row_tiles(len(q))),
            ATTENTION_THREADS,
            *(q, k, v, o_prefix, lse_prefix, o),
            *(np.int32(n) for n in (len(q), self.config.num_heads, self.config.num_kv_heads, q.shape[2])),
            shared=self._attention_shared,
        )
        return o

    # -- sampling

    def propose(self, hidden: Any, inputs: PassInputs, head: Any, config: GenerationConfig) -> Any:
        logits = self.linear(hidden, head)
        rows, vocab = logits.shape
        given = cupy.empty((4, rows), np.int32)
        self._launch(
            "sample",
            (rows,),
            1024,
            *(logits, self._inputs.uniforms(rows), np.int32(vocab), np.int32(config.mask_token_id)),
            *(np.float32(config.temperature), np.int32(config.top_k), np.float32(config.top_p)),
            *(given[0], given[1], given[2], given[3]),
        )
        return given
