"""The CPU backend: NumPy, and our own kernels for matmuls and attention. Arithmetic is float32."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import losart.backends.cpu.attention_kernels as kernels
import losart.backends.cpu.layer_kernels as layer_kernels
import losart.backends.cpu.plain_linear as plain_linear
import losart.backends.cpu.quantized_linear as quantized_linear
from losart.backends.base import (
    ExpertWeights,
    HostSelection,
    PassBody,
    PassOutput,
    Selection,
    Stack,
    StoredResults,
)
from losart.backends.cpu.convert import float32_rows, narrow, widen
from losart.backends.cpu.kv_index import PageTable, top_pages
from losart.backends.cpu.routing import route
from losart.backends.cpu.selector import Selector
from losart.config.model import ModelConfig
from losart.config.options import CHOICES
from losart.config.precision import QUANTIZED, Format, Precision
from losart.config.rope import inverse_frequencies, query_factors
from losart.engine.batch import PassBatch, PassKind
from losart.engine.kv_cache import PagedKVCache, chunk_positions
from losart.engine.sampling import Proposals, propose
from losart.errors import ConfigError, NumericalError
from losart.loaders.quantized.tensor import bits_of
from losart.loaders.safetensors_files import MappedTensor

BATCH_ROWS = 64  # of a pass over blocks: more gain nothing, since 16 rows and more are bound by arithmetic
UPLOADED_AT_ONCE = 1 << 20  # weights that are widened or packed


@dataclass(frozen=True, eq=False)
class Weight:
    """Matrices [out_i, in], joined along `out`.

    Attributes
    ----------
    matrices : tuple of arrays or QuantizedMatrix
        As they are held: mapped from the checkpoint's files where their format is the same, or quantized.
    format : Format
        Of arrays.
    """

    matrices: tuple[Any, ...]
    format: Format


@dataclass(frozen=True, eq=False)
class Slot:
    """One sequence's stored results.

    Attributes
    ----------
    queries, o : float32 [layers, tokens, heads, head_dim]
    lse : float32 [layers, tokens, heads]
    top_pages : dict of int to int32 [kv_heads, tokens or 1, group, any]
        By layer: pages of highest mass.
    """

    queries: np.ndarray
    o: np.ndarray
    lse: np.ndarray
    top_pages: dict[int, np.ndarray] = field(default_factory=dict)


class CpuBackend:
    """Implements `losart.backends.base.Backend`.

    Parameters
    ----------
    config : ModelConfig
    precision : Precision
        bfloat16 is held as its bits in uint16.
    deterministic : bool
        Whether sums must not depend on what else a pass has.
    """

    name = "cpu"
    float8_activations = False  # sums are of float32 numbers
    prefill_tokens = 512
    beside_tokens = 128
    max_sequences = 16
    batch_rows = BATCH_ROWS
    # Two blocks' rows are summed by the same kernel as one's, so that no rounding differs.
    riding_blocks: Container[int] = (
        *range(1, plain_linear.FEW_TOKENS // 2 + 1),
        *range(plain_linear.FEW_TOKENS + 1, BATCH_ROWS // 2 + 1),
    )

    def __init__(self, config: ModelConfig, precision: Precision, deterministic: bool = False) -> None:
        if config.head_dim % kernels.SLAB_POSITIONS:
            raise ConfigError(
                f"head_dim must be a multiple of {kernels.SLAB_POSITIONS} on the CPU, not {config.head_dim}"
            )
        self.config = config
        self.precision = precision
        self.deterministic = self.same_sums = deterministic
        self.selectors = dict.fromkeys(CHOICES["planner"], Selector())
        self._frequencies, self._rope_factor = inverse_frequencies(config.rope, config.head_dim)
        self._rotation: tuple[Hashable, np.ndarray, np.ndarray, np.ndarray | None] | None = None
        self._experts_used: list[int] = []  # in each layer of the pass that was begun last

    # -- weights, cache and stored results

    def free_bytes(self) -> int | None:
        return available_bytes(Path("/proc/meminfo"), Path("/sys/fs/cgroup"))

    def upload(self, *tensors: Any) -> Weight:
        return Weight(tuple(self._upload(tensor) for tensor in tensors), self.precision.weights)

    def upload_experts(self, gate_up: Stack, down: Stack) -> tuple[tuple[Weight, ...], tuple[Weight, ...]]:
        first, second = (tuple(self.upload(*tensors) for tensors in stack) for stack in (gate_up, down))
        return first, second

    def held(self, *tensors: Any) -> dict[str, int]:
        sizes, format = Counter[str](), self.precision.weights
        for tensor in tensors:
            if (form := _quantized_form(tensor)) is not None:
                sizes[tensor.dtype] += quantized_linear.nbytes_of(*form)
            else:
                sizes[format.name] += math.prod(tensor.shape) * format.itemsize
        return sizes

    def held_experts(self, gate_up: Stack, down: Stack) -> dict[str, int]:
        return self.held(*(tensor for tensors in (*gate_up, *down) for tensor in tensors))

    def _upload(self, tensor: Any) -> Any:
        format = self.precision.weights
        if (form := _quantized_form(tensor)) is not None:
            return _packed(tensor, form)
        if isinstance(tensor, MappedTensor) and tensor.dtype == format.name:
            return tensor.array()
        held, row = np.empty(tensor.shape, format.array), 0
        for values in float32_rows(tensor, UPLOADED_AT_ONCE):
            held[row : row + len(values)] = narrow(values, format)
            row += len(values)
        tensor.release()
        return held

    def upload_vector(self, *tensors: Any) -> np.ndarray:
        return np.concatenate([widen(tensor.array()) for tensor in tensors])

    def new_cache(self, page_size: int, expected: int | None = None) -> PagedKVCache:
        c, formats, positions = self.config, self.precision, chunk_positions(page_size, expected)
        sizes = c.num_layers, c.num_kv_heads, c.head_dim, page_size, positions
        table = PageTable(*sizes, formats.kv, formats.kv_operands)
        return PagedKVCache(table, lambda shape, format: np.zeros(shape, format.array))

    def new_slot(self, stored: StoredResults) -> Slot:
        c, tokens = self.config, stored.tokens if stored.attention else 0
        shape = (c.num_layers, tokens, c.num_heads)
        queries, o = (np.empty((*shape, c.head_dim), np.float32) for _ in range(2))
        return Slot(queries, o, np.empty(shape, np.float32))

    # -- running

    def begin(self, batch: PassBatch, body: PassBody, observe: bool = False) -> Callable[[], PassOutput]:
        self._experts_used = []
        proposals, reads = body.launch(batch)
        used = [] if batch.kind is PassKind.PREFILL else self._experts_used
        experts_used = sum(used) / len(used) if used else None
        counted = [
            _count_reads(group, of_group) for (group, _), of_group in zip(batch.groups(), reads, strict=False)
        ]
        positions, tokens = np.concatenate(counted, axis=1).tolist() if counted else ([], [])
        output = PassOutput(proposals, positions, tokens, reads if observe else (), experts_used)
        return lambda: output

    def on_host(self, selection: Selection, batch: PassBatch) -> list[HostSelection]:
        found = []
        for index, (_, rows) in enumerate(batch.rows()):
            tokens = _indices(rows) if selection.tokens is None else selection.tokens[index]
            pages = selection.pages[index]
            lists = [ids[:count] for ids, count in zip(pages.ids, pages.counts, strict=True)]
            change = None if selection.change is None else selection.change[index]
            found.append(HostSelection(tokens - rows.start, lists, change))
        return found

    # -- transformer

    def join(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate(arrays)

    def embed(self, table: Weight, batch: PassBatch) -> np.ndarray:
        return widen(table.matrices[0][np.concatenate([sequence.ids for sequence in batch.sequences])])

    def linear(self, x: np.ndarray, weight: Weight, bias: np.ndarray | None = None) -> np.ndarray:
        return self._product(x, weight, bias, self._few(prefill=False))

    def prefill_linear(self, x: np.ndarray, weight: Weight, bias: np.ndarray | None = None) -> np.ndarray:
        return self._product(x, weight, bias, self._few(prefill=True))

    def _product(
        self, x: np.ndarray, weight: Weight, bias: np.ndarray | None, few: bool | None
    ) -> np.ndarray:
        y = self._products([(x, weight)], few)
        if bias is not None:
            y += bias
        return y

    def _products(self, parts: Sequence[tuple[np.ndarray, Weight]], few: bool | None) -> np.ndarray:
        """Rows times weights of as many outputs, the results one after another; `few` as for `prepared`."""
        width = sum(map(len, parts[0][1].matrices))
        y, first = np.empty((sum(len(x) for x, _ in parts), width), np.float32), 0
        plain: list[tuple[Any, ...]] = []
        quantized: list[tuple[Any, ...]] = []
        for x, weight in parts:
            out, column, prepared = y[first : first + len(x)], 0, None
            for matrix in weight.matrices:
                if isinstance(matrix, np.ndarray):
                    prepared = plain_linear.prepared(x, few) if prepared is None else prepared
                    plain.append((prepared, matrix, weight.format.code, out, column))
                else:
                    quantized.append((x, matrix, out, column))
                column += len(matrix)
            first += len(x)
        plain_linear.multiply(plain)
        quantized_linear.multiply_all(quantized)
        return y

    def _few(self, prefill: bool) -> bool | None:
        """Which kernel multiplies: the one for few rows, that for many, or (None) as many as there are.

        Neither how many sequences share a pass nor how a prompt is cut into pieces must decide it.
        """
        return not prefill if self.deterministic else None

    def add_rms_norm(
        self, x: np.ndarray, delta: np.ndarray | None, gain: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        return layer_kernels.add_rms_norm(x, delta, gain, self.config.rms_norm_eps)

    def split_heads(
        self, qkv: np.ndarray, q_norm: np.ndarray | None, k_norm: np.ndarray | None, batch: PassBatch
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        c = self.config
        return layer_kernels.split_heads(
            *(qkv, c.num_heads, c.num_kv_heads, c.head_dim, q_norm, k_norm, c.rms_norm_eps),
            *self._rotation_of(batch),
        )

    def _rotation_of(self, batch: PassBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Cosines and sines, and factors of queries, if there are any."""
        # All layers of a pass ask for the same rows.
        key = tuple((sequence.prefix_length, len(sequence.ids)) for sequence in batch.sequences)
        rotation = self._rotation
        if rotation is None or rotation[0] != key:
            positions = np.concatenate([np.arange(start, start + tokens) for start, tokens in key])
            angles = positions[:, None] * self._frequencies
            cos = (self._rope_factor * np.cos(angles)).astype(np.float32)
            sin = (self._rope_factor * np.sin(angles)).astype(np.float32)
            rope = self.config.rope
            factors = query_factors(rope, positions) if rope.query_beta else None
            rotation = self._rotation = (key, cos, sin, factors)
        return rotation[1:]

    def gated_linear(self, x: np.ndarray, gate_up: Weight, prefill: bool) -> np.ndarray:
        linear = self.prefill_linear if prefill else self.linear
        return layer_kernels.gated(linear(x, gate_up))

    def experts(self, x: np.ndarray, layer: ExpertWeights, batch: PassBatch) -> np.ndarray:
        prefill = batch.kind is PassKind.PREFILL
        linear = self.prefill_linear if prefill else self.linear
        # How many of its rows an expert has must not decide how they are summed.
        few = self._few(prefill) if prefill else True
        chosen, weights = route(linear(x, layer.router), layer.bias, layer.config)
        order = np.argsort(chosen, axis=None, kind="stable")  # places, by expert
        used, starts = np.unique(chosen.reshape(-1)[order], return_index=True)
        self._experts_used.append(len(used))
        rows = order // layer.config.per_token

        def multiply(values: np.ndarray, experts: tuple[Weight, ...]) -> np.ndarray:
            split = np.split(values, starts[1:])
            return self._products([(x, experts[e]) for x, e in zip(split, used, strict=True)], few)

        y = multiply(layer_kernels.gated(multiply(x[rows], layer.gate_up)), layer.down)
        y *= weights.reshape(-1)[order, None]
        total = np.zeros_like(x)
        for places in np.argsort(rows, kind="stable").reshape(len(x), -1).T:  # of each token, by expert
            total += y[places]
        for expert in range(layer.config.count, len(layer.gate_up)):
            total += linear(layer_kernels.gated(linear(x, layer.gate_up[expert])), layer.down[expert])
        return total

    def write_kv(self, layer: int, k: np.ndarray, v: np.ndarray, batch: PassBatch) -> None:
        for sequence, rows in batch.rows():
            if not sequence.kind.denoises:
                sequence.cache.table.write(layer, sequence.prefix_length, k[rows], v[rows])

    # -- attention

    def causal_attention(self, layer: int, q: np.ndarray, batch: PassBatch) -> np.ndarray:
        o, length = np.empty_like(q), 1 if self.config.decoding.causal else batch.options.block_length
        for sequence, rows in batch.rows():
            table, start = sequence.cache.table, sequence.prefix_length
            kernels.attend_causal_blocks(table, layer, q[rows], start, length, o[rows])
        return o

    def prefix_attention(self, layer: int, q: np.ndarray, batch: PassBatch) -> tuple[np.ndarray, np.ndarray]:
        o, lse = _new_result(q)
        for sequence, rows in batch.rows():
            table, length = sequence.cache.table, sequence.prefix_length
            kernels.attend_pages(table, layer, q, _indices(rows), None, length, o, lse)
        return o, lse

    def prefix_attention_and_masses(
        self, layer: int, q: np.ndarray, batch: PassBatch
    ) -> tuple[tuple[np.ndarray, np.ndarray], list[np.ndarray]]:
        """The masses of each sequence that has a slot: float32 [kv_heads, tokens, group, pages]."""
        o, lse = _new_result(q)
        kv_heads, group = self.config.num_kv_heads, self.config.group_size
        masses = []
        for sequence, rows in batch.rows():
            tokens = rows.stop - rows.start
            where = sequence.cache.table, layer, q, _indices(rows), None, sequence.prefix_length, o, lse
            if sequence.slot is None:
                kernels.attend_pages(*where)
                continue
            page_slabs = sequence.cache.page_size // kernels.SLAB_POSITIONS
            slabs = sequence.pages * page_slabs
            tiles = -(-slabs * kernels.SLAB_POSITIONS // kernels.TILE_POSITIONS)
            sums = np.zeros((kv_heads, tokens * group, slabs), np.float32)
            tops = np.zeros((kv_heads, tokens * group, tiles), np.float32)
            kernels.attend_pages(*where, slab_sums=sums, tile_tops=tops)
            # A slab's sum is relative to its tile's maximum: bring it to the row's log-sum-exp.
            row_lse = lse[rows].reshape(tokens, kv_heads, group).transpose(1, 0, 2).reshape(kv_heads, -1, 1)
            factor = np.exp(tops - row_lse)
            sums *= np.repeat(factor, kernels.TILE_POSITIONS // kernels.SLAB_POSITIONS, axis=2)[:, :, :slabs]
            masses.append(sums.reshape(kv_heads, tokens, group, sequence.pages, page_slabs).sum(axis=-1))
        return (o, lse), masses

    def sparse_prefix_attention(
        self, layer: int, q: np.ndarray, selection: Selection, batch: PassBatch
    ) -> tuple[np.ndarray, np.ndarray]:
        o, lse = _new_result(q)
        for (sequence, rows), pages in zip(batch.rows(), selection.pages, strict=True):
            table, length = sequence.cache.table, sequence.prefix_length
            lists = (pages.ids, pages.counts)
            kernels.attend_pages(table, layer, q, _indices(rows), lists, length, o, lse)
        return o, lse

    def refresh_prefix_attention(
        self, layer: int, q: np.ndarray, selection: Selection, batch: PassBatch, *, store_queries: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        sizes = [(one.slot, len(one.ids)) for one in batch.sequences]  # a last block may be shorter
        stored = [(slot.o[layer, :tokens], slot.lse[layer, :tokens]) for slot, tokens in sizes]
        parts = zip(batch.rows(), stored, selection.tokens, selection.pages, strict=True)
        for (sequence, rows), (o, lse), tokens, pages in parts:
            table, length = sequence.cache.table, sequence.prefix_length
            lists = (pages.ids, pages.counts)
            kernels.attend_pages(table, layer, q[rows], tokens - rows.start, lists, length, o, lse)
            if store_queries:
                sequence.slot.queries[layer][tokens - rows.start] = q[tokens]
        return _joined([o for o, _ in stored]), _joined([lse for _, lse in stored])

    def block_attention(
        self,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        prefix: tuple[np.ndarray, np.ndarray],
        batch: PassBatch,
    ) -> np.ndarray:
        o_prefix, lse_prefix = prefix
        o_block, lse_block = _new_result(q)
        for _, rows in batch.rows():
            kernels.attend_block(q[rows], k[rows], v[rows], o_block[rows], lse_block[rows])
        # The block is never empty, so its log-sum-exp is finite; the prefix's may be -inf.
        layer_kernels.join_parts(o_prefix, lse_prefix, o_block, lse_block)
        return o_block

    # -- stored results

    def store_attention(
        self, layer: int, q: np.ndarray, prefix: tuple[np.ndarray, np.ndarray], batch: PassBatch
    ) -> tuple[np.ndarray, np.ndarray]:
        for sequence, rows in batch.rows():
            slot = sequence.slot
            if slot is not None:
                arrays = slot.queries, slot.o, slot.lse
                for array, value in zip(arrays, (q, *prefix), strict=True):
                    array[layer, : rows.stop - rows.start] = value[rows]
        return prefix

    def store_top_pages(
        self, layer: int, masses: list[np.ndarray], batch: PassBatch, count: int, *, summed: bool
    ) -> None:
        storing = [sequence for sequence in batch.sequences if sequence.slot is not None]
        for sequence, of_sequence in zip(storing, masses, strict=True):
            ranked = of_sequence.sum(axis=1, keepdims=True) if summed else of_sequence
            kv_heads, tokens, group, pages = ranked.shape
            ids = top_pages(ranked.reshape(kv_heads, tokens * group, pages), pages, count)
            sequence.slot.top_pages[layer] = ids.reshape(kv_heads, tokens, group, -1)

    # -- sampling

    def _logits(self, hidden: np.ndarray, head: Weight, batch: PassBatch) -> np.ndarray:
        """The proposing rows' logits, float32 [rows, vocab]."""
        proposing = [rows.start + row for sequence, rows in batch.rows() for row in sequence.proposed]
        logits, first = self.linear(hidden[proposing], head), 0
        for sequence in batch.sequences:
            logits[first : first + len(sequence.proposed), sequence.options.mask_token_id] = -np.inf
            first += len(sequence.proposed)
        return logits

    def propose(self, hidden: np.ndarray, head: Weight, batch: PassBatch) -> Proposals:
        logits = self._logits(hidden, head, batch)
        proposals = []
        first = 0
        for sequence in batch.sequences:
            if not len(sequence.proposed):
                continue
            of_sequence, options = logits[first : first + len(sequence.proposed)], sequence.options
            uniforms = None if sequence.uniforms is None else sequence.uniforms[sequence.proposed]
            kept = of_sequence.copy() if sequence.keeps_logits else None
            try:
                proposed = propose(
                    of_sequence,
                    uniforms,
                    temperature=sequence.temperature,
                    top_k=options.top_k,
                    top_p=options.top_p,
                    with_entropy=options.remasking == "entropy_bounded",
                )
            except NumericalError:
                proposed = Proposals.not_finite(len(of_sequence))
            proposals.append(proposed if kept is None else replace(proposed, logits=kept))
            first += len(sequence.proposed)
        return Proposals.joined(proposals)


def available_bytes(file: Path, group: Path) -> int | None:
    """Memory that the system, and what limits this process's group, can give to it; None: unknown.

    Pages of files count as free.
    """
    try:
        lines = file.read_text("ascii").splitlines()
    except OSError:
        return None
    found = (line.split() for line in lines if line.startswith("MemAvailable:"))
    free = next((int(words[1]) << 10 for words in found), None)
    with suppress(OSError, ValueError):  # no such limit, or none at all: "max"
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        return limit - used if free is None else min(free, limit - used)
    return free


def _quantized_form(tensor: Any) -> tuple[int, int, int, int, bool] | None:
    """What `QuantizedMatrix` takes; None where a matrix is held in the format of weights."""
    if tensor.dtype not in QUANTIZED["cpu"] or not tensor.in_order:
        return None
    if quantized_linear.block_of(tensor.shape[1], tensor.group, bits_of(tensor.dtype)) is None:
        return None
    return *tensor.shape, bits_of(tensor.dtype), tensor.group, tensor.uses_zeros


def _packed(tensor: Any, form: tuple[int, int, int, int, bool]) -> quantized_linear.QuantizedMatrix:
    """A checkpoint's matrix of that form, packed some rows at a time."""
    matrix = quantized_linear.QuantizedMatrix(*form)
    rows, columns, _, _, zeros = form
    step = max(1, UPLOADED_AT_ONCE // quantized_linear.ROWS // max(1, columns)) * quantized_linear.ROWS
    for start in range(0, rows, step):
        codes, scales, of_groups = tensor.rows(start, min(rows, start + step))
        matrix.fill(start, codes, scales, of_groups if zeros else None)
    tensor.release()
    return matrix


def _new_result(q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.empty_like(q), np.empty(q.shape[:2], np.float32)


def _count_reads(group: PassBatch, reads: Sequence[Selection | None]) -> np.ndarray:
    """Positions that sparse layers read, and tokens that read them: int64 [2, sequences]."""
    every = [len(sequence.ids) for sequence in group.sequences]
    read = np.zeros((2, len(every)), np.int64)
    for selection in reads:
        if selection is not None:
            reading = every if selection.tokens is None else list(map(len, selection.tokens))
            read += [[pages.positions for pages in selection.pages], reading]
    return read


def _indices(rows: slice) -> np.ndarray:
    return np.arange(rows.start, rows.stop, dtype=np.int32)


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
