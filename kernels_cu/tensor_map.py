"""Tensor maps: matrices as the copy engine of compute capability 9.0 takes them (common/tensor_map.cuh)."""

from __future__ import annotations

import ctypes
from functools import lru_cache

from losart.errors import DeviceError
from losart.kernels_cu.constants import STEP_COLUMNS
from losart.kernels_cu.launch import driver, error_name

UINT16 = 1  # CUtensorMapDataType, for any format of 16 bits
NOT_INTERLEAVED, SWIZZLE_128_BYTES, PROMOTION_128_BYTES, ZEROS_OUTSIDE = 0, 3, 2, 0
ALIGNMENT = 64  # of a map that the driver fills
CACHED_MAPS = 4096  # a model's weights and the activations that meet them need a few hundred


class TensorMap(ctypes.Structure):
    """A kernel's parameter, passed by value."""

    _fields_ = (("opaque", ctypes.c_uint64 * 16),)


@lru_cache(CACHED_MAPS)
def tensor_map(address: int, rows: int, columns: int, box_rows: int) -> TensorMap:
    """A map of a matrix of 16-bit values on the device, for copies of boxes [box_rows, STEP_COLUMNS].

    It describes where the matrix is, not what it holds, which may change.

    Parameters
    ----------
    address : int
        Of the contiguous matrix [rows, columns]; a multiple of 16.
    rows, columns : int
        columns is a multiple of 8.
    box_rows : int
        Up to 256.

    Raises
    ------
    DeviceError
        The driver refuses.
    """
    room = (ctypes.c_char * (ctypes.sizeof(TensorMap) + ALIGNMENT))()
    encoded = TensorMap.from_buffer(room, -ctypes.addressof(room) % ALIGNMENT)
    status = driver().cuTensorMapEncodeTiled(
        ctypes.byref(encoded),
        *(UINT16, 2, ctypes.c_void_p(address)),
        (ctypes.c_uint64 * 2)(columns, rows),
        (ctypes.c_uint64 * 1)(2 * columns),  # bytes between rows
        (ctypes.c_uint32 * 2)(STEP_COLUMNS, box_rows),
        (ctypes.c_uint32 * 2)(1, 1),
        *(NOT_INTERLEAVED, SWIZZLE_128_BYTES, PROMOTION_128_BYTES, ZEROS_OUTSIDE),
    )
    if status:
        raise DeviceError(f"a matrix [{rows}, {columns}] cannot be mapped: {error_name(status)}")
    return encoded
