/* y [tokens, rows] = x [tokens, inner] times weight [rows, inner] transposed on tensor cores, for many
 * tokens: a thread block has a tile of 128 tokens and 128 rows, a warp 64 and 32 of them.
 *
 * 64 columns of both at a time go through STAGES buffers of shared memory by asynchronous copies; their
 * 16-byte pieces are exchanged by row, so that ldmatrix meets no bank twice. Columns past `inner` (a
 * multiple of 8) are zeros.
 *
 * Compiled with STAGES. Grid: (tokens / 128, rows / 128), 256 threads: blocks that run together share
 * weights. Must do 2 * tokens * rows * inner operations. */
#define TILE 128
#define COLUMNS 64
#define TILE_BYTES (TILE * COLUMNS * 2)

__device__ __forceinline__ unsigned place(unsigned tile, int row, int piece)
{
    return tile + row * 128 + (piece ^ (row & 7)) * 16;
}

extern "C" __global__ void __launch_bounds__(256)
    linear_tiles(const Held *x, const Held *weight, float *y, int tokens, int rows, int inner)
{
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    wait_for_previous();
    let_next_start();
    unsigned shared = shared_address(shared_bytes);
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    int first_token = blockIdx.x * TILE, first_row = blockIdx.y * TILE, steps = (inner + COLUMNS - 1) / COLUMNS;
    int token_of_warp = warp % 2 * 64, row_of_warp = warp / 2 * 32;

    auto load = [&](int step) {
        unsigned stage = shared + step % STAGES * 2 * TILE_BYTES;
        int piece = threadIdx.x % 8, k = step * COLUMNS + piece * 8;
        bool there = k < inner;
        if (!there) k = 0;
#pragma unroll
        for (int i = threadIdx.x / 8; i < TILE; i += 32) {
            /* What is past the end is a copy of the last, and is not written. */
            copy_or_zero_16_bytes_async(place(stage, i, piece),
                                        x + (size_t)min(first_token + i, tokens - 1) * inner + k, there);
            copy_or_zero_16_bytes_async(place(stage + TILE_BYTES, i, piece),
                                        weight + (size_t)min(first_row + i, rows - 1) * inner + k, there);
        }
    };
    for (int step = 0; step < STAGES - 1; step++) {
        if (step < steps) load(step);
        commit_copies();
    }

    float sum[4][4][4] = {};
    for (int step = 0; step < steps; step++) {
        wait_copies<STAGES - 2>();
        __syncthreads();
        if (step + STAGES - 1 < steps) load(step + STAGES - 1);
        commit_copies();

        unsigned xs = shared + step % STAGES * 2 * TILE_BYTES, weights = xs + TILE_BYTES;
#pragma unroll
        for (int k = 0; k < COLUMNS / 16; k++) {
            unsigned a[4][4], b[2][4];
#pragma unroll
            for (int m = 0; m < 4; m++)
                load_matrices(a[m], place(xs, token_of_warp + m * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
            for (int n = 0; n < 2; n++)
                load_matrices(b[n], place(weights, row_of_warp + n * 16 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
#pragma unroll
            for (int m = 0; m < 4; m++)
#pragma unroll
                for (int n = 0; n < 4; n++)
                    mma(sum[m][n], a[m][0], a[m][1], a[m][2], a[m][3], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
        }
    }
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
        for (int n = 0; n < 4; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int token = first_token + token_of_warp + m * 16 + g + j / 2 * 8;
                int row = first_row + row_of_warp + n * 8 + t * 2 + j % 2;
                if (token < tokens && row < rows) y[(size_t)token * rows + row] = sum[m][n][j];
            }
}
