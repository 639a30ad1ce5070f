"""Runs passes: each is a CUDA graph, captured when it comes for the second time and replayed from then on.

A pass finds its ids, random numbers, the prefix's length and its stored results through buffers that stay in
place, so that a captured pass can be replayed for another sequence and as the prefix grows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from losart.backends.base import PassBody, PassOutput, Selection
from losart.backends.cuda.batch import BatchBuffers, DeviceBatch
from losart.backends.cuda.memory import DeviceMemory
from losart.backends.cuda.pages import PagesInPlace
from losart.engine.batch import PassBatch, PassKind
from losart.engine.sampling import NOT_FINITE, Proposals
from losart.errors import NumericalError, OutOfMemoryError

CAPTURED_PASSES = 32  # kept, those used last


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
    """

    proposes: bool
    counts: bool
    reads: list[list[Selection | None]]
    graph: Any = None


class PassRunner:
    """Runs passes on the device.

    Parameters
    ----------
    memory : DeviceMemory
    max_positions : int

    Attributes
    ----------
    passes : dict
        The captured passes by their keys; None where one has been run once.
    """

    def __init__(self, memory: DeviceMemory, max_positions: int) -> None:
        self._memory = memory
        self._buffers: dict[tuple[int, int], BatchBuffers] = {}
        with memory.running("the page table"):
            self._pages = PagesInPlace(max_positions)
        self.passes: OrderedDict[Hashable, Launched | None] = OrderedDict()
        memory.drop_graphs = self.passes.clear

    def run(self, batch: PassBatch, body: PassBody, observe: bool = False) -> PassOutput:
        """Run one pass, as `losart.backends.base.Backend.run` has it."""
        if batch.kind is PassKind.PREFILL:
            return self._prefill(batch, body)
        memory = self._memory
        with memory.running("a pass", memory.pass_pool):
            memory.prefill_pool.free_all_blocks()
            placed = self.place(batch)
            launched = None if body.key is None else self._replay(placed, body, observe)
            if launched is None:  # launch by launch, which compiles the kernels and fills the pool
                launched = _launch(placed, body, observe)
            return self._output(placed, launched)

    def place(self, batch: PassBatch) -> DeviceBatch:
        """Bring a pass's inputs to where its kernels look for them, on the current stream."""
        sequences, stream = batch.sequences, self._memory.stream
        if len(sequences) > 1 + batch.rides:
            raise NotImplementedError("a pass on CUDA has one sequence")
        shape = len(sequences), len(sequences[0].ids)
        if batch.kind is PassKind.PREFILL:
            buffers = BatchBuffers(*shape)  # for this piece alone
        else:
            buffers = self._buffers.get(shape) or self._new_buffers(shape)
        buffers.fill(batch, stream)
        self._pages.place(sequences[0].cache.table, stream)
        return DeviceBatch(batch, buffers, self._pages)

    def _new_buffers(self, shape: tuple[int, int]) -> BatchBuffers:
        with self._memory.running("a pass's inputs"):
            buffers = self._buffers[shape] = BatchBuffers(*shape)
        return buffers

    def _prefill(self, batch: PassBatch, body: PassBody) -> PassOutput:
        memory = self._memory
        with memory.running("a piece of the prompt", memory.prefill_pool):
            body.launch(self.place(batch))
            memory.stream.synchronize()
        return PassOutput((), (0,), (0,), ())

    def _replay(self, batch: DeviceBatch, body: PassBody, observe: bool) -> Launched | None:
        """Replay a pass; None where it comes for the first time, or there is no memory to capture it."""
        passes = self.passes
        # An observed pass is captured for itself, since it keeps the arrays of its reads.
        key = (body.key, observe, batch.tokens, batch.page_size, batch.chunk_positions)
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
            launched = _launch(batch, body, observe)
        finally:
            if stream.is_capturing():
                graph = stream.end_capture()
        return replace(launched, graph=graph)

    def _output(self, batch: DeviceBatch, launched: Launched) -> PassOutput:
        """Fetch what the pass gives."""
        if not launched.proposes and not launched.counts:
            return PassOutput((), (0,), (0,), launched.reads)
        *read, results = batch.buffers.fetch()
        # Commits that ride are dense.
        positions, reading = ((0, count) if batch.rides else (count,) for count in read)
        if not launched.proposes:
            return PassOutput((), positions, reading, launched.reads)
        tokens, confidence, entropy, finite = results[:, : len(batch.sequence.masked)]
        if not finite.all():
            return PassOutput((NumericalError(NOT_FINITE),), positions, reading, launched.reads)
        proposals = Proposals(tokens.astype(np.int64), confidence.view(np.float32), entropy.view(np.float32))
        return PassOutput((proposals,), positions, reading, launched.reads)


def _launch(batch: DeviceBatch, body: PassBody, observe: bool) -> Launched:
    """Launch a pass's kernels one by one."""
    proposals, reads = body.launch(batch)
    counts = any(selection is not None for of_group in reads for selection in of_group)
    return Launched(proposals is not None, counts, reads if observe else [])
