/* Attention of a block's queries over the paged prefix, split over the prefix, by a warpgroup's products;
 * parts as those of prefix_attention.cu, one a thread block.
 *
 * Compiled with COPY_THREADS = 32: registers are left for the thread blocks of the kernel that follows.
 * Grid: (kv_heads, splits, rows / BLOCK_ROWS). Since all rows of a kv head are in one block (up to 128), every key and value is read once. Must move
 * 2 * kv_heads * length * head_dim values. */
#define SUM_STRIDE (HEAD_DIM + 8) /* of a row of sums: rows of a warp do not meet in banks */
#define SLOT_FLOATS (64 * SUM_STRIDE + 2 * 64) /* a warpgroup's sums, tops and totals */

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    prefix_attention_hopper(const float *q, CACHE_PARAMETERS, float *o, float *tops, float *totals, int tokens,
                            int heads)
{
    CacheView cache = CACHE_VIEW;
    extern __shared__ __align__(1024) float shared[];
    Stages stages = {shared_address(shared)};
    int kv_head = blockIdx.x, part = blockIdx.y, parts = gridDim.y, group = heads / cache.kv_heads;
    int rows = tokens * group, length = *cache.length, tiles = (length + TILE - 1) / TILE;
    int first = (int)((long long)tiles * part / parts), last = (int)((long long)tiles * (part + 1) / parts);
    int first_row = blockIdx.z * BLOCK_ROWS;
    prepare(stages);
    if (threadIdx.x >= COMPUTE_THREADS) {
        /* The prefix was there before the pass began. */
        copy_tiles(stages, cache, kv_head, first, last);
    } else {
        HopperRows state;
        wait_for_previous();
        let_next_start();
        load_queries(state, stages, q, first_row, rows, kv_head, group, heads);
        state.limit[0] = state.limit[1] = length;
        attend(state, stages, first, last, length / TILE);

        /* Where the tiles were, each warpgroup leaves its sums; all threads add them up by rows. */
        named_barrier(1, COMPUTE_THREADS);
        int t = threadIdx.x % 4;
        float *sums = shared + threadIdx.x / GROUP * SLOT_FLOATS;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int row = threadIdx.x % GROUP / WARP * 16 + threadIdx.x % WARP / 4 + half * 8;
#pragma unroll
            for (int d = 0; d < HEAD_DIM / 8; d++)
                *(float2 *)(sums + row * SUM_STRIDE + d * 8 + t * 2) =
                    make_float2(state.sum[d * 4 + half * 2], state.sum[d * 4 + half * 2 + 1]);
            if (t == 0) {
                sums[64 * SUM_STRIDE + row] = state.top[half];
                sums[64 * SUM_STRIDE + 64 + row] = state.total[half];
            }
        }
        named_barrier(1, COMPUTE_THREADS);
#pragma unroll 4
        for (int i = threadIdx.x; i < BLOCK_ROWS * (HEAD_DIM / 4); i += COMPUTE_THREADS) {
            int row = i / (HEAD_DIM / 4), channel = i % (HEAD_DIM / 4) * 4, place = row % 64;
            if (first_row + row >= rows) break;
            const float *slots = shared + row / 64 * KEY_GROUPS * SLOT_FLOATS;
            float top = -INFINITE, total = 0;
            float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
            for (int s = 0; s < KEY_GROUPS; s++)
                top = fmaxf(top, slots[s * SLOT_FLOATS + 64 * SUM_STRIDE + place]);
            float base = top == -INFINITE ? 0.0f : top;
#pragma unroll
            for (int s = 0; s < KEY_GROUPS; s++) {
                const float *slot = slots + s * SLOT_FLOATS;
                float factor = exp2f(slot[64 * SUM_STRIDE + place] - base);
                float4 more = *(const float4 *)(slot + place * SUM_STRIDE + channel);
                total += slot[64 * SUM_STRIDE + 64 + place] * factor;
                sum.x += more.x * factor, sum.y += more.y * factor, sum.z += more.z * factor, sum.w += more.w * factor;
            }
            row += first_row;
            size_t at = ((size_t)part * tokens + row / group) * heads + kv_head * group + row % group;
            *(float4 *)(o + at * HEAD_DIM + channel) = sum;
            if (channel == 0) {
                tops[at] = top * 0.69314718f; /* of the natural exponential */
                totals[at] = total;
            }
        }
    }
}
