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
        Ids on the device to what the pass gives. It has run before: kernels are compiled, and the
        allocator has the blocks that it needs.
    ids : int32 [tokens], on the device
    """

    def __init__(self, stream: Any, body: Callable[[Any], Any], ids: Any) -> None:
        self._stream = stream
        stream.begin_capture()
        try:
            self._given = body(ids)
        finally:
            self._graph = stream.end_capture()

    def launch(self) -> Any:
        """Replay the pass; what it gives lies where it lay before."""
        self._graph.launch(self._stream)
        return self._given


class DeviceInputs:
    """Ids and random numbers of a pass, for each number of tokens in buffers that stay in place."""

    def __init__(self) -> None:
        self._ids: dict[int, Any] = {}
        self._uniforms: dict[int, Any] = {}

    def ids(self, tokens: int) -> Any:
        """int32 [tokens] on the device."""
        if tokens not in self._ids:
            self._ids[tokens] = cupy.zeros(tokens, np.int32)
        return self._ids[tokens]

    def uniforms(self, tokens: int) -> Any:
        """float64 [tokens] on the device."""
        if tokens not in self._uniforms:
            self._uniforms[tokens] = cupy.zeros(tokens, np.float64)
        return self._uniforms[tokens]

    def set(self, inputs: PassInputs, stream: Any) -> None:
        """Copy a pass's inputs to the device."""
        tokens = len(inputs.ids)
        self.ids(tokens).set(inputs.ids.astype(np.int32), stream=stream)
        if len(inputs.uniforms):
            self.uniforms(tokens).set(inputs.uniforms, stream=stream)
