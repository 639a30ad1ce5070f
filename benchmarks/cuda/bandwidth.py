"""The memory's speed, which gives every figure its floor."""

from __future__ import annotations

import cupy
import numpy as np

from benchmarks.cuda.timing import graph_microseconds

BYTES = 4 << 30
copy_kernel = cupy.RawKernel(
    """
    extern "C" __global__ void copy(const uint4 *a, uint4 *b, long long count)
    {
        long long step = (long long)gridDim.x * blockDim.x;
        long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
        for (; i + 3 * step < count; i += 4 * step) {
            uint4 w = a[i], x = a[i + step], y = a[i + 2 * step], z = a[i + 3 * step];
            b[i] = w, b[i + step] = x, b[i + 2 * step] = y, b[i + 3 * step] = z;
        }
        for (; i < count; i += step) b[i] = a[i];
    }
    """,
    "copy",
)


def copy_bandwidth() -> float:
    """Bytes read plus bytes written a second by the faster of two large copies: a kernel's, the driver's."""
    a, b = (cupy.ones(BYTES // 4, np.float32) for _ in range(2))
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    sms = cupy.cuda.Device().attributes["MultiProcessorCount"]
    runtime = cupy.cuda.runtime

    def by_kernel() -> None:
        copy_kernel((16 * sms,), (512,), (a, b, np.int64(BYTES // 16)))

    def by_driver() -> None:
        runtime.memcpyAsync(b.data.ptr, a.data.ptr, BYTES, runtime.memcpyDeviceToDevice, stream.ptr)

    fastest = min(graph_microseconds(stream, copy, 1) for copy in (by_kernel, by_driver))
    return 2 * BYTES / (fastest * 1e-6)
