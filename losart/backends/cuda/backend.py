"""The CUDA backend: CuPy arrays and our own kernels.

The residual stream, queries, keys and values of a block are float32. The host decides nothing by what is
selected, unless it selects itself (host_selector.py), so that a captured pass can be replayed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import replace
from typing import Any

import cupy
import numpy as np

from losart.backends.base import (
    ExpertWeights,
    HostSelection,
    PassBody,
    PassOutput,
    Selection,
    Selector,
    Stack,
    StoredResults,
)
from losart.backends.cuda.batch import DeviceBatch
from losart.backends.cuda.experts import Experts, check_experts, experts
from losart.backends.cuda.float8 import Float8Products
from losart.backends.cuda.host_selector import HostSelector
from losart.backends.cuda.kernels import Kernels
from losart.backends.cuda.matmul import blas_matmul
from losart.backends.cuda.matmul_plans import (
    dequantize_plan,
    embedding_plan,
    gated_matmul_plan,
    matmul_plan,
    quantized_plan,
    quantized_tokens,
    usual_splits,
)
from losart.backends.cuda.memory import DeviceMemory
from losart.backends.cuda.pages import CudaPageTable, DeviceArrays
from losart.backends.cuda.plans import (
    Card,
    Plan,
    block_plan,
    causal_plan,
    masses_plan,
    prefix_plan,
    sparse_plan,
    split_heads_plan,
)
from losart.backends.cuda.quantized import QuantizedWeight, expert_forms, quantized_form
from losart.backends.cuda.results import NO_MATMUL, NOTHING_STORED, Matmul, PrefixParts, Weight
from losart.backends.cuda.runner import PassRunner
from losart.backends.cuda.selector import DeviceSelector
from losart.backends.cuda.slots import Slot
from losart.backends.cuda.weights import WeightLoader
from losart.config.model import ModelConfig
from losart.config.precision import Format, Precision
from losart.config.rope import rotated_channels
from losart.engine.batch import PassBatch, PassKind
from losart.engine.kv_cache import PagedKVCache, chunk_positions
from losart.errors import ConfigError
from losart.kernels_cu import constants as cu
from losart.kernels_cu.tensor_map import tensor_map

LOGIT_SLICES, MANY_LOGIT_SLICES = 64, 16  # of a row of logits, each a thread block's, of few rows and many
MANY_LOGITS = 64  # rows
LOGIT_ROWS = 1024  # whose logits are held at a time
MOST_QUANTIZED_TOKENS = 256  # that are multiplied by quantized weights as they are, some at a time
ALIKE_TOKENS = 32  # up to which matmuls of 16 bits divide their sums alike (matmul_plan)
BATCH_ROWS = 1024
# With fewer rows, reading all experts takes most of the time.
EXPERTS_PREFILL_TOKENS, EXPERTS_BATCH_ROWS = 8192, 4096
MANY_NORM_THREADS = 256  # of add_rms_norm where there are more tokens than SMs


class CudaBackend:
    """Implements `losart.backends.base.Backend`.

    Parameters
    ----------
    config : ModelConfig
    precision : Precision
        Arrays of 16-bit formats hold their bits.
    deterministic : bool
        Whether sums must not depend on what else a pass has.

    Attributes
    ----------
    memory : DeviceMemory
    runner : PassRunner
    kernels : Kernels
    """

    name = "cuda"
    prefill_tokens = 2048
    beside_tokens = 384
    max_sequences = 128
    batch_rows = BATCH_ROWS
    # Two blocks' matmuls divide their sums as one's (ALIKE_TOKENS), those by codes mostly.
    riding_blocks: Container[int] = range(1, 17)

    def __init__(self, config: ModelConfig, precision: Precision, deterministic: bool = False) -> None:
        for name, unit in (("hidden_size", 4), ("intermediate_size", 4), ("head_dim", 8)):
            if getattr(config, name) % unit:
                raise ConfigError(f"{name} must be a multiple of {unit} on CUDA, not {getattr(config, name)}")
        if config.head_dim > cu.LARGEST_HEAD_DIM:
            raise ConfigError(
                f"head_dim must be {cu.LARGEST_HEAD_DIM} at most on CUDA, not {config.head_dim}"
            )
        if config.experts is not None:
            check_experts(config.experts)
            self.prefill_tokens, self.batch_rows = EXPERTS_PREFILL_TOKENS, EXPERTS_BATCH_ROWS
        if rotated_channels(config.rope, config.head_dim) % 8:
            raise ConfigError("partial_rotary_factor: rotated channels must be a multiple of 8 on CUDA")
        self.config = config
        self.precision = precision
        self.deterministic = deterministic
        self.memory = DeviceMemory()
        card = Card.of(self.memory.device)
        if cu.NORM_CHANNEL_BYTES * config.hidden_size > card.shared_per_block:
            raise ConfigError(f"hidden_size {config.hidden_size} is too large for this GPU's shared memory")
        self.kernels = Kernels(precision, card, deterministic)
        self.same_sums = self.kernels.same_sums
        self.float8_activations = self.kernels.float8_activations
        self._float8 = Float8Products(self.kernels)
        self.runner = PassRunner(self.memory, config, self.kernels)
        self._logits: Any | None = None
        self._loader = WeightLoader(self.kernels, self.memory.stream)
        with self.memory.running("the model"):
            self._device_selector = DeviceSelector(config, self.kernels)
        device, host = self._device_selector, HostSelector(config, self._device_selector)
        self.selectors: dict[str, Selector] = {"auto": device, "device": device, "host": host}

    # -- weights, cache and stored results

    def free_bytes(self) -> int | None:
        with self.memory.device:
            free, _ = cupy.cuda.runtime.memGetInfo()
        return int(free) + cupy.get_default_memory_pool().free_bytes()

    def upload(self, *tensors: Any) -> Weight | QuantizedWeight:
        with self.memory.running("the weights"):
            return self._loader.matrix(*tensors)

    def upload_experts(self, gate_up: Stack, down: Stack) -> tuple[Experts, Experts]:
        with self.memory.running("the weights"):
            return self._loader.experts(gate_up, down)

    def held(self, *tensors: Any) -> dict[str, int]:
        form = quantized_form(tensors, self.precision.weights, True, self.float8_activations)
        return self._plain(tensors) if form is None else {form.dtype: form.nbytes}

    def held_experts(self, gate_up: Stack, down: Stack) -> dict[str, int]:
        forms = expert_forms(gate_up, down, self.precision.weights, valid=True)
        if forms is None:
            return self._plain(tensor for tensors in (*gate_up, *down) for tensor in tensors)
        held = Counter[str]()
        for form in forms:
            held[form.dtype] += len(gate_up) * form.nbytes
        return held

    def _plain(self, tensors: Iterable[Any]) -> dict[str, int]:
        format = self.precision.weights
        return {format.name: sum(math.prod(tensor.shape) for tensor in tensors) * format.itemsize}

    def upload_vector(self, *tensors: Any) -> Any:
        with self.memory.running("the weights"):
            return self._loader.vector(*tensors)

    def new_cache(self, page_size: int, expected: int | None = None) -> PagedKVCache:
        positions = chunk_positions(page_size, expected)

        def allocate(shape: tuple[int, ...], format: Format) -> Any:
            with self.memory.running("the KV cache"):
                self.memory.prefill_pool.free_all_blocks()  # an interrupted prompt may have left some
                return cupy.zeros(shape, format.bits_array)

        with self.memory.running("the page table"):
            table = CudaPageTable(self.config, page_size, positions, self.precision)
        return PagedKVCache(table, allocate, DeviceArrays(self.memory))

    def new_slot(self, stored: StoredResults) -> Slot:
        with self.memory.running("stored results"):
            return Slot.empty(stored, self.config)

    # -- running

    def begin(self, batch: PassBatch, body: PassBody, observe: bool = False) -> Callable[[], PassOutput]:
        return self.runner.begin(batch, body, observe)

    def on_host(self, selection: Selection, batch: PassBatch) -> list[HostSelection]:
        c, stream, found = self.config, self.memory.stream, []
        active = None if selection.tokens is None else selection.tokens.get(stream=stream)
        change = None if selection.change is None else selection.change.get(stream=stream)
        for index, (sequence, rows) in enumerate(batch.rows()):
            tokens = None if active is None else active[index][active[index] >= 0]
            lists = selection.pages.on_host(
                index, sequence.slot, tokens, c.num_kv_heads, c.group_size, stream
            )
            read = np.arange(len(sequence.ids)) if tokens is None else tokens
            found.append(HostSelection(read, lists, None if change is None else change[rows]))
        return found

    # -- transformer

    def join(self, arrays: Sequence[Any]) -> Any:
        joined = cupy.empty((sum(map(len, arrays)), *arrays[0].shape[1:]), arrays[0].dtype)
        first = 0
        for array in arrays:
            part = joined[first : first + len(array)]
            part.data.copy_from_device_async(array.data, array.nbytes)
            first += len(array)
        return joined

    def embed(self, table: Weight | QuantizedWeight, batch: DeviceBatch) -> Any:
        hidden = table.view.inner
        x = cupy.empty((batch.tokens, hidden), np.float32)
        if isinstance(table, QuantizedWeight):
            plan = embedding_plan(table.form, batch.tokens)
            self.kernels.launch_plan(plan, table.view, batch.view, x)
            return x
        grid = (-(-hidden // cu.EMBEDDING_THREADS), batch.tokens)
        self.kernels.launch("embedding", grid, cu.EMBEDDING_THREADS, table.view, batch.view, x)
        return x

    def linear(self, x: Any, weight: Weight | QuantizedWeight, bias: Any | None = None) -> Matmul:
        if self._float8.take(weight, len(x)):
            return self._float8.linear(x, weight, bias)
        weight = self._for_tokens(weight, len(x))
        if isinstance(weight, QuantizedWeight):
            return self._linear_quantized(x, weight, bias)
        tokens, (rows, inner), kernels = len(x), weight.shape, self.kernels
        if not (kernels.deterministic and kernels.tensor_matmul) or inner % 8:
            return self._linear(x, weight, bias)
        if kernels.card.hopper:
            return self._linear(x, weight, bias, usual_splits(kernels.card, rows, inner))
        if tokens <= ALIKE_TOKENS:
            return self._linear(x, weight, bias)
        plan = matmul_plan(kernels.card, True, ALIKE_TOKENS, rows, inner)
        planes = cupy.empty((plan.parts, tokens, rows), np.float32)
        for first in range(0, tokens, ALIKE_TOKENS):
            count = min(ALIKE_TOKENS, tokens - first)
            plan = matmul_plan(kernels.card, True, count, rows, inner)
            to = planes[:, first:]
            kernels.launch_plan(plan, x[first:], weight.view, to, count, tokens, plan.share)
        return Matmul(planes, bias, -(-inner // cu.STEP_COLUMNS), plan.share)

    def _linear_quantized(self, x: Any, weight: QuantizedWeight, bias: Any | None) -> Matmul:
        form, tokens, most = weight.form, len(x), quantized_tokens(self.kernels.card, weight.form)
        same = self.deterministic
        plan = quantized_plan(self.kernels.card, form, min(tokens, most), same)
        planes = cupy.empty((plan.parts, tokens, form.rows), np.float32)
        for first in range(0, tokens, most):
            count = min(most, tokens - first)
            plan = quantized_plan(self.kernels.card, form, count, same)
            arguments = x[first:], weight.view, planes[:, first:], count, tokens, plan.share
            self.kernels.launch_plan(plan, *arguments)
        return Matmul(planes, bias, -(-form.inner // cu.QUANTIZED_UNIT), plan.share, cu.QUANTIZED_PANEL)

    def _for_tokens(self, weight: Weight | QuantizedWeight, tokens: int) -> Weight | QuantizedWeight:
        """A matrix as a matmul of so many tokens takes it: many are not bound by reading it."""
        stays = self.deterministic or tokens <= MOST_QUANTIZED_TOKENS
        return weight if stays or not isinstance(weight, QuantizedWeight) else self._dequantized(weight)

    def _dequantized(self, weight: QuantizedWeight) -> Weight:
        values = cupy.empty(weight.shape, np.uint16)
        self.kernels.launch_plan(dequantize_plan(weight.form), weight.view, values)
        return Weight(values, fresh=True)

    def prefill_linear(self, x: Any, weight: Weight | QuantizedWeight, bias: Any | None = None) -> Matmul:
        if self._float8.take(weight, len(x)):
            return self._float8.linear(x, weight, bias)
        weight = self._for_tokens(weight, len(x))
        if isinstance(weight, QuantizedWeight):
            return self._linear_quantized(x, weight, bias)
        kernels, splits = self.kernels, 1 if self.kernels.deterministic else None
        plan = matmul_plan(kernels.card, kernels.tensor_matmul, len(x), *weight.shape, splits)
        if len(x) > cu.SKINNY_TOKENS and plan.kernel != "linear_hopper" and not splits:
            y = blas_matmul(x, weight.values, self.precision.weights)
            if y is not None:
                return Matmul(y[None], bias)
        return self._linear(x, weight, bias, splits)

    def _linear(self, x: Any, weight: Weight, bias: Any | None, splits: int | None = None) -> Matmul:
        tokens, rows, inner = len(x), weight.view.rows, weight.view.inner
        plan = matmul_plan(self.kernels.card, self.kernels.tensor_matmul, tokens, rows, inner, splits)
        planes = cupy.empty((plan.parts, tokens, rows), np.float32)
        if plan.boxes:
            self._launch_hopper(plan, x, weight, planes)
            return Matmul(planes, bias, plan.parts)
        arguments, overlap = (x, weight.view, planes, tokens), not weight.fresh
        if plan.kernel == "linear_tensor":
            self.kernels.launch_plan(plan, *arguments, tokens, plan.share, overlap=overlap)
            return Matmul(planes, bias, -(-inner // cu.STEP_COLUMNS), plan.share)
        self.kernels.launch_plan(plan, *arguments, overlap=overlap)
        return Matmul(planes, bias)

    def _launch_hopper(self, plan: Plan, x: Any, weight: Weight, y: Any) -> None:
        boxes = zip((x, weight.values), plan.boxes, strict=True)
        maps = (tensor_map(matrix.data.ptr, *matrix.shape, box_rows) for matrix, box_rows in boxes)
        sizes = len(x), *weight.shape, plan.parts
        self.kernels.launch_plan(plan, *maps, y, *sizes, overlap=not weight.fresh)

    def add_rms_norm(self, x: Any, delta: Matmul | None, gain: Any) -> tuple[Any, Any]:
        tokens, hidden = x.shape
        total, y = cupy.empty_like(x), self._activations(x.shape)
        # Of many tokens several thread blocks at once hide each other's latency.
        many = tokens > self.kernels.card.sms and not self.kernels.same_sums
        most = MANY_NORM_THREADS if many else cu.NORM_MAX_THREADS
        self.kernels.launch(
            "add_rms_norm",
            (tokens,),
            min(most, -(-hidden // (4 * cu.WARP)) * cu.WARP),
            *(x, NO_MATMUL if delta is None else delta.view, gain, total, y, hidden),
            self.config.rms_norm_eps,
            shared=cu.NORM_CHANNEL_BYTES * hidden,
        )
        return total, y

    def split_heads(self, qkv: Matmul, q_norm: Any, k_norm: Any, batch: DeviceBatch) -> tuple[Any, Any, Any]:
        c, tokens = self.config, len(qkv)
        q = cupy.empty((tokens, c.num_heads, c.head_dim), np.float32)
        k = cupy.empty((tokens, c.num_kv_heads, c.head_dim), np.float32)
        v = cupy.empty_like(k)
        heads = c.num_heads + 2 * c.num_kv_heads
        self.kernels.launch_plan(
            split_heads_plan(tokens, heads, c.head_dim, len(qkv.planes) == 1),
            *(qkv.view, q_norm, k_norm, batch.view),
            *(q, k, v, c.num_heads, c.num_kv_heads, c.head_dim, rotated_channels(c.rope, c.head_dim)),
            *(c.rms_norm_eps, c.rope.query_beta, float(c.rope.original_max_positions or 1)),
        )
        return q, k, v

    def gated_linear(self, x: Any, gate_up: Weight | QuantizedWeight, prefill: bool) -> Any:
        kernels, tokens, (rows, inner) = self.kernels, len(x), gate_up.shape
        if self._float8.take(gate_up, tokens):
            y = self._float8.gated(x, gate_up)
            return self.silu_gate(self._float8.linear(x, gate_up, None)) if y is None else y
        gate_up = self._for_tokens(gate_up, tokens)
        if isinstance(gate_up, QuantizedWeight):
            return self.silu_gate(self._linear_quantized(x, gate_up, None))
        splits = None
        if kernels.deterministic and kernels.card.hopper:
            splits = 1 if prefill else usual_splits(kernels.card, rows, inner)
        plan = gated_matmul_plan(kernels.card, kernels.tensor_matmul, tokens, rows // 2, inner, splits)
        if plan is None:
            return self.silu_gate((self.prefill_linear if prefill else self.linear)(x, gate_up))
        y = self._activations((tokens, rows // 2))
        self._launch_hopper(plan, x, gate_up, y)
        return y

    def experts(self, x: Any, layer: ExpertWeights, batch: DeviceBatch) -> Matmul:
        prefill = batch.kind is PassKind.PREFILL
        logits = (self.prefill_linear if prefill else self.linear)(x, layer.router)
        return experts(self.kernels, x, logits, layer, prefill, batch.buffers.device.experts_used)

    def silu_gate(self, gate_up: Matmul) -> Any:
        """silu(gate) * up from the joined projections [tokens, 2 * ffn]."""
        tokens, ffn = len(gate_up), gate_up.rows // 2
        y, grid = self._activations((tokens, ffn)), (-(-ffn // (4 * cu.SILU_THREADS)), tokens)
        self.kernels.launch("silu_gate", grid, cu.SILU_THREADS, gate_up.view, y, ffn)
        return y

    def write_kv(self, layer: int, k: Any, v: Any, batch: DeviceBatch) -> None:
        c, shape = self.config, batch.shape
        groups = -(-shape.tokens // (shape.page_size * cu.GROUP_PAGES)) + 1
        stride = shape.per_cache * shape.tokens  # a commit that rides comes first
        channels = -(-c.head_dim // cu.WARP) * cu.WARP
        threads = channels * min(cu.GROUP_PAGES, cu.CACHE_WRITE_THREADS // channels)
        caches, of_caches = batch.caches_view(layer), (stride, shape.per_cache, batch.riding)
        if self.precision.kv.bits == 8:
            sizes, arguments = (shape.tokens, c.num_kv_heads), (caches, k, v, *of_caches)
            self.kernels.launch_rows("kv_quantize", *sizes, *arguments, caches=shape.caches)
        grid = (c.num_kv_heads, groups, shape.caches)
        self.kernels.launch("cache_write", grid, threads, caches, k, v, shape.tokens, *of_caches)

    def _activations(self, shape: tuple[int, ...]) -> Any:
        return cupy.empty(shape, self.precision.activations.bits_array)

    # -- attention

    def causal_attention(self, layer: int, q: Any, batch: DeviceBatch) -> Any:
        o, (tokens, heads, head_dim) = self._activations(q.shape), q.shape
        seen = 0 if self.deterministic else batch.sequences[0].prefix_length + tokens
        plan = causal_plan(*self._shape(tokens), seen)
        parts = PrefixParts.empty(plan.parts, tokens if plan.parts > 1 else 0, heads, head_dim)
        sizes = tokens, heads, 1 if self.config.decoding.causal else batch.options.block_length
        self.kernels.launch_plan(plan, q, batch.caches_view(layer), o, parts.view, *sizes)
        if plan.parts > 1:
            self.kernels.launch_rows("merge_parts", tokens, heads, parts.view, None, None, o, heads, head_dim)
        return o

    def prefix_attention(self, layer: int, q: Any, batch: DeviceBatch) -> PrefixParts:
        shape, (starts, owners) = batch.shape, batch.parts
        tokens, (_, heads, head_dim) = shape.per_cache * shape.tokens, q.shape
        plan = prefix_plan(*self._shape(tokens), shape.most_caches, self.kernels.same_sums)
        parts = PrefixParts.empty(plan.parts, tokens, heads, head_dim, shape.most_caches, starts)
        view = batch.caches_view(layer)
        counts = heads, shape.per_cache, shape.tokens
        self.kernels.launch_plan(plan, q, view, parts.view, owners, batch.riding, *counts)
        return parts

    def prefix_attention_and_masses(self, layer: int, q: Any, batch: DeviceBatch) -> tuple[PrefixParts, Any]:
        c, shape = self.config, batch.shape
        parts = self.prefix_attention(layer, q, batch)
        _, lse = self.merge(parts)
        tokens, units = shape.tokens, batch.max_pages * (shape.page_size // cu.MASS_UNIT)
        masses = cupy.empty((shape.caches, c.num_kv_heads, tokens, c.group_size, units), np.float32)
        plan, sizes = masses_plan(*self._shape(tokens), shape.caches), (tokens, c.num_heads, shape.per_cache)
        self.kernels.launch_plan(plan, q, lse, batch.caches_view(layer), masses, units, *sizes)
        return parts, masses

    def sparse_prefix_attention(
        self, layer: int, q: Any, selection: Selection, batch: DeviceBatch
    ) -> PrefixParts:
        c, tokens, pages, shape = self.config, selection.tokens, selection.pages, batch.shape
        count, sequences = shape.tokens if tokens is None else tokens.shape[1], shape.sequences
        if not count:
            return PrefixParts.empty(sequences, 0, c.num_heads, c.head_dim, sequences)
        words = batch.mark_words if pages.marks is None else 0
        size = pages.limit, shape.page_size, words
        plan = sparse_plan(*self._shape(count), *size, sequences, self.kernels.same_sums)
        starts = None if plan.share else cupy.empty(sequences + 1, np.int32)
        parts = PrefixParts.empty(plan.parts, count, c.num_heads, c.head_dim, sequences, starts)
        self.kernels.launch_plan(
            plan,
            *(q, tokens, batch.caches_view(layer), pages.view, plan.capacity, batch.reads),
            *(parts.view, c.num_heads, shape.tokens, sequences, plan.share),
        )
        return parts

    def refresh_prefix_attention(
        self, layer: int, q: Any, selection: Selection, batch: DeviceBatch, *, store_queries: bool
    ) -> PrefixParts:
        parts = self.sparse_prefix_attention(layer, q, selection, batch)
        return _stored(parts, selection.tokens, layer, batch, store_queries)

    def block_attention(self, q: Any, k: Any, v: Any, prefix: PrefixParts, batch: DeviceBatch) -> Any:
        c, (tokens, heads, head_dim) = self.config, q.shape
        o, fresh, shape = self._activations(q.shape), prefix.tokens, batch.shape
        fresh_count = 0 if fresh is None else fresh.shape[1]
        plan = block_plan(self.kernels.card, tokens, heads, shape.tokens, self.kernels.same_sums)
        self.kernels.launch_plan(
            plan,
            *(q, k, v, prefix.view, fresh, fresh_count),
            *(prefix.stored_queries, prefix.stored_o, prefix.stored_lse),
            *(o, batch.riding, shape.per_cache, shape.tokens, heads, c.num_kv_heads, head_dim),
        )
        return o

    def merge(self, parts: PrefixParts) -> tuple[Any, Any]:
        """o [tokens of all caches, heads, head_dim] and log-sum-exp [tokens, heads] of the parts."""
        tokens, heads, head_dim = parts.o.shape[1:]
        rows, caches = parts.caches * tokens, parts.caches
        o, lse = cupy.empty((rows, heads, head_dim), np.float32), cupy.empty((rows, heads), np.float32)
        args = (parts.view, o, lse, None, heads, head_dim)
        self.kernels.launch_rows("merge_parts", tokens, heads, *args, caches=caches)
        return o, lse

    def _shape(self, tokens: int) -> tuple[Card, int, int, int, int, int]:
        c, kernels = self.config, self.kernels
        return kernels.card, kernels.kv_bits, tokens, c.num_heads, c.num_kv_heads, c.head_dim

    # -- stored results

    def store_attention(self, layer: int, q: Any, prefix: PrefixParts, batch: DeviceBatch) -> PrefixParts:
        return _stored(prefix, None, layer, batch, True)

    def store_top_pages(
        self, layer: int, masses: Any, batch: DeviceBatch, count: int, *, summed: bool
    ) -> None:
        caches, kv_heads, tokens, group, units = masses.shape
        if not summed:
            masses = masses.reshape(caches, kv_heads, 1, tokens * group, units)
        _, _, count = batch.stored_pages_shape
        stored, units = batch.stored("top_pages", layer), batch.shape.page_size // cu.MASS_UNIT
        self._device_selector.rank(layer, masses, batch, count, units=units, stored=stored)

    # -- sampling

    def propose(
        self, hidden: Any, head: Weight | QuantizedWeight, batch: DeviceBatch
    ) -> tuple[Any, Any | None]:
        """The batch's results, and its logits if some sequence keeps them."""
        results, gathers = batch.buffers.results, batch.buffers.gathers
        rows, width = results.shape[1], hidden.shape[1]
        if gathers:
            gathered = self._activations((rows, width))
            grid = (-(-width // cu.GATHER_THREADS), rows)
            self.kernels.launch("gather_rows", grid, cu.GATHER_THREADS, hidden, batch.view, gathered, width)
        else:
            gathered = hidden[-rows:]
        many = rows > MANY_LOGITS and not self.kernels.same_sums
        count, vocab = MANY_LOGIT_SLICES if many else LOGIT_SLICES, self.config.vocab_size
        every = self._kept_logits(rows, vocab) if batch.keeps_logits else None
        for first in range(0, rows, LOGIT_ROWS if gathers else rows):
            some = gathered[first : first + LOGIT_ROWS] if gathers else gathered
            logits = self.linear(some, head)
            slices = cupy.empty((len(some), count, cu.LOGIT_ROW_BYTES), np.uint8)
            kept = None
            if every is not None:
                kept = every[first : first + len(some)]
            elif batch.samples:
                kept = cupy.empty((len(some), vocab), np.float32)
            self.kernels.launch(
                "logit_slices",
                (count, len(some)),
                cu.SLICE_THREADS,
                *(logits.view, batch.view, first, slices, kept),
                shared=16 * -(-vocab // (4 * count)),
            )
            arguments = slices, count, kept, vocab, batch.view, first, *results
            self.kernels.launch("sample", (len(some),), cu.SAMPLE_THREADS, *arguments)
        return results, every

    def _kept_logits(self, rows: int, vocab: int) -> Any:
        """Room for logits until they are fetched, one for all passes: captured ones hold on to it."""
        if self._logits is None or len(self._logits) < rows:
            self._logits = cupy.empty((1 << (rows - 1).bit_length(), vocab), np.float32)
        return self._logits[:rows]


def _stored(
    parts: PrefixParts, tokens: Any | None, layer: int, batch: DeviceBatch, store_queries: bool
) -> PrefixParts:
    """The parts, whose merged results are to be stored for these tokens (None: all)."""
    queries = batch.stored("queries", layer) if store_queries else NOTHING_STORED
    stored_o, stored_lse = batch.stored("o", layer), batch.stored("lse", layer)
    return replace(parts, tokens=tokens, stored_queries=queries, stored_o=stored_o, stored_lse=stored_lse)
