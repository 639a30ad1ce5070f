"""Tensor maps: matrices as the copy engine of compute capability 9.0 takes them (common/tensor_map.cuh)."""

from __future__ import annotations

import ctypes
from functools import lru_cache

from losart.errors import DeviceError
from losart.kernels_cu.constants import STEP_COLUMNS
from losart.kernels_cu.launch import driver, error_name

TYPES = {1: 0, 2: 1}  # CUtensorMapDataType by bytes of a value: UINT8 and UINT16 stand for any format
SWIZZLES = {64: 2, 128: 3}  # CUtensorMapSwizzle by bytes of a box's row
NOT_INTERLEAVED, PROMOTION_128_BYTES, ZEROS_OUTSIDE = 0, 2, 0
ALIGNMENT = 64  # of a map that the driver fills
CACHED_MAPS = 4096  # a model's weights and the activations that meet them need a few hundred


class TensorMap(ctypes.Structure):
    """A kernel's parameter, passed by value."""

    _fields_ = (("opaque", ctypes.c_uint64 * 16),)


@lru_cache(CACHED_MAPS)
def tensor_map(
    address: int,
    rows: int,
    columns: int,
    box_rows: int,
    itemsize: int = 2,
    box_bytes: int = 2 * STEP_COLUMNS,
) -> TensorMap:
    """A map of a matrix of 16-bit values or bytes on the device, for copies of boxes of `box_rows` rows.

    It describes where the matrix is, not what it holds, which may change.

    Parameters
    ----------
    address : int
        Of the contiguous matrix [rows, columns]; a multiple of 16.
    rows, columns : int
        A row's bytes are a multiple of 16.
    box_rows : int
        Up to 256.
    itemsize : {1, 2}
        Bytes of a value.
    box_bytes : {64, 128}
        Of a box's row.

    Raises
    ------
    DeviceError
        The driver refuses.
    """
    room = (ctypes.c_char * (ctypes.sizeof(TensorMap) + ALIGNMENT))()
    encoded = TensorMap.from_buffer(room, -ctypes.addressof(room) % ALIGNMENT)
    status = driver().cuTensorMapEncodeTiled(
        ctypes.byref(encoded),
        *(TYPES[itemsize], 2, ctypes.c_void_p(address)),
        (ctypes.c_uint64 * 2)(columns, rows),
        (ctypes.c_uint64 * 1)(itemsize * columns),  # bytes between rows
        (ctypes.c_uint32 * 2)(box_bytes // itemsize, box_rows),
        (ctypes.c_uint32 * 2)(1, 1),
        *(NOT_INTERLEAVED, SWIZZLES[box_bytes], PROMOTION_128_BYTES, ZEROS_OUTSIDE),
    )
    if status:
        raise DeviceError(f"a matrix [{rows}, {columns}] cannot be mapped: {error_name(status)}")
    return encoded
