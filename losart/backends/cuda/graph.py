"""Passes as CUDA graphs, and the device buffers through which the host talks to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np

from losart.backends.base import PassInputs


@dataclass(frozen=True)
class CapturedPass:
    """A pass's launches, captured once and replayed with one launch; what it gives lies where it lay.

    Attributes
    ----------
    stream : cupy.cuda.Stream
    graph : cupy.cuda.Graph
    proposes, counts : bool
        Whether it proposes tokens, and whether it counts the positions that it reads.
    """

    stream: Any
    graph: Any
    proposes: bool
    counts: bool

    def launch(self) -> None:
        """Replay the pass."""
        self.graph.launch(self.stream)


def capture(stream: Any, body: Callable[[], Any]) -> tuple[Any, Any]:
    """A graph of what `body` launches, and what it gives. It has run before: its kernels are compiled."""
    try:
        stream.begin_capture()
        given = body()
    finally:
        if stream.is_capturing():
            graph = stream.end_capture()
    return graph, given


def outside_passes() -> Any:
    """A context in which arrays are made that outlive the pass.

    Captured passes go on using the memory that they were given, whoever has it since: of the passes'
    pool that may be other passes only.
    """
    return cupy.cuda.using_allocator(cupy.get_default_memory_pool().malloc)


class PassBuffers:
    """What host and device tell each other of passes over so many tokens, in memory that stays in place.

    Attributes
    ----------
    uniforms : float64 [tokens]
    length : int32 [1]
        Of the prefix.
    count : int32 [1]
        Masked rows.
    ids, rows : int32 [tokens]
        The block's ids; the masked rows, as many as there are.
    positions : int32 [1]
        That sparse attention has read in this pass.
    results : int32 [4, tokens]
        Of sampling.
    """

    def __init__(self, tokens: int) -> None:
        words = cupy.zeros(8 * tokens + 3, np.int32)
        # The positions are written from both sides.
        self._from_host, self._to_host = words[: 4 * tokens + 3], words[4 * tokens + 2 :]
        self.uniforms, self.length, self.count, self.ids, self.rows, self.positions = _fields(
            self._from_host, tokens
        )
        self.results = self._to_host[1:].reshape(4, tokens)

    def set(self, inputs: PassInputs, length: int, stream: Any) -> None:
        """Copy a pass's inputs to the device, all at once."""
        words = np.zeros(self._from_host.shape, np.int32)
        uniforms, length_field, count, ids, rows, _ = _fields(words, len(inputs.ids))
        uniforms[: len(inputs.uniforms)] = inputs.uniforms
        length_field[:], count[:], ids[:] = length, len(inputs.rows), inputs.ids
        rows[: len(inputs.rows)] = inputs.rows
        self._from_host.set(words, stream=stream)

    def get(self) -> tuple[int, np.ndarray]:
        """Positions and results, when the current stream has come so far."""
        words = self._to_host.get()
        return int(words[0]), words[1:].reshape(self.results.shape)


def _fields(words: Any, tokens: int) -> tuple[Any, ...]:
    uniforms, rest = words[: 2 * tokens].view(np.float64), words[2 * tokens :]
    return uniforms, rest[:1], rest[1:2], rest[2 : 2 + tokens], rest[2 + tokens : 2 + 2 * tokens], rest[-1:]
