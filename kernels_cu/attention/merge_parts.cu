/* Merges the parts of attention into o [caches, tokens, heads, head_dim] and log-sum-exp [caches, tokens, heads]; over
 * an empty prefix zeros and -inf. Or into `narrowed`, like o, for the matmul that follows. One warp per row; head_dim
 * is a multiple of 4.
 *
 * Grid: (parts.tokens, heads / WARP_ROWS, caches). Must read the parts once. */
extern "C" __global__ void __launch_bounds__(WARP_ROWS_THREADS)
    merge_parts(PartsView parts, float *o, float *lse, Activation *narrowed, int heads, int head_dim)
{
    wait_for_previous(); /* before the next kernel starts, since block_attention may follow: common/overlap.cuh */
    let_next_start();
    int head = blockIdx.y * WARP_ROWS + threadIdx.x / WARP, pieces = head_dim / 4;
    if (head >= heads) return;
    size_t row = (size_t)blockIdx.x * heads + head, rows = (size_t)parts.tokens * heads;
    if (!narrowed) o += blockIdx.z * rows * head_dim, lse += blockIdx.z * rows;
#pragma unroll 1
    for (int first = 0; first < pieces; first += WARP) {
        int piece = first + threadIdx.x % WARP;
        RowResult merged = merge_row(parts, blockIdx.z, row, rows, min(piece, pieces - 1), head_dim);
        if (piece >= pieces) continue;
        if (narrowed)
            store4(narrowed + (blockIdx.z * rows + row) * head_dim + piece * 4, scaled(merged.sum, 1 / merged.total));
        else
            store_merged(o, lse, row, piece, head_dim, merged);
    }
}
