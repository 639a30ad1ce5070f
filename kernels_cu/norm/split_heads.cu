/* From the joined projections qkv [tokens, (heads + 2 * kv_heads) * head_dim] to q [tokens, heads, head_dim] and k and
 * v [tokens, kv_heads, head_dim]: q and k are RMS-normed per head with a gain [head_dim], if there is one, then rotated
 * to the token's position, by rotations.cu. Of the first `rotated` channels d and d + rotated / 2 form a pair. With
 * query_beta, q at position p is scaled by 1 + query_beta * ln(1 + floor(p / original_positions)).
 *
 * One warp per head of a token; a lane holds PIECES of 4 channels: head_dim / 128. head_dim and rotated are multiples
 * of 8, LARGEST_HEAD_DIM at most.
 *
 * Compiled with PIECES, PLANE_BATCH, planes that are read at a time, and BLOCKS_PER_SM.
 * Grid: (tokens, (heads + 2 * kv_heads) / WARP_ROWS). Must read qkv and write q, k and v once. */
/* Piece number `index` of those that a warp's lanes hold; the index differs by lane. */
__device__ __forceinline__ float4 piece_of_warp(const float4 (&x)[PIECES], int index)
{
    float4 result;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        float4 candidate = make_float4(__shfl_sync(~0u, x[i].x, index % WARP), __shfl_sync(~0u, x[i].y, index % WARP),
                                       __shfl_sync(~0u, x[i].z, index % WARP), __shfl_sync(~0u, x[i].w, index % WARP));
        if (index / WARP == i) result = candidate;
    }
    return result;
}

extern "C" __global__ void __launch_bounds__(WARP_ROWS_THREADS, BLOCKS_PER_SM)
    split_heads(MatmulView qkv, const float *q_gain, const float *k_gain, BatchView batch, float *q, float *k, float *v,
                int heads, int kv_heads, int head_dim, int rotated, float eps, float query_beta,
                float original_positions)
{
    let_next_start();
    int token = blockIdx.x, head = blockIdx.y * WARP_ROWS + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (head >= heads + 2 * kv_heads) return;
    bool is_q = head < heads, is_v = head >= heads + kv_heads;
    int pieces = head_dim / 4, half = rotated / 8;
    const float4 *rotations = (const float4 *)(batch.rotations + (size_t)token * rotated);
    const float4 *gains = (const float4 *)(is_q ? q_gain : k_gain);
    float factor = 1;
    if (is_q && query_beta) factor += query_beta * logf(1 + floorf(batch.positions[token] / original_positions));
    float4 sine[PIECES], cosine[PIECES], gain[PIECES], x[PIECES];
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        int piece = i * WARP + lane;
        if (is_v || piece >= pieces) continue;
        if (gains) gain[i] = gains[piece];
        if (piece >= 2 * half) continue;
        sine[i] = rotations[piece % half];
        cosine[i] = rotations[half + piece % half];
    }
    wait_for_previous();
#pragma unroll
    for (int i = 0; i < PIECES; i++)
        x[i] = i * WARP + lane < pieces ? qkv.at<float4>(token, head * head_dim + (i * WARP + lane) * 4) : zero4();
    float *to = is_q   ? q + ((size_t)token * heads + head) * head_dim
                : is_v ? v + ((size_t)token * kv_heads + head - heads - kv_heads) * head_dim
                       : k + ((size_t)token * kv_heads + head - heads) * head_dim;
    if (!is_v && gains) {
        float square = 0;
#pragma unroll
        for (int i = 0; i < PIECES; i++) square += dot(x[i], x[i]);
        float scale = inverse_rms(warp_sum(square) / head_dim, eps);
#pragma unroll
        for (int i = 0; i < PIECES; i++) x[i] = times(x[i], scaled(gain[i], scale));
    }
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        int piece = i * WARP + lane;
        if (i * WARP >= pieces) break;
        float4 y = x[i];
        if (!is_v) {
            float4 pair = piece_of_warp(x, piece < half ? piece + half : max(piece - half, 0));
            if (piece < 2 * half) {
                y = times(y, cosine[i]);
                accumulate(y, times(pair, sine[i]), piece < half ? -1.0f : 1.0f);
            }
            y = scaled(y, factor);
        }
        if (piece < pieces) ((float4 *)to)[piece] = y;
    }
}
