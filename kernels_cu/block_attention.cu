/* Attention of a block's tokens over the block's own keys and values, k and v [tokens, kv_heads,
 * head_dim], all to all, merged with the parts of attention over the prefix.
 *
 * With `kept_o` [tokens, heads, head_dim] and `kept_lse` [tokens, heads] the parts are of some tokens only, fresh
 * [fresh_count], negative ones of none (null: all tokens): their merged results are written there, and those of the
 * other tokens are read there.
 *
 * q [tokens, heads, head_dim]; o alike, narrowed for the product that follows; head_dim is a multiple of 4. q, k, v and
 * fresh are read before the wait: the previous kernel is prefix attention or what follows it, which has waited for them.
 * While that runs, a processor has room for one thread block of this kernel: a warp has a row, so that few blocks hold
 * all rows and what comes before the wait costs no time. Asking for 4 blocks a processor keeps the compiler to 128
 * registers. Grid: (tokens, heads / 4), 128 threads, 4 * `tokens` floats of dynamic shared memory. Moves the parts in,
 * and each kv head's keys and values once a row, from the cache of the device. */
#define KEYS 8 /* that are loaded at once */

extern "C" __global__ void __launch_bounds__(4 * WARP, 4)
    block_attention(const float *q, const float *k, const float *v, PARTS_PARAMETERS, const int *fresh,
                    int fresh_count, float *kept_o, float *kept_lse, Held *o, int tokens, int heads, int kv_heads,
                    int head_dim)
{
    extern __shared__ float weights_of_warps[];
    let_next_start();
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, head = blockIdx.y * 4 + warp;
    if (head >= heads) return;
    float *weights = weights_of_warps + warp * tokens;
    size_t row = (size_t)blockIdx.x * heads + head, stride = (size_t)kv_heads * head_dim;
    k += head / (heads / kv_heads) * head_dim, v += head / (heads / kv_heads) * head_dim;
    auto piece_of = [&](const float *of_tokens, int token, int piece) {
        return ((const float4 *)(of_tokens + min(token, tokens - 1) * stride))[piece];
    };
    int pieces = head_dim / 4;
    float scale = rsqrtf((float)head_dim), top = -INFINITE, total = 0;
#pragma unroll 1
    for (int first = 0; first < tokens; first += KEYS) {
        float scores[KEYS] = {};
        for (int piece = lane; piece < pieces; piece += WARP) {
            float4 a = ((const float4 *)(q + row * head_dim))[piece];
#pragma unroll
            for (int i = 0; i < KEYS; i++) {
                float4 b = piece_of(k, first + i, piece);
                scores[i] += a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
            }
        }
#pragma unroll
        for (int i = 0; i < KEYS; i++) {
            float score = warp_sum(scores[i]) * scale;
            if (first + i >= tokens) continue;
            top = fmaxf(top, score);
            if (lane == 0) weights[first + i] = score;
        }
    }
    __syncwarp();
    for (int token = lane; token < tokens; token += WARP) total += weights[token] = expf(weights[token] - top);
    total = warp_sum(total);
    __syncwarp();

    /* A token's place among those of the parts, -1 for none. */
    int of_parts = blockIdx.x, parts_tokens = gridDim.x;
    if (kept_o && fresh) {
        int found = -1;
        for (int i = lane; i < fresh_count; i += WARP)
            if (fresh[i] == (int)blockIdx.x) found = i;
        of_parts = __reduce_max_sync(~0u, found), parts_tokens = fresh_count;
    }
#pragma unroll 1
    for (int start = 0; start < pieces; start += WARP) {
        int piece = min(start + lane, pieces - 1);
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 1
        for (int first = 0; first < tokens; first += KEYS) {
#pragma unroll
            for (int i = 0; i < KEYS; i++) {
                float4 value = piece_of(v, first + i, piece);
                float weight = first + i < tokens ? weights[first + i] : 0.0f;
                sum.x += value.x * weight, sum.y += value.y * weight;
                sum.z += value.z * weight, sum.w += value.w * weight;
            }
        }
        if (start == 0) wait_for_previous();
        RowResult prefix;
        if (of_parts >= 0) {
            Parts parts = PARTS_OF((size_t)parts_tokens * heads);
            prefix = parts.merge((size_t)of_parts * heads + head, piece, head_dim);
            if (kept_o && start + lane < pieces) store_merged(kept_o, kept_lse, row, piece, head_dim, prefix);
        } else {
            prefix = {kept_lse[row], 1, ((const float4 *)(kept_o + row * head_dim))[piece]};
        }
        /* Over an empty prefix the maximum is -inf. */
        float both = fmaxf(top, prefix.top), mine = expf(top - both), theirs = expf(prefix.top - both);
        float rest = 1 / (total * mine + prefix.total * theirs);
        mine *= rest, theirs *= rest;
        if (start + lane >= pieces) continue;
        Held *to = o + row * head_dim + piece * 4;
        to[0] = narrow(sum.x * mine + prefix.sum.x * theirs);
        to[1] = narrow(sum.y * mine + prefix.sum.y * theirs);
        to[2] = narrow(sum.z * mine + prefix.sum.z * theirs);
        to[3] = narrow(sum.w * mine + prefix.sum.w * theirs);
    }
}
