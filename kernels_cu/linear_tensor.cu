/* y [splits, tokens, rows] = x [tokens, inner] times weight [rows, inner] transposed, on tensor cores;
 * each split sums over its part of inner, a multiple of 32, and sum_splits adds them.
 *
 * A warp takes 16 weight rows as the A operand, straight from memory: which of inner's columns a
 * fragment's k stands for is free as long as both operands agree, so a lane reads 8 neighbouring
 * weights, 16 bytes. Tokens are the columns of B, 8 at a time, from shared memory.
 *
 * Grid: (rows / 128, splits), 256 threads; LINEAR_TILES = tokens / 8, 1 to 8. Must read rows * inner
 * weights once. */
#define STEP 32  /* of inner: two mma deep */
#define AHEAD 4  /* steps whose weights are under way */
#define PADDING 8

extern "C" __global__ void __launch_bounds__(256, LINEAR_TILES > 4 ? 2 : 3)
    linear_tensor(const float *x, const Held *weight, float *y, int tokens, int rows, int inner, int split_inner)
{
    extern __shared__ __align__(16) unsigned char shared_bytes[];
    Held *xs = (Held *)shared_bytes; /* [LINEAR_TILES * 8][split_inner + PADDING] */
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    int row = blockIdx.x * 128 + warp * 16 + g;
    int first = blockIdx.y * split_inner, count = min(split_inner, inner - first), steps = count / STEP;
    int stride = split_inner + PADDING;

    /* Rows past the end read the last one, and are not written. */
    const Held *low = weight + (size_t)min(row, rows - 1) * inner + first + t * 8;
    const Held *high = weight + (size_t)min(row + 8, rows - 1) * inner + first + t * 8;
    uint4 w[AHEAD][2];
#pragma unroll
    for (int s = 0; s < AHEAD; s++)
        if (s < steps) {
            w[s][0] = __ldcs((const uint4 *)(low + s * STEP));
            w[s][1] = __ldcs((const uint4 *)(high + s * STEP));
        }

    for (int i = threadIdx.x * 4; i < LINEAR_TILES * 8 * count; i += blockDim.x * 4) {
        int token = i / count, k = i % count;
        float4 value = token < tokens ? *(const float4 *)(x + (size_t)token * inner + first + k)
                                      : make_float4(0, 0, 0, 0);
        *(uint2 *)(xs + token * stride + k) = make_uint2(pack(value.x, value.y), pack(value.z, value.w));
    }
    __syncthreads();

    float sum[LINEAR_TILES][4] = {};
    for (int block = 0; block < steps; block += AHEAD) {
#pragma unroll
        for (int s = 0; s < AHEAD; s++) {
            if (block + s >= steps) continue;
            uint4 a = w[s][0], b = w[s][1];
            if (block + s + AHEAD < steps) {
                w[s][0] = __ldcs((const uint4 *)(low + (block + s + AHEAD) * STEP));
                w[s][1] = __ldcs((const uint4 *)(high + (block + s + AHEAD) * STEP));
            }
#pragma unroll
            for (int n = 0; n < LINEAR_TILES; n++) {
                uint4 v = *(const uint4 *)(xs + (n * 8 + g) * stride + (block + s) * STEP + t * 8);
                mma(sum[n], a.x, b.x, a.y, b.y, v.x, v.y);
                mma(sum[n], a.z, b.z, a.w, b.w, v.z, v.w);
            }
        }
    }
#pragma unroll
    for (int n = 0; n < LINEAR_TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int token = n * 8 + t * 2 + i % 2, r = row + i / 2 * 8;
            if (token < tokens && r < rows) y[((size_t)blockIdx.y * tokens + token) * rows + r] = sum[n][i];
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
