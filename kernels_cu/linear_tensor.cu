/* y [splits, tokens, rows] = x [tokens, inner] times weight [rows, inner] transposed, on tensor cores;
 * each split sums over its part of inner, and sum_splits adds them.
 *
 * Weights go through STAGES buffers of shared memory by asynchronous copies, 128 rows of 64 columns
 * (a line of 128 bytes) at a time, so that copies are under way all the time. A warp takes 16 weight
 * rows as the A operand; tokens are the columns of B, 8 at a time. Which of inner's columns a
 * fragment's k stands for is free as long as both operands agree: a lane reads 8 neighbouring
 * columns, 16 bytes. Pieces of 16 bytes are swizzled by their row so that a read meets no bank twice.
 *
 * inner is a multiple of 8; columns past the end are zeros. Grid: (rows / 128, splits), 256 threads;
 * LINEAR_TILES = tokens / 8, 1 to 8. Must read rows * inner weights once. */
#define PANEL 128
#define COLUMNS 64
#define STAGES 4
#define X_STRIDE (COLUMNS + 4) /* floats: rows of x begin 16 bytes further on in the banks */
#define X_ROWS (LINEAR_TILES * 8)
#define STAGE_BYTES (PANEL * COLUMNS * 2 + X_ROWS * X_STRIDE * 4)

extern "C" __global__ void __launch_bounds__(256)
    linear_tensor(const float *x, const Held *weight, float *y, int tokens, int rows, int inner, int split_inner)
{
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    int first_row = blockIdx.x * PANEL, first = blockIdx.y * split_inner, last = min(first + split_inner, inner);
    int steps = (last - first + COLUMNS - 1) / COLUMNS;

    auto load = [&](int step) {
        unsigned char *stage = shared_bytes + step % STAGES * STAGE_BYTES;
        int column = first + step * COLUMNS;
#pragma unroll
        for (int i = threadIdx.x; i < PANEL * 8; i += 256) {
            int row = i / 8, piece = i % 8, k = column + piece * 8;
            /* Rows past the end read the last one, and are not written. */
            const Held *from = weight + (size_t)min(first_row + row, rows - 1) * inner + min(k, inner - 8);
            copy_or_zero_16_bytes_async(shared_address(stage + row * 128 + (piece ^ (row & 7)) * 16), from, k < last);
        }
        float *xs = (float *)(stage + PANEL * COLUMNS * 2);
        for (int i = threadIdx.x; i < X_ROWS * (COLUMNS / 4); i += 256) {
            int token = i / (COLUMNS / 4), k = column + i % (COLUMNS / 4) * 4;
            const float *from = x + (size_t)min(token, tokens - 1) * inner + min(k, inner - 4);
            copy_or_zero_16_bytes_async(shared_address(xs + token * X_STRIDE + k - column), from,
                                        k < last && token < tokens);
        }
    };
    for (int step = 0; step < STAGES - 1; step++) {
        if (step < steps) load(step);
        commit_copies();
    }

    float sum[LINEAR_TILES][4] = {};
    for (int step = 0; step < steps; step++) {
        wait_copies<STAGES - 2>();
        __syncthreads();
        if (step + STAGES - 1 < steps) load(step + STAGES - 1);
        commit_copies();

        const unsigned char *stage = shared_bytes + step % STAGES * STAGE_BYTES;
        const unsigned char *low = stage + (warp * 16 + g) * 128, *high = low + 8 * 128;
        const float *xs = (const float *)(stage + PANEL * COLUMNS * 2);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int piece = ((half * 4 + t) ^ g) * 16;
            uint4 a = *(const uint4 *)(low + piece), b = *(const uint4 *)(high + piece);
#pragma unroll
            for (int n = 0; n < LINEAR_TILES; n++) {
                const float *from = xs + (n * 8 + g) * X_STRIDE + half * 32 + t * 8;
                float4 v = *(const float4 *)from, w = *(const float4 *)(from + 4);
                mma(sum[n], a.x, b.x, a.y, b.y, pack(v.x, v.y), pack(v.z, v.w));
                mma(sum[n], a.z, b.z, a.w, b.w, pack(w.x, w.y), pack(w.z, w.w));
            }
        }
    }
#pragma unroll
    for (int n = 0; n < LINEAR_TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int token = n * 8 + t * 2 + i % 2, row = first_row + warp * 16 + g + i / 2 * 8;
            if (token < tokens && row < rows) y[((size_t)blockIdx.y * tokens + token) * rows + row] = sum[n][i];
        }
}

/* y [tokens, rows] = the sum of parts [splits, tokens, rows], plus bias [rows] or null.
 * Grid: over values. */
extern "C" __global__ void sum_splits(const float *parts, const float *bias, float *y, int splits, int tokens,
                                      int rows)
{
    size_t count = (size_t)tokens * rows;
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < count; i += (size_t)gridDim.x * blockDim.x) {
        float sum = bias ? bias[i % rows] : 0.0f;
        for (int split = 0; split < splits; split++) sum += parts[split * count + i];
        y[i] = sum;
    }
}
