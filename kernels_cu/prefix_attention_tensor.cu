/* Attention of a block's queries over the paged prefix on tensor cores, split over the prefix; parts
 * as those of prefix_attention.cu, KEY_WARPS of them a thread block.
 *
 * Grid: (kv_heads, splits, rows / BLOCK_ROWS). Since all rows of a kv head are in one block (up to 128),
 * every key and value is read once. Must move 2 * kv_heads * length * head_dim values. */
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    prefix_attention_tensor(const float *q, CACHE_PARAMETERS, float *o, float *tops, float *totals, int tokens,
                            int heads)
{
    wait_for_previous();
    let_next_start();
    CacheView cache = CACHE_VIEW;
    extern __shared__ __align__(1024) unsigned char shared_bytes[];
    int kv_head = blockIdx.x, part = blockIdx.y, parts = gridDim.y, group = heads / cache.kv_heads;
    int rows = tokens * group, length = *cache.length, tiles = (length + TILE - 1) / TILE;
    int first = (int)((long long)tiles * part / parts), last = (int)((long long)tiles * (part + 1) / parts);
    TensorRows state;
    load_queries(state, q, blockIdx.z * BLOCK_ROWS, rows, kv_head, group, heads);
    state.limit[0] = state.limit[1] = length;
    attend(state, cache, kv_head, first, last, length / TILE, shared_address(shared_bytes));

    int t = threadIdx.x % 4, key_warp = threadIdx.x / WARP % KEY_WARPS;
    size_t at_part = (size_t)(part * KEY_WARPS + key_warp) * tokens;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = state.row[half];
        if (row >= rows) continue;
        size_t at = (at_part + row / group) * heads + kv_head * group + row % group;
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 8; d++)
            *(float2 *)(o + at * HEAD_DIM + d * 8 + t * 2) =
                make_float2(state.sum[d][half * 2], state.sum[d][half * 2 + 1]);
        if (t == 0) {
            tops[at] = state.top[half] * 0.69314718f; /* of the natural exponential */
            totals[at] = state.total[half];
        }
    }
}
