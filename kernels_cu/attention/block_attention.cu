/* Attention of blocks' tokens over their block's own keys and values, k and v [tokens, kv_heads, head_dim], all to all,
 * merged with the parts of attention over the prefix. q [tokens, heads, head_dim]; o alike, narrowed for the matmul
 * that follows; head_dim is a multiple of 4. A block is block_tokens of one sequence; its parts are those of its cache
 * (CacheBlocks).
 *
 * Where stored_o has no slot for a block, the parts are of all its tokens. With stored_o [block, heads, head_dim] and
 * stored_lse [block, heads] they are of the tokens fresh [blocks, fresh_count] (null: all; negative: none), whose
 * merged results are stored, and with stored_q their queries; results of the other tokens are read from there. With
 * `fresh` a cache has one block.
 *
 * Before the wait it reads q, k, v and `fresh`: the previous kernel is prefix attention or one that follows it, which
 * has waited for them. While that runs, an SM has room for one thread block of this kernel: with one warp per row, few
 * thread blocks hold all rows, and whatever precedes the wait takes no time. BLOCKS_PER_SM = 4 keeps the compiler to
 * 128 registers. Where there are more rows than run at once, more thread blocks with fewer loads in flight each are
 * faster: compiled with PART_BATCH, KEY_BATCH and BLOCKS_PER_SM for few or many rows.
 *
 * Grid: (tokens, heads / WARP_ROWS), WARP_ROWS * block_tokens floats of dynamic shared memory. Must read the parts
 * once, and reads each kv head's keys and values once per row, from the L2 cache. */
extern "C" __global__ void __launch_bounds__(WARP_ROWS_THREADS, BLOCKS_PER_SM)
    block_attention(const float *q, const float *k, const float *v, PartsView parts, const int *fresh, int fresh_count,
                    StoredView stored_q, StoredView stored_o, StoredView stored_lse, Activation *o, const int *rides,
                    int per_cache, int block_tokens, int heads, int kv_heads, int head_dim)
{
    extern __shared__ float weights_of_warps[];
    let_next_start();
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, head = blockIdx.y * WARP_ROWS + warp;
    int tokens = block_tokens, token = blockIdx.x, block = token / tokens;
    int cache = CacheBlocks::cache_of(block, rides, per_cache);
    if (head >= heads) return;
    u64 slot = stored_o.address(block); /* long before it is needed */
    float *weights = weights_of_warps + warp * tokens;
    size_t row = (size_t)token * heads + head, stride = (size_t)kv_heads * head_dim;
    size_t kv_head = block * tokens * stride + head / (heads / kv_heads) * head_dim;
    k += kv_head, v += kv_head;
    auto piece_of = [&](const float *rows, int index, int piece) {
        return ((const float4 *)(rows + min(index, tokens - 1) * stride))[piece];
    };
    int pieces = head_dim / 4;
    float scale = rsqrtf((float)head_dim), top = -INFINITE, total = 0;
#pragma unroll 1
    for (int first = 0; first < tokens; first += KEY_BATCH) {
        float scores[KEY_BATCH] = {};
        for (int piece = lane; piece < pieces; piece += WARP) {
            float4 a = ((const float4 *)(q + row * head_dim))[piece];
#pragma unroll
            for (int i = 0; i < KEY_BATCH; i++) scores[i] += dot(a, piece_of(k, first + i, piece));
        }
#pragma unroll
        for (int i = 0; i < KEY_BATCH; i++) {
            float score = warp_sum(scores[i]) * scale;
            if (first + i >= tokens) continue;
            top = fmaxf(top, score);
            if (lane == 0) weights[first + i] = score;
        }
    }
    __syncwarp();
    for (int i = lane; i < tokens; i += WARP) total += weights[i] = expf(weights[i] - top);
    total = warp_sum(total);
    __syncwarp();

    /* The token's index among those of the parts, -1 if it is not one of them. */
    int part_token = token - CacheBlocks(cache, rides, per_cache).first * tokens;
    if (slot && (fresh || !parts.tokens)) {
        int index = -1;
        for (int i = lane; i < fresh_count; i += WARP)
            if (fresh[block * fresh_count + i] == part_token) index = i;
        part_token = __reduce_max_sync(~0u, index);
    }
#pragma unroll 1
    for (int start = 0; start < pieces; start += WARP) {
        int piece = min(start + lane, pieces - 1);
        float4 sum = zero4();
#pragma unroll 1
        for (int first = 0; first < tokens; first += KEY_BATCH) {
#pragma unroll
            for (int i = 0; i < KEY_BATCH; i++) {
                float4 value = piece_of(v, first + i, piece);
                accumulate(sum, value, first + i < tokens ? weights[first + i] : 0.0f);
            }
        }
        if (start == 0) wait_for_previous();
        float *kept_o = stored_o.at<float>(slot), *kept_lse = stored_lse.at<float>(slot);
        size_t kept_row = row - (size_t)block * tokens * heads;
        RowResult prefix;
        if (part_token >= 0) {
            size_t part_row = (size_t)part_token * heads + head;
            prefix = merge_row(parts, cache, part_row, (size_t)parts.tokens * heads, piece, head_dim);
            if (slot && start + lane < pieces) {
                store_merged(kept_o, kept_lse, kept_row, piece, head_dim, prefix);
                float4 *query = (float4 *)(stored_q.at<float>(slot) + kept_row * head_dim);
                if (stored_q.slot) query[piece] = ((const float4 *)(q + row * head_dim))[piece];
            }
        } else {
            prefix = {kept_lse[kept_row], 1, ((const float4 *)(kept_o + kept_row * head_dim))[piece]};
        }
        /* Over an empty prefix the maximum is -inf. */
        float both = fmaxf(top, prefix.top), mine = expf(top - both), theirs = expf(prefix.top - both);
        float rest = 1 / (total * mine + prefix.total * theirs);
        mine *= rest, theirs *= rest;
        if (start + lane >= pieces) continue;
        sum = scaled(sum, mine);
        accumulate(sum, prefix.sum, theirs);
        store4(o + row * head_dim + piece * 4, sum);
    }
}
