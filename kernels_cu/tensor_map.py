"""Tensor maps: what the copy engine of compute capability 9.0 is told of a matrix (tensor_map.cuh)."""

from __future__ import annotations

import ctypes
from functools import lru_cache

from losart.errors import DeviceError
from losart.kernels_cu.launch import driver, error_name

BOX_COLUMNS = 64  # 128 bytes, a row of what wgmma reads
UINT16 = 1  # CUtensorMapDataType: bits, whatever they mean
NOT_INTERLEAVED, SWIZZLE_128_BYTES, PROMOTION_128_BYTES, ZEROS_OUTSIDE = 0, 3, 2, 0
ALIGNMENT = 64  # of a map that the driver is to fill
KEPT = 4096  # maps; a model's weights and what enters their products are a few hundred


class TensorMap(ctypes.Structure):
    """A kernel's parameter, passed by value."""

    _fields_ = (("opaque", ctypes.c_uint64 * 16),)


@lru_cache(KEPT)
def tensor_map(address: int, rows: int, columns: int, box_rows: int) -> TensorMap:
    """A map of a matrix of 16-bit values on the device, for copies of boxes of so many rows and 64 columns.

    It tells where the matrix is and no more of it: what lies there may change.

    Parameters
    ----------
    address : int
        Of the matrix [rows, columns], contiguous; a multiple of 16.
    rows, columns : int
        columns a multiple of 8.
    box_rows : int
        256 at most.

    Raises
    ------
    DeviceError
        The driver refuses.
    """
    room = (ctypes.c_char * (ctypes.sizeof(TensorMap) + ALIGNMENT))()
    made = TensorMap.from_buffer(room, -ctypes.addressof(room) % ALIGNMENT)
    status = driver().cuTensorMapEncodeTiled(
        ctypes.byref(made),
        *(UINT16, 2, ctypes.c_void_p(address)),
        (ctypes.c_uint64 * 2)(columns, rows),
        (ctypes.c_uint64 * 1)(2 * columns),  # bytes from a row to the next
        (ctypes.c_uint32 * 2)(BOX_COLUMNS, box_rows),
        (ctypes.c_uint32 * 2)(1, 1),
        *(NOT_INTERLEAVED, SWIZZLE_128_BYTES, PROMOTION_128_BYTES, ZEROS_OUTSIDE),
    )
    if status:
        raise DeviceError(f"a matrix [{rows}, {columns}] cannot be mapped: {error_name(status)}")
    return made
