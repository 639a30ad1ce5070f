"""Weights on their way from a checkpoint's mapped files to the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import cupy
import numpy as np

from losart.backends.base import Stack
from losart.backends.cpu.convert import float32_rows, narrow, widen
from losart.backends.cuda.experts import Experts, ExpertStack
from losart.backends.cuda.kernels import Kernels
from losart.backends.cuda.matmul_plans import pack_plan, quantize_plan
from losart.backends.cuda.quantized import QuantizedForm, QuantizedWeight, expert_forms, quantized_form
from losart.backends.cuda.results import Weight
from losart.errors import TensorError
from losart.loaders.safetensors_files import MappedTensor

STAGING_BYTES = 32 << 20  # of pinned memory
PADDING = {"int4": 0x88, "int8": 0x80, "float8": 0}  # a byte of codes that are 0
CODES_PIECE = 4 << 20  # codes that go to the device at a time


class WeightLoader:
    """Brings tensors to the current device piece by piece, so that the host never holds more than a few.

    Parameters
    ----------
    kernels : Kernels
    stream : cupy.cuda.Stream
        The current one. All work on weights is on it: an array that is freed may be used again at once.
    """

    def __init__(self, kernels: Kernels, stream: Any) -> None:
        self._kernels = kernels
        self._format = kernels.precision.weights
        self._stream = stream
        self._staging = cupy.cuda.alloc_pinned_memory(STAGING_BYTES)

    def matrix(self, *tensors: Any) -> Weight | QuantizedWeight:
        """Tensors [out_i, in] as one matrix [sum of out_i, in]."""
        form = quantized_form(tensors, self._format, wide_float8=self._kernels.float8_activations)
        if form is not None:
            return self._quantized(form, [tensors], False)
        rows = sum(tensor.shape[0] for tensor in tensors)
        values = cupy.empty((rows, tensors[0].shape[1]), self._format.bits_array)
        self._fill_rows(values, tensors)
        return Weight(values)

    def experts(self, gate_up: Stack, down: Stack) -> tuple[Experts, Experts]:
        """Tensors [out_i, in] of each expert as one matrix [sum of out_i, in] of each."""
        forms = expert_forms(gate_up, down, self._format)
        if forms is None:
            return self._experts(gate_up), self._experts(down)
        return self._quantized(forms[0], gate_up, True), self._quantized(forms[1], down, True)

    def _experts(self, stack: Stack) -> ExpertStack:
        shape = sum(tensor.shape[0] for tensor in stack[0]), stack[0][0].shape[1]
        values = cupy.empty((len(stack), *shape), self._format.bits_array)
        for of_expert, tensors in zip(values, stack, strict=True):
            self._fill_rows(of_expert, tensors)
        return ExpertStack(values)

    def _fill_rows(self, values: Any, tensors: Iterable[Any]) -> None:
        """Copy tensors [out_i, in] one below the other."""
        first = 0
        for tensor in tensors:
            self._fill(values[first : first + tensor.shape[0]].reshape(-1), tensor)
            first += tensor.shape[0]

    def vector(self, *tensors: Any) -> Any:
        """Tensors one after the other, in float32."""
        return cupy.asarray(np.concatenate([widen(tensor.array()) for tensor in tensors]))

    def _quantized(self, form: QuantizedForm, stack: Stack, alternate: bool) -> QuantizedWeight:
        """Matrices that each join some tensors: one below the other, or eight rows of each in turn."""
        shape = len(stack) * form.padded_rows, form.groups
        codes = cupy.empty(len(stack) * form.code_bytes // 4, np.uint32)
        scales = self._zeroed(shape, np.float32 if form.wide_scales else np.uint16)
        codes.data.memset_async(PADDING[form.dtype], codes.nbytes, self._stream)
        weight = QuantizedWeight(form, codes, scales, self._zeroed(shape, np.uint16) if form.zeros else None)
        for index, tensors in enumerate(stack):
            first = index * form.padded_rows
            for tensor in tensors:
                self._pack(weight, tensor, first, 8 * len(tensors) if alternate else 8)
                first += 8 if alternate else tensor.shape[0]
        self._stream.synchronize()
        return weight

    def _pack(self, weight: QuantizedWeight, tensor: Any, first: int, stride: int) -> None:
        """Bring a tensor's rows to where pack_quantized puts them, some at a time."""
        form, (rows, columns) = weight.form, tensor.shape
        step = max(8, CODES_PIECE // columns // 8 * 8)
        # What the device rounds comes as it is in the file.
        rounds = self._is_held(getattr(tensor, "source", None))
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            if rounds:
                piece = self._rounded(form, tensor, start, stop)
            else:
                arrays = rows_to_pack(form, tensor, start, stop)
                piece = tuple(None if array is None else cupy.asarray(array) for array in arrays)
            place = first + start // 8 * stride, stride, stop - start
            self._kernels.launch_plan(pack_plan(form, stop - start), *piece, weight.view, *place)
            tensor.release()

    def _zeroed(self, shape: Any, dtype: Any) -> Any:
        array = cupy.empty(shape, dtype)
        array.data.memset_async(0, array.nbytes, self._stream)
        return array

    def _rounded(self, form: QuantizedForm, tensor: Any, start: int, stop: int) -> tuple[Any, ...]:
        """What `rows_to_pack` gives, of a matrix of 16 bits, which the device rounds."""
        count = stop - start
        values = cupy.empty((count, form.inner), np.uint16)
        flat = values.reshape(-1)
        self._copy(flat, _cut(tensor.source.array(start, stop), self._piece(flat)), lambda: None)
        codes, scales = (
            cupy.empty(values.shape, np.int8),
            cupy.empty((count, form.inner // tensor.group), np.float32),
        )
        wrong = self._zeroed(1, np.int32)
        plan = quantize_plan(form, count)
        self._kernels.launch_plan(plan, values, codes, scales, wrong, count, form.inner, tensor.group)
        if wrong.get(self._stream)[0]:
            source = tensor.source
            raise TensorError(f"{source.file}: tensor {source.name!r} has values that are not finite")
        return codes, scales, None

    def _fill(self, out: Any, tensor: Any) -> None:
        """Copy a tensor through two halves of the staging memory: one is filled while the other is copied."""
        self._copy(out, self._pieces(tensor, self._piece(out)), tensor.release)
        tensor.release()

    def _piece(self, out: Any) -> int:
        """Numbers that half the staging memory has room for."""
        return STAGING_BYTES // 2 // out.itemsize

    def _copy(self, out: Any, pieces: Iterable[np.ndarray], copied_piece: Callable[[], None]) -> None:
        piece, start = self._piece(out), 0
        staging = np.frombuffer(self._staging, out.dtype, 2 * piece).reshape(2, piece)
        copied = [cupy.cuda.Event(disable_timing=True) for _ in range(2)]
        for turn, values in enumerate(pieces):
            half, end = turn % 2, start + values.size
            copied[half].synchronize()
            staging[half, : values.size] = values.view(out.dtype)
            out[start:end].set(staging[half, : values.size], stream=self._stream)
            copied[half].record(self._stream)
            start = end
            copied_piece()
        self._stream.synchronize()

    def _is_held(self, tensor: Any) -> bool:
        """Whether a file has it as it is held here."""
        return isinstance(tensor, MappedTensor) and tensor.dtype == self._format.name

    def _pieces(self, tensor: Any, size: int) -> Iterator[np.ndarray]:
        """A matrix as it is held, one after the other at most so many numbers."""
        if self._is_held(tensor):
            yield from _cut(tensor.array(), size)
        else:
            for rows in float32_rows(tensor, size):
                yield narrow(rows, self._format).reshape(-1)


def rows_to_pack(
    form: QuantizedForm, tensor: Any, start: int, stop: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Codes, scales and zeros of some rows as pack_quantized takes them.

    Returns
    -------
    codes : int8, or float8's bits, uint8 [rows, in]
    scales : float32 [rows, groups]
    zeros : float32 [rows, groups] or None
        None where the form has none: a file may have zeros that are all 0.
    """
    codes, scales, zeros = tensor.rows(start, stop)
    held = codes if codes.dtype.itemsize == 1 else codes.astype(np.int8)
    floats = zeros.astype(np.float32) if form.zeros and zeros is not None else None
    return np.ascontiguousarray(held), np.ascontiguousarray(scales), floats


def _cut(source: np.ndarray, size: int) -> Iterator[np.ndarray]:
    source = source.reshape(-1)
    for start in range(0, source.size, size):
        yield source[start : start + size]
