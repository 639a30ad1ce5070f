/* Compiled with GATED, a kernel multiplies by joined gate and up projections, gates first, and its results are
 * silu(gate)
 * * up, narrowed for the matmul that follows; else they are float32, each place's times its weight. */
#if GATED
using Output = Activation;
#else
using Output = float;
#endif

/* Results of so many rows of an expert's weights. */
__device__ __forceinline__ int outputs_of(int rows) { return GATED ? rows / 2 : rows; }

/* Row r of a tile whose results begin at `first`, as a row of the expert's weights: eight gates, their ups, the next
 * eight gates and so on, so that a thread has both in the sums of tensor cores. Rows past the end repeat the last one.
 */
__device__ __forceinline__ int weight_row(int first, int r, int rows)
{
    if (!GATED) return min(first + r, rows - 1);
    return min(first + r / 16 * 8 + r % 8, rows / 2 - 1) + (r & 8 ? rows / 2 : 0);
}
