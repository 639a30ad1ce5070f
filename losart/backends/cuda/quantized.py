"""Matrices that stay codes with scales on the device: which ones can, and what they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from losart.config.precision import Format
from losart.kernels_cu import Defines
from losart.kernels_cu import constants as cu
from losart.kernels_cu.views import QuantizedView
from losart.loaders.quantized.tensor import bits_of

CODES = {"int4": cu.INT4, "int8": cu.INT8, "float8": cu.FLOAT8}


@dataclass(frozen=True)
class QuantizedForm:
    """How a matrix [rows, inner] of codes is held (kernels_cu/matmul/quantized.cuh).

    Attributes
    ----------
    rows, inner : int
    dtype : {"int4", "int8", "float8"}
    group : int
        Columns that share a scale, those that pad a row included where all do.
    zeros : bool
        Whether groups have zeros.
    wide_scales : bool
        Whether scales are float32, and not in the format of activations.
    """

    rows: int
    inner: int
    dtype: str
    group: int
    zeros: bool
    wide_scales: bool

    @property
    def bits(self) -> int:
        """Of a code."""
        return bits_of(self.dtype)

    @property
    def unit_groups(self) -> int:
        """Of a unit of linear_quantized, which may share its only one with others."""
        return max(1, cu.QUANTIZED_UNIT // self.group)

    @property
    def groups(self) -> int:
        """Of a row, with those that pad the last unit."""
        return ceil(self.inner / max(self.group, cu.QUANTIZED_UNIT)) * self.unit_groups

    @property
    def padded_rows(self) -> int:
        """With those that pad the last panel."""
        return _up(self.rows, cu.QUANTIZED_PANEL)

    @property
    def code_bytes(self) -> int:
        """That all codes take."""
        return self.padded_rows * _up(self.inner, cu.QUANTIZED_UNIT) * self.bits // 8

    @property
    def scale_bytes(self) -> int:
        """Of a group of a row, its zero included."""
        return (4 if self.wide_scales else 2) + 2 * self.zeros

    @property
    def nbytes(self) -> int:
        """That it takes."""
        return self.code_bytes + self.padded_rows * self.groups * self.scale_bytes

    @property
    def defines(self) -> Defines:
        """What kernels that look into its scales are compiled with."""
        return ("CODES", CODES[self.dtype]), ("WIDE_SCALES", int(self.wide_scales))


def is_compiled(dtype: str, group: int, zeros: bool, wide_scales: bool) -> bool:
    """Whether kernels take codes with such groups, zeros and scales: what checkpoints have."""
    if group % cu.QUANTIZED_UNIT and group != cu.STEP_COLUMNS:
        return group == cu.STEP_COLUMNS // 2 and dtype == "int4" and not wide_scales
    return not zeros or (dtype != "float8" and not wide_scales)


def quantized_form(
    tensors: Sequence[Any], format: Format, valid: bool = False, wide_float8: bool = False
) -> QuantizedForm | None:
    """How a checkpoint's matrices [out_i, in], joined along `out`, are held as codes.

    With `valid` codes that are NaN are not looked for, which takes reading all of them. With `wide_float8`
    scales of E4M3 codes are float32 whatever the files have, as linear_float8_hopper takes them. None where
    the matrices are not quantized, or not so that the kernels take them: those are held in `format`.
    """
    first = tensors[0]
    inner, dtype = first.shape[1], first.dtype
    if format.bits != 16 or dtype not in CODES or inner % 8:
        return None
    group = _group(first)
    if any(one.dtype != dtype or _group(one) != group or not one.in_order for one in tensors):
        return None
    if not valid and any(one.has_invalid_codes for one in tensors):
        return None
    zeros = any(one.uses_zeros for one in tensors)
    if zeros and not all(one.whole_zeros for one in tensors if one.uses_zeros):
        return None  # they are held in 16 bits
    wide = any(one.scale_dtype != format.name for one in tensors) or (wide_float8 and dtype == "float8")
    # Columns that pad a row must be 0.
    if not is_compiled(dtype, group, zeros, wide) or (zeros and inner % cu.QUANTIZED_UNIT):
        return None
    return QuantizedForm(sum(one.shape[0] for one in tensors), inner, dtype, group, zeros, wide)


def expert_forms(
    gate_up: Sequence[tuple[Any, ...]], down: Sequence[tuple[Any, ...]], format: Format, valid: bool = False
) -> tuple[QuantizedForm, QuantizedForm] | None:
    """How the two matrices of each expert are held as codes, all experts' alike; `valid` as above.

    None where some cannot: then all are held in `format`, as kernels multiply both by codes or neither.
    """
    forms = []
    for stack in (gate_up, down):
        form = quantized_form([tensor for tensors in stack for tensor in tensors], format, valid)
        if form is None:
            return None
        forms.append(replace(form, rows=form.rows // len(stack)))
    return forms[0], forms[1]


def _group(tensor: Any) -> int:
    """Columns that share a scale, as of `QuantizedForm`."""
    columns = tensor.shape[1]
    return tensor.group if tensor.group < columns else _up(columns, cu.QUANTIZED_UNIT)


def _up(count: int, unit: int) -> int:
    return ceil(count / unit) * unit


class QuantizedWeight:
    """A matrix [rows, inner] of codes on the device, or one of each of some experts, one after the other.

    Parameters
    ----------
    form : QuantizedForm
    codes : uint32 array
    scales : array
        float32, or the bits of activations' format.
    zeros : uint16 array, optional

    Attributes
    ----------
    view : QuantizedView
        As kernels take it: of experts the first one, which the others follow.
    """

    def __init__(self, form: QuantizedForm, codes: Any, scales: Any, zeros: Any | None) -> None:
        self.form = form
        self._arrays = codes, scales, zeros
        addresses = codes.data.ptr, scales.data.ptr, None if zeros is None else zeros.data.ptr
        self.view = QuantizedView(*addresses, form.rows, form.inner, form.group, form.groups)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, inner)"""
        return self.form.rows, self.form.inner

    @property
    def nbytes(self) -> int:
        """That it takes, experts all together."""
        return sum(array.nbytes for array in self._arrays if array is not None)
