/* y = x [tokens, inner] times weight [rows, inner] transposed on tensor cores, for at most 64 tokens;
 * y is left as a Product (product.cuh).
 *
 * The weights are one long list of units, PANEL rows by COLUMNS columns each; a thread block takes
 * `share` of them in a row, so that all blocks read equally much and never stop reading: copies go
 * through STAGES buffers of shared memory, on to the next panel without a pause. A block adds its sums
 * of a panel to the plane that is its own. Columns past `inner` (a multiple of 8) are zeros.
 *
 * A warp takes 16 weight rows as the A operand; tokens are the columns of B, 8 at a time. Which of
 * inner's columns a fragment's k stands for is free as long as both operands agree: a lane reads 8
 * neighbouring columns, 16 bytes; these are swizzled by row so that a read meets no bank twice.
 *
 * Compiled with LINEAR_TILES = tokens / 8 and STAGES. Grid: units / share, 256 threads. Must read
 * rows * inner weights once. */
#define COLUMNS 64
#define X_ROWS (LINEAR_TILES * 8)
#define STAGE_BYTES ((PANEL + X_ROWS) * COLUMNS * 2)

__device__ __forceinline__ int place(int row, int piece)
{
    return row * 128 + (piece ^ ((row & 1) << 2 | (row & 7) >> 1)) * 16;
}

extern "C" __global__ void __launch_bounds__(256, 2)
    linear_tensor(const Held *x, const Held *weight, float *y, int tokens, int rows, int inner, int share)
{
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    int steps = (inner + COLUMNS - 1) / COLUMNS, panels = (rows + PANEL - 1) / PANEL;
    int first = blockIdx.x * share, units = min(share, panels * steps - first);

    auto load_weights = [&](int i) {
        unsigned stage = shared_address(shared_bytes + i % STAGES * STAGE_BYTES);
        int panel = (first + i) / steps, column = (first + i) % steps * COLUMNS;
        int piece = threadIdx.x % 8, k = column + piece * 8;
        bool there = k < inner;
#pragma unroll
        for (int row = threadIdx.x / 8; row < PANEL; row += 32) {
            /* Rows past the end read the last one, and are not written. */
            const Held *from = weight + (size_t)min(panel * PANEL + row, rows - 1) * inner + (there ? k : 0);
            copy_or_zero_16_bytes_async(stage + place(row, piece), from, there);
        }
    };
    auto load_x = [&](int i) {
        unsigned stage = shared_address(shared_bytes + i % STAGES * STAGE_BYTES);
        int piece = threadIdx.x % 8, k = (first + i) % steps * COLUMNS + piece * 8;
#pragma unroll
        for (int row = threadIdx.x / 8; row < X_ROWS; row += 32) {
            bool token = k < inner && row < tokens;
            const Held *from = token ? x + (size_t)row * inner + k : x;
            copy_or_zero_16_bytes_async(stage + place(PANEL + row, piece), from, token);
        }
    };
    for (int i = 0; i < min(STAGES - 1, units); i++) load_weights(i);
    wait_for_previous();
    let_next_start();
    for (int i = 0; i < STAGES - 1; i++) {
        if (i < units) load_x(i);
        commit_copies();
    }

    float sum[LINEAR_TILES][4] = {};
    for (int i = 0; i < units; i++) {
        wait_copies<STAGES - 2>();
        __syncthreads();
        if (i + STAGES - 1 < units) {
            load_weights(i + STAGES - 1);
            load_x(i + STAGES - 1);
        }
        commit_copies();

        const unsigned char *stage = shared_bytes + i % STAGES * STAGE_BYTES;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = warp * 16 + g, piece = half * 4 + t;
            uint4 a = *(const uint4 *)(stage + place(row, piece));
            uint4 b = *(const uint4 *)(stage + place(row + 8, piece));
#pragma unroll
            for (int n = 0; n < LINEAR_TILES; n++) {
                uint4 v = *(const uint4 *)(stage + place(PANEL + n * 8 + g, piece));
                mma(sum[n], a.x, b.x, a.y, b.y, v.x, v.y);
                mma(sum[n], a.z, b.z, a.w, b.w, v.z, v.w);
            }
        }
        if ((first + i + 1) % steps && i + 1 < units) continue;

        int panel = (first + i) / steps, plane = blockIdx.x - panel * steps / share;
#pragma unroll
        for (int n = 0; n < LINEAR_TILES; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int token = n * 8 + t * 2 + j % 2, row = panel * PANEL + warp * 16 + g + j / 2 * 8;
                if (token < tokens && row < rows) y[((size_t)plane * tokens + token) * rows + row] = sum[n][j];
                sum[n][j] = 0;
            }
    }
}
