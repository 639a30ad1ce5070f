/* How linear_tensor and linear_quantized leave their result for the kernel that reads it.
 *
 * Weights are taken in units of panel_rows rows and some columns, `steps` units per panel; thread block b took
 * units b * share, b * share + 1, ... The thread blocks that share a panel wrote their partial sums to planes
 * 0, 1, ... of planes [planes, tokens, rows]. A result that is whole has one step and share 1.
 *
 * Kernels that read planes are short: without batches of loads in flight they would wait for memory several times. */
#ifndef PLANE_BATCH
#define PLANE_BATCH 8
#endif

__device__ __forceinline__ int MatmulView::panel_planes(int panel) const
{
    return ((panel + 1) * steps - 1) / share - panel * steps / share + 1;
}

/* Each of first_rows, or with T = float4 the four rows that begin there, at a multiple of 4; loads are in flight
 * together. */
template <class T, int N>
__device__ __forceinline__ void MatmulView::at(int token, const int (&first_rows)[N], T (&sums)[N]) const
{
    const float *from = planes + (size_t)token * rows;
    size_t stride = (size_t)tokens * rows;
    int counts[N], largest_count = 0;
#pragma unroll
    for (int n = 0; n < N; n++) {
        sums[n] = bias ? *(const T *)(bias + first_rows[n]) : T{};
        counts[n] = panel_planes(first_rows[n] / panel_rows);
        largest_count = max(largest_count, counts[n]);
    }
    for (int first = 0; first < largest_count; first += PLANE_BATCH / N) {
        T batch[PLANE_BATCH / N][N];
#pragma unroll
        for (int i = 0; i < PLANE_BATCH / N; i++)
#pragma unroll
            for (int n = 0; n < N; n++)
                batch[i][n] = first + i < counts[n] ? *(const T *)(from + (first + i) * stride + first_rows[n]) : T{};
#pragma unroll
        for (int i = 0; i < PLANE_BATCH / N; i++)
#pragma unroll
            for (int n = 0; n < N; n++) accumulate(sums[n], batch[i][n]);
    }
}

template <class T> __device__ __forceinline__ T MatmulView::at(int token, int row) const
{
    T sums[1];
    at(token, {row}, sums);
    return sums[0];
}
