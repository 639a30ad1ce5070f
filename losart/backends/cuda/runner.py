"""Runs passes: each is a CUDA graph, captured when it comes for the second time and replayed from then on.

A pass finds its ids, random numbers, the prefix's length and its stored results through buffers that stay in
place, so that a captured pass can be replayed for another sequence and as the prefix grows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import cupy
import numpy as np

from losart.backends.base import PassBody, PassOutput, Selection, StoredResults
from losart.backends.cuda.batch import BatchBuffers, DeviceBatch, GroupShape, group_shape
from losart.backends.cuda.kernels import Kernels
from losart.backends.cuda.memory import DeviceMemory
from losart.backends.cuda.plans import prefix_plan
from losart.backends.cuda.slots import Slot
from losart.config.model import ModelConfig
from losart.config.rope import inverse_frequencies, rotated_channels
from losart.engine.batch import PassBatch, PassKind
from losart.engine.sampling import Proposals
from losart.errors import OutOfMemoryError
from losart.kernels_cu.constants import ROTATION_THREADS

CAPTURED_PASSES = 64  # kept, those used last
KEPT_SHAPES = 1024  # of passes whose inputs have a place


@dataclass(frozen=True, eq=False)
class Launched:
    """What a pass gives; its arrays hold what the last run of it has written.

    Attributes
    ----------
    proposes, counts : bool
        Whether it proposes tokens, and counts what sparse attention reads.
    reads : list of list of Selection or None
        As of `PassOutput`; empty unless it is observed.
    graph : cupy.cuda.Graph, optional
        Replays it.
    logits : float32 [rows, vocab], optional
        Where some sequence keeps them.
    """

    proposes: bool
    counts: bool
    reads: list[list[Selection | None]]
    graph: Any = None
    logits: Any | None = None


class PassRunner:
    """Runs passes on the device.

    Parameters
    ----------
    memory : DeviceMemory
    config : ModelConfig
    kernels : Kernels

    Attributes
    ----------
    passes : dict
        The captured passes by their keys; None where one has been run once.
    """

    def __init__(self, memory: DeviceMemory, config: ModelConfig, kernels: Kernels) -> None:
        self._memory = memory
        self._config = config
        self._kernels = kernels
        self._buffers: OrderedDict[tuple[GroupShape, ...], BatchBuffers] = OrderedDict()
        self._scratch: dict[StoredResults, Slot] = {}
        frequencies, self._rope_factor = inverse_frequencies(config.rope, config.head_dim)
        with memory.running("the model"):
            self._frequencies = cupy.asarray(frequencies / np.pi)  # in half turns per position
        self.passes: OrderedDict[Hashable, Launched | None] = OrderedDict()
        memory.drop_graphs = self.passes.clear

    def begin(self, batch: PassBatch, body: PassBody, observe: bool = False) -> Callable[[], PassOutput]:
        """Launch one pass, as `losart.backends.base.Backend.begin` has it."""
        if batch.kind is PassKind.PREFILL:
            return self._prefill(batch, body)
        memory = self._memory
        with memory.running("a pass", memory.pass_pool):
            memory.prefill_pool.free_all_blocks()
            placed = self._filled(batch)
            launched = None if body.key is None else self._replay(placed, body, observe)
            if launched is None:  # launch by launch, which compiles the kernels and fills the pool
                launched = self._launch(placed, body, observe)
        return lambda: self._output(placed, launched)

    def place(self, batch: PassBatch) -> DeviceBatch:
        """Bring a pass's inputs to where its kernels look for them, on the current stream."""
        placed = self._filled(batch)
        self._launch_rotations(placed)
        return placed

    def _filled(self, batch: PassBatch) -> DeviceBatch:
        groups = [group for group, _ in batch.groups()]
        shapes = tuple(group_shape(group, self._config.max_positions) for group in groups)
        if batch.kind is PassKind.PREFILL:
            buffers = self._new_buffers(shapes)  # for this piece alone
        else:
            buffers = self._buffers.get(shapes) or self._kept_buffers(shapes)
        scratch = [self._scratch_slot(*group) for group in zip(groups, shapes, strict=True)]
        buffers.fill(batch, scratch, self._memory.stream)
        return DeviceBatch(batch, buffers)

    def _launch_rotations(self, batch: DeviceBatch) -> None:
        rotations, factor = batch.buffers.device.rotations, float(self._rope_factor)
        tokens, _, pairs = rotations.shape
        arguments = (self._frequencies, factor, batch.view, rotations, pairs)
        self._kernels.launch("rotations", (tokens,), ROTATION_THREADS, *arguments)

    def _kept_buffers(self, shapes: tuple[GroupShape, ...]) -> BatchBuffers:
        if len(self._buffers) == KEPT_SHAPES:  # graphs of theirs would write to what others are given
            self._buffers.clear()
            self.passes.clear()
        with self._memory.running("a pass's inputs"):
            buffers = self._buffers[shapes] = self._new_buffers(shapes)
        return buffers

    def _new_buffers(self, shapes: tuple[GroupShape, ...]) -> BatchBuffers:
        c, kernels, plans = self._config, self._kernels, []
        for shape in shapes:
            sizes = shape.per_cache * shape.tokens, c.num_heads, c.num_kv_heads, c.head_dim, shape.most_caches
            plans.append(prefix_plan(kernels.card, kernels.kv_bits, *sizes, kernels.same_sums))
        return BatchBuffers(shapes, plans, rotated_channels(c.rope, c.head_dim))

    def _scratch_slot(self, group: PassBatch, shape: GroupShape) -> int:
        """The address of a slot for the sequences that pad a group; 0 where none do, or it stores nothing."""
        slot = group.sequences[-1].slot
        if slot is None or shape.sequences == len(group.sequences):
            return 0
        if slot.stored not in self._scratch:
            with self._memory.running("stored results"):
                scratch = self._scratch[slot.stored] = Slot.empty(slot.stored, self._config)
                scratch.memory.data.memset_async(0, scratch.memory.nbytes, self._memory.stream)
        return self._scratch[slot.stored].address

    def _prefill(self, batch: PassBatch, body: PassBody) -> Callable[[], PassOutput]:
        memory = self._memory
        with memory.running("a piece of the prompt", memory.prefill_pool):
            placed = self.place(batch)
            body.launch(placed)

        def finish() -> PassOutput:
            with memory.running("a piece of the prompt"):
                memory.stream.synchronize()
            return PassOutput(None, (0,) * len(placed.sequences), (0,) * len(placed.sequences), ())

        return finish

    def _replay(self, batch: DeviceBatch, body: PassBody, observe: bool) -> Launched | None:
        """Replay a pass; None where it comes for the first time, or there is no memory to capture it."""
        passes = self.passes
        # An observed pass is captured for itself, since it keeps the arrays of its reads.
        key = body.key, observe, batch.buffers  # by identity, which is quicker to hash than their shapes
        captured = passes.get(key)
        if captured is None:
            if key in passes:
                purpose, pool = "a captured pass", self._memory.pass_pool
                with suppress(OutOfMemoryError), self._memory.running(purpose, pool):
                    captured = self._capture(batch, body, observe)
            passes[key] = captured
            if len(passes) > CAPTURED_PASSES:
                passes.popitem(last=False)
        passes.move_to_end(key)
        if captured is not None:
            captured.graph.launch(self._memory.stream)
        return captured

    def _capture(self, batch: DeviceBatch, body: PassBody, observe: bool) -> Launched:
        stream = self._memory.stream
        try:
            stream.begin_capture()
            launched = self._launch(batch, body, observe)
        finally:
            if stream.is_capturing():
                graph = stream.end_capture()
        return replace(launched, graph=graph)

    def _launch(self, batch: DeviceBatch, body: PassBody, observe: bool) -> Launched:
        """Launch a pass's kernels one by one."""
        self._launch_rotations(batch)
        proposals, reads = body.launch(batch)
        counts = any(selection is not None for of_group in reads for selection in of_group)
        logits = None if proposals is None else proposals[1]
        return Launched(proposals is not None, counts, reads if observe else [], logits=logits)

    def _output(self, batch: DeviceBatch, launched: Launched) -> PassOutput:
        """Fetch what the pass gives."""
        nothing, layers = (0,) * len(batch.sequences), self._config.expert_layers
        if not (launched.proposes or launched.counts or layers):
            return PassOutput(None, nothing, nothing, launched.reads)
        reads, results, used = batch.buffers.fetch(self._memory.stream)
        positions, reading = reads[batch.placed].T.tolist()
        experts_used = used / layers if layers else None
        if not launched.proposes:
            return PassOutput(None, positions, reading, launched.reads, experts_used)
        ids, confidence, entropy, finite = results[:, : batch.buffers.proposed_count]
        fields = ids.astype(np.int64), confidence.view(np.float32), entropy.view(np.float32), finite != 0
        kept = launched.logits
        logits = None if kept is None else batch.fetch_logits(kept, self._memory.stream)
        return PassOutput(Proposals(*fields, logits), positions, reading, launched.reads, experts_used)
