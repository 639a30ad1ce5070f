"""Passes as CUDA graphs, and the device buffers through which the host talks to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cupy
import numpy as np

from losart.backends.base import PassInputs


class CapturedPass:
    """A pass's launches, captured once and replayed with one launch.

    Parameters
    ----------
    stream : cupy.cuda.Stream
    body : callable
        Ids on the device to what the pass gives. It has run before: its kernels are compiled.
    ids : int32 [tokens], on the device
    """

    def __init__(self, stream: Any, body: Callable[[Any], Any], ids: Any) -> None:
        self._stream = stream
        try:
            stream.begin_capture()
            self._given = body(ids)
        finally:
            if stream.is_capturing():
                self._graph = stream.end_capture()

    def launch(self) -> Any:
        """Replay the pass; what it gives lies where it lay before."""
        self._graph.launch(self._stream)
        return self._given


class DeviceInputs:
    """What the host tells passes over so many tokens, in device memory that stays in place.

    Attributes
    ----------
    uniforms : float64 [tokens]
    length : int32 [1]
        Of the prefix.
    count : int32 [1]
        Masked rows.
    ids, rows : int32 [tokens]
        The block's ids; the masked rows, as many as there are.
    """

    def __init__(self, tokens: int) -> None:
        self._words = cupy.zeros(4 * tokens + 2, np.int32)
        self.uniforms, self.length, self.count, self.ids, self.rows = _fields(self._words, tokens)

    def set(self, inputs: PassInputs, length: int, stream: Any) -> None:
        """Copy a pass's inputs to the device, all at once."""
        words = np.zeros(self._words.shape, np.int32)
        uniforms, length_field, count, ids, rows = _fields(words, len(inputs.ids))
        uniforms[: len(inputs.uniforms)] = inputs.uniforms
        length_field[:], count[:], ids[:] = length, len(inputs.rows), inputs.ids
        rows[: len(inputs.rows)] = inputs.rows
        self._words.set(words, stream=stream)


def _fields(words: Any, tokens: int) -> tuple[Any, ...]:
    uniforms, rest = words[: 2 * tokens].view(np.float64), words[2 * tokens :]
    return uniforms, rest[:1], rest[1:2], rest[2 : 2 + tokens], rest[2 + tokens :]
