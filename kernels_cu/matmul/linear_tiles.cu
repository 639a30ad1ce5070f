/* y [tokens, rows] = x [tokens, inner] times the transposed weight [rows, inner] on tensor cores, for many tokens: a
 * thread block has a tile of TILE_TOKENS tokens and TILE_ROWS rows, a warp 64 and 32 of them.
 *
 * STEP_COLUMNS columns of both go through STAGES buffers of shared memory at a time, by asynchronous copies; their
 * 16-byte pieces are swizzled by row, so that ldmatrix has no bank conflicts. Columns past `inner` (a multiple of 8)
 * are zeros.
 *
 * Compiled with STAGES. Grid: (tokens / TILE_TOKENS, rows / TILE_ROWS): thread blocks that run together share weights.
 * Must do 2 * tokens * rows * inner operations. */
static_assert(TILE_TOKENS == 128 && TILE_ROWS == 128 && LINEAR_TILES_THREADS == 256, "8 warps of 64 by 32");
#define TILE_BYTES (TILE_ROWS * ROW_BYTES)

extern "C" __global__ void __launch_bounds__(LINEAR_TILES_THREADS)
    linear_tiles(const Activation *x, WeightView weight, float *y, int tokens)
{
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    wait_for_previous();
    let_next_start();
    unsigned shared = shared_address(shared_bytes);
    int rows = weight.rows, inner = weight.inner;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    int first_token = blockIdx.x * TILE_TOKENS, first_row = blockIdx.y * TILE_ROWS;
    int steps = (inner + STEP_COLUMNS - 1) / STEP_COLUMNS, warp_token = warp % 2 * 64, warp_row = warp / 2 * 32;

    auto load = [&](int step) {
        unsigned stage = shared + step % STAGES * 2 * TILE_BYTES;
        int piece = threadIdx.x % 8, k = step * STEP_COLUMNS + piece * 8;
        bool inside = k < inner;
        if (!inside) k = 0;
#pragma unroll
        for (int i = threadIdx.x / 8; i < TILE_ROWS; i += LINEAR_TILES_THREADS / 8) {
            /* Tokens and rows past the end repeat the last one; their sums are not written. */
            unsigned to = stage + place_for_matrices(i, piece);
            copy_16_bytes_async(to, x + (size_t)min(first_token + i, tokens - 1) * inner + k, inside);
            copy_16_bytes_async(to + TILE_BYTES, weight.data() + (size_t)min(first_row + i, rows - 1) * inner + k,
                                inside);
        }
    };
    start_copies<STAGES>(0, steps, load);

    float sum[4][4][4] = {};
    for (int step = 0; step < steps; step++) {
        advance_copies<STAGES>(step, steps, load);
        unsigned xs = shared + step % STAGES * 2 * TILE_BYTES;
        multiply_tiles(sum, xs, xs + TILE_BYTES, warp_token, warp_row);
    }
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int token = first_token + warp_token + m * 16 + g + j / 2 * 8;
                int row = first_row + warp_row + n * 8 + t * 2 + j % 2;
                if (token < tokens && row < rows) y[(size_t)token * rows + row] = sum[m][n][j];
            }
}
