/* The parts of prefix attention into o [tokens, heads, head_dim] and log-sum-exp [tokens, heads]; over
 * an empty prefix zeros and -inf. With `tokens`, the i-th of the parts' tokens goes to row tokens[i], and nowhere if
 * that is negative. A warp has a row; head_dim is a multiple of 4. Grid: (the parts' tokens, heads / 4), 128 threads.
 * Moves the parts in. */
extern "C" __global__ void __launch_bounds__(4 * WARP)
    merge_parts(PARTS_PARAMETERS, const int *tokens, float *o, float *lse, int heads, int head_dim)
{
    wait_for_previous(); /* first, since block_attention may follow: common.cuh */
    let_next_start();
    int token = tokens ? tokens[blockIdx.x] : blockIdx.x, head = blockIdx.y * 4 + threadIdx.x / WARP;
    if (token < 0 || head >= heads) return;
    Parts parts = PARTS_OF((size_t)gridDim.x * heads);
    size_t from = (size_t)blockIdx.x * heads + head, to = (size_t)token * heads + head;
    int pieces = head_dim / 4;
#pragma unroll 1
    for (int first = 0; first < pieces; first += WARP) {
        int piece = first + threadIdx.x % WARP;
        RowResult merged = parts.merge(from, min(piece, pieces - 1), head_dim);
        if (piece < pieces) store_merged(o, lse, to, piece, head_dim, merged);
    }
}
