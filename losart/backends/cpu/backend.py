"""The CPU backend: NumPy and its BLAS, and our own attention kernels. Arithmetic is float32.

`dtype` is how weights, keys and values are held. bfloat16 is held as its bits in uint16.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

import losart.backends.cpu.attention_kernels as kernels
import losart.backends.cpu.skinny_linear as skinny_linear
from losart.backends.base import Memory, PassInputs
from losart.backends.cpu.active_set import query_change, select_active
from losart.backends.cpu.kv_index import PageTable, positions_in, union_of_top_pages
from losart.config.model import ModelConfig
from losart.config.options import GenerationConfig
from losart.config.rope import inverse_frequencies
from losart.engine.kv_cache import PagedKVCache, PageList, chunk_positions
from losart.engine.sampling import Proposals, propose
from losart.errors import ConfigError

HELD_AS = {"float32": np.float32, "bfloat16": np.uint16, "float16": np.float16}
SKINNY_ROWS = 64  # products of more rows go to BLAS
WIDEN_FLOATS = 1 << 20  # weights widened at a time: 4 MB, within a core's share of the cache


def widen(values: np.ndarray) -> np.ndarray:
    """Any held array as float32; float32 as it is."""
    if values.dtype == np.float32:
        return values
    out = np.empty(values.shape, np.float32)
    _widen_into(values, out)
    return out


def _widen_into(values: np.ndarray, out: np.ndarray, threads: bool = True) -> None:
    dtype = "bfloat16" if values.dtype == np.uint16 else "float16"
    kernels.widen_into(values.reshape(-1).view(np.uint16), out.reshape(-1), dtype, threads)


def narrow(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 as it is held in `dtype`, rounded to the nearest, ties to even."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return values.astype(HELD_AS[dtype], copy=False)
    bits = values.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


class CpuBackend:
    """Implements `losart.backends.base.Backend`.

    Parameters
    ----------
    config : ModelConfig
    dtype : {"float32", "bfloat16", "float16"}
        In which weights, keys and values are held.
    """

    name = "cpu"
    prefill_tokens = 512

    def __init__(self, config: ModelConfig, dtype: str) -> None:
        if config.head_dim % kernels.SLAB_POSITIONS:
            raise ConfigError(
                f"head_dim must be a multiple of {kernels.SLAB_POSITIONS} on the CPU, not {config.head_dim}"
            )
        self.config = config
        self.dtype = dtype
        frequencies, self._rope_factor = inverse_frequencies(config.rope, config.head_dim)
        self._frequencies = frequencies
        self._rotation: tuple[tuple[int, int], np.ndarray, np.ndarray] | None = None
        self._read = threading.local()  # positions that sparse attention read in a thread's pass

    # -- weights and cache

    def upload(self, *tensors: Any) -> tuple[np.ndarray, ...]:
        return tuple(self._upload(tensor) for tensor in tensors)

    def _upload(self, tensor: Any) -> np.ndarray:
        if tensor.dtype == self.dtype:
            return tensor.array()
        held = np.empty(tensor.shape, HELD_AS[self.dtype])
        source, out = tensor.array().reshape(-1), held.reshape(-1)
        for start in range(0, out.size, WIDEN_FLOATS):
            piece = slice(start, start + WIDEN_FLOATS)
            out[piece] = narrow(widen(source[piece]), self.dtype)
        del source
        tensor.release()
        return held

    def upload_vector(self, *tensors: Any) -> np.ndarray:
        return np.concatenate([widen(tensor.array()) for tensor in tensors])

    def new_cache(self, page_size: int, expected: int | None = None) -> PagedKVCache:
        c, positions = self.config, chunk_positions(page_size, expected)
        table = PageTable(c.num_layers, c.num_kv_heads, c.head_dim, page_size, positions, self.dtype)
        return PagedKVCache(table, lambda shape, dtype: np.zeros(shape, HELD_AS[dtype]))

    # -- running

    def run_pass(
        self, shape: Hashable, inputs: PassInputs, cache: PagedKVCache, body: Callable[[np.ndarray], Any]
    ) -> tuple[Any, int]:
        self._read.positions = 0
        return body(inputs.ids), self._read.positions

    def run_prefill(self, ids: np.ndarray, cache: PagedKVCache, body: Callable[[np.ndarray], Any]) -> None:
        body(ids)

    def to_host(self, array: np.ndarray) -> np.ndarray:
        return array

    def page_lists(self, pages: PageList) -> list[np.ndarray]:
        return [row[:count] for row, count in zip(pages.ids, pages.counts, strict=True)]

    # -- transformer

    def embed(self, table: tuple[np.ndarray], ids: np.ndarray) -> np.ndarray:
        return widen(table[0][ids])

    def linear(
        self, x: np.ndarray, matrix: tuple[np.ndarray, ...], bias: np.ndarray | None = None
    ) -> np.ndarray:
        y = np.empty((len(x), sum(len(weight) for weight in matrix)), np.float32)
        prepared = skinny_linear.prepared(x) if len(x) <= SKINNY_ROWS else None
        column = 0
        for weight in matrix:
            if prepared is not None:
                skinny_linear.multiply(prepared, weight, y, column)
            else:
                _blas_multiply(x, weight, y[:, column : column + len(weight)])
            column += len(weight)
        if bias is not None:
            y += bias
        return y

    def add_rms_norm(
        self, x: np.ndarray, delta: np.ndarray | None, gain: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        if delta is not None:
            x = x + delta
        return x, self._rms_norm(x, gain)

    def _rms_norm(self, x: np.ndarray, gain: np.ndarray) -> np.ndarray:
        mean_square = np.einsum("...d,...d->...", x, x)[..., None] / np.float32(x.shape[-1])
        mean_square[np.isinf(mean_square)] = np.nan  # or a row that overflows would come out as zeros
        y = x * (1.0 / np.sqrt(mean_square + np.float32(self.config.rms_norm_eps)))
        y *= gain
        return y

    def split_heads(
        self, qkv: np.ndarray, q_norm: np.ndarray, k_norm: np.ndarray, cache: PagedKVCache
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        c, tokens = self.config, len(qkv)
        q, k, v = np.split(
            qkv.reshape(tokens, -1, c.head_dim), [c.num_heads, c.num_heads + c.num_kv_heads], axis=1
        )
        cos, sin = self._rotation_of(cache.length, tokens)
        return (
            _rotate(self._rms_norm(q, q_norm), cos, sin),
            _rotate(self._rms_norm(k, k_norm), cos, sin),
            np.ascontiguousarray(v),
        )

    def _rotation_of(self, start: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        # All layers of a pass ask for the same rows.
        rotation = self._rotation
        if rotation is None or rotation[0] != (start, tokens):
            angles = np.arange(start, start + tokens)[:, None, None] * self._frequencies
            cos = (self._rope_factor * np.cos(angles)).astype(np.float32)
            sin = (self._rope_factor * np.sin(angles)).astype(np.float32)
            rotation = self._rotation = ((start, tokens), cos, sin)
        return rotation[1], rotation[2]

    def silu_gate(self, gate_up: np.ndarray) -> np.ndarray:
        gate, up = np.split(gate_up, 2, axis=1)
        # exp(-gate) = inf gives the right zero; what is not finite shows in the logits.
        with np.errstate(over="ignore", invalid="ignore"):
            y = np.exp(-gate)
            y += 1.0
            np.divide(gate, y, out=y)
            y *= up
        return y

    # -- attention

    def causal_attention(
        self, q: np.ndarray, cache: PagedKVCache, layer: int, block_length: int
    ) -> np.ndarray:
        o = np.empty_like(q)
        kernels.attend_causal_blocks(cache.table, layer, q, cache.length, block_length, o)
        return o

    def prefix_attention(
        self, q: np.ndarray, cache: PagedKVCache, layer: int
    ) -> tuple[np.ndarray, np.ndarray]:
        o, lse = _new_result(q)
        kernels.attend_pages(cache.table, layer, q, _all_tokens(q), None, cache.length, o, lse)
        return o, lse

    def planned(self, planner: str) -> CpuBackend:
        return self

    # No pass is replayed: what it leaves is kept as it is.

    def new_memory(self, purpose: Hashable) -> Memory:
        return Memory()

    def keep(self, memory: Memory, name: Hashable, array: np.ndarray) -> None:
        memory.arrays[name] = array

    def keep_prefix(self, memory: Memory, name: Hashable, prefix: tuple[np.ndarray, np.ndarray]) -> None:
        memory.arrays[name] = prefix

    def keep_masses(
        self,
        memory: Memory,
        name: Hashable,
        masses: np.ndarray,
        cache: PagedKVCache,
        count: int,
        summed: bool,
    ) -> None:
        memory.arrays[name] = masses.sum(axis=1, keepdims=True) if summed else masses

    def prefix_attention_and_masses(
        self, q: np.ndarray, cache: PagedKVCache, layer: int
    ) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
        o, lse = _new_result(q)
        kv_heads, group = self.config.num_kv_heads, self.config.group_size
        page_slabs = cache.page_size // kernels.SLAB_POSITIONS
        slabs = cache.pages * page_slabs
        tiles = -(-slabs * kernels.SLAB_POSITIONS // kernels.TILE_POSITIONS)
        sums = np.zeros((kv_heads, len(q) * group, slabs), np.float32)
        tops = np.zeros((kv_heads, len(q) * group, tiles), np.float32)
        kernels.attend_pages(
            cache.table, layer, q, _all_tokens(q), None, cache.length, o, lse, slab_sums=sums, tile_tops=tops
        )
        # A slab's sum is relative to its tile's maximum: bring it to the row's log-sum-exp.
        row_lse = lse.reshape(len(q), kv_heads, group).transpose(1, 0, 2).reshape(kv_heads, -1, 1)
        factor = np.exp(tops - row_lse)
        sums *= np.repeat(factor, kernels.TILE_POSITIONS // kernels.SLAB_POSITIONS, axis=2)[:, :, :slabs]
        masses = sums.reshape(kv_heads, len(q), group, cache.pages, page_slabs).sum(axis=-1)
        return (o, lse), masses

    def sparse_prefix_attention(
        self,
        q: np.ndarray,
        tokens: np.ndarray | None,
        pages: PageList,
        cache: PagedKVCache,
        layer: int,
        into: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        o, lse = into or _new_result(q)
        tokens = _all_tokens(q) if tokens is None else tokens
        self._read.positions = getattr(self._read, "positions", 0) + pages.positions
        kernels.attend_pages(cache.table, layer, q, tokens, (pages.ids, pages.counts), cache.length, o, lse)
        return o, lse

    def block_attention(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, prefix: tuple[np.ndarray, np.ndarray]
    ) -> np.ndarray:
        o_prefix, lse_prefix = prefix
        o_block, lse_block = _new_result(q)
        kernels.attend_block(q, k, v, o_block, lse_block)
        # The block is never empty, so its log-sum-exp is finite; the prefix's may be -inf.
        top = np.maximum(lse_prefix, lse_block)
        weight = np.exp(lse_prefix - top)
        weight /= weight + np.exp(lse_block - top)
        o = o_prefix - o_block
        o *= weight[..., None]
        o += o_block
        return o

    # -- selection

    def select_active(
        self,
        q: np.ndarray,
        previous: np.ndarray,
        count: int,
        candidates: np.ndarray | None = None,
        keep: bool = False,
    ) -> np.ndarray:
        change = query_change(q, previous)
        if keep:
            np.copyto(previous, q)
        if candidates is None:
            return select_active(change, count)
        return candidates[select_active(change[candidates], min(count, len(candidates)))]

    def copy_tokens(self, source: np.ndarray, tokens: np.ndarray, into: np.ndarray) -> None:
        into[tokens] = source[tokens]

    def select_pages(
        self, q: np.ndarray, tokens: np.ndarray | None, cache: PagedKVCache, layer: int, count: int
    ) -> PageList:
        tokens = _all_tokens(q) if tokens is None else tokens
        return _top_pages(kernels.bound_scores(cache.table, layer, q, tokens, cache.length), cache, count)

    def select_pages_by_mass(
        self, masses: np.ndarray, tokens: np.ndarray | None, cache: PagedKVCache, count: int
    ) -> PageList:
        if tokens is not None:
            masses = masses.take(tokens, axis=1)
        kv_heads, token_count, group, pages = masses.shape
        return _top_pages(masses.reshape(kv_heads, token_count * group, pages), cache, count)

    # -- sampling

    def propose(
        self, hidden: np.ndarray, inputs: PassInputs, head: tuple[np.ndarray, ...], config: GenerationConfig
    ) -> Proposals:
        logits = self.linear(hidden[inputs.rows], head)
        logits[:, config.mask_token_id] = -np.inf
        return propose(
            logits,
            inputs.uniforms[inputs.rows],
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            with_entropy=config.remasking == "entropy_bounded",
        )


def _top_pages(scores: np.ndarray, cache: PagedKVCache, count: int) -> PageList:
    """Top `count` pages of each row of scores [kv_heads, rows, pages], united per kv head."""
    ids, counts = union_of_top_pages(scores, cache.pages, min(count, cache.pages + 1))
    return PageList(ids, counts, positions_in(ids, counts, cache.page_size, cache.length))


def _blas_multiply(x: np.ndarray, weight: np.ndarray, out: np.ndarray) -> None:
    if weight.dtype == np.float32:
        np.matmul(x, weight.T, out=out)
        return
    step = max(1, WIDEN_FLOATS // weight.shape[1])
    wide = np.empty((min(step, len(weight)), weight.shape[1]), np.float32)
    for start in range(0, len(weight), step):
        piece = weight[start : start + step]
        # Threads of our own would go on spinning on the cores that BLAS wants next.
        _widen_into(piece, wide[: len(piece)], threads=False)
        np.matmul(x, wide[: len(piece)].T, out=out[:, start : start + step])


def _rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    # Halves, not pairs: channel d turns with channel d + head_dim / 2.
    first, second = np.split(x, 2, axis=-1)
    with np.errstate(invalid="ignore"):  # what is not finite shows in the logits
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _new_result(q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.empty_like(q), np.empty(q.shape[:2], np.float32)


def _all_tokens(q: np.ndarray) -> np.ndarray:
    return np.arange(len(q), dtype=np.int32)
