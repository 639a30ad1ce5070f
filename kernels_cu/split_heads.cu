/* From the joined projections qkv [tokens, (heads + 2 * kv_heads) * head_dim] to
 * q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim]: RMS norm of each q and k head
 * with its gain [head_dim], then rotation to the position length + token.
 *
 * A warp has a head, a lane a piece of 4 channels, or two of head_dim above 128; channels d and d + head_dim / 2 turn
 * with each other. head_dim is a multiple of 8, and 256 at most. Grid: (tokens, (heads + 2 * kv_heads) / 4), 128
 * threads. Moves qkv in and out. `frequencies` [head_dim / 2] in half turns per
 * position, double: a float's angle is off by 1e-2 at position 100,000. Of half turns whole ones can be taken off
 * exactly; an angle in radians would need a table in local memory for that. */
#define PIECES 2 /* of a lane */

/* Of the pieces that a warp's lanes hold, number `other`, which differs by lane. */
__device__ __forceinline__ float4 held_piece(const float4 (&x)[PIECES], int other)
{
    float4 found;
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        float4 there = make_float4(__shfl_sync(~0u, x[i].x, other % WARP), __shfl_sync(~0u, x[i].y, other % WARP),
                                   __shfl_sync(~0u, x[i].z, other % WARP), __shfl_sync(~0u, x[i].w, other % WARP));
        if (other / WARP == i) found = there;
    }
    return found;
}

extern "C" __global__ void __launch_bounds__(4 * WARP)
    split_heads(PRODUCT_PARAMETERS, const float *q_gain, const float *k_gain, const double *frequencies,
                float rope_factor, const int *length, float *q, float *k, float *v, int heads, int kv_heads,
                int head_dim, float eps)
{
    let_next_start();
    Product qkv = PRODUCT;
    int token = blockIdx.x, head = blockIdx.y * 4 + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    if (head >= heads + 2 * kv_heads) return;
    bool query = head < heads, value = head >= heads + kv_heads;
    int pieces = head_dim / 4, half = pieces / 2;
    float4 sine[PIECES], cosine[PIECES], gain[PIECES], x[PIECES];
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        int piece = i * WARP + lane;
        if (value || piece >= pieces) continue;
        float sines[4], cosines[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            double angle = (double)(*length + token) * frequencies[piece % half * 4 + j];
            sincospif((float)(angle - 2 * rint(angle / 2)), &sines[j], &cosines[j]);
            sines[j] *= piece < half ? -rope_factor : rope_factor, cosines[j] *= rope_factor;
        }
        sine[i] = make_float4(sines[0], sines[1], sines[2], sines[3]);
        cosine[i] = make_float4(cosines[0], cosines[1], cosines[2], cosines[3]);
        gain[i] = ((const float4 *)(query ? q_gain : k_gain))[piece];
    }
    wait_for_previous();
#pragma unroll
    for (int i = 0; i < PIECES; i++)
        x[i] = i * WARP + lane < pieces ? qkv.at4(token, head * head_dim + (i * WARP + lane) * 4)
                                        : make_float4(0, 0, 0, 0);
    float *to = query   ? q + ((size_t)token * heads + head) * head_dim
                : value ? v + ((size_t)token * kv_heads + head - heads - kv_heads) * head_dim
                        : k + ((size_t)token * kv_heads + head - heads) * head_dim;
    if (!value) {
        float square = 0;
#pragma unroll
        for (int i = 0; i < PIECES; i++)
            square += x[i].x * x[i].x + x[i].y * x[i].y + x[i].z * x[i].z + x[i].w * x[i].w;
        float scale = inverse_rms(warp_sum(square) / head_dim, eps);
#pragma unroll
        for (int i = 0; i < PIECES; i++) {
            x[i].x *= scale * gain[i].x, x[i].y *= scale * gain[i].y;
            x[i].z *= scale * gain[i].z, x[i].w *= scale * gain[i].w;
        }
    }
#pragma unroll
    for (int i = 0; i < PIECES; i++) {
        int piece = i * WARP + lane;
        if (i * WARP >= pieces) break;
        float4 y = x[i];
        if (!value) {
            int other = piece < half ? piece + half : piece - half;
            float4 there = held_piece(x, other);
            y.x = y.x * cosine[i].x + there.x * sine[i].x, y.y = y.y * cosine[i].y + there.y * sine[i].y;
            y.z = y.z * cosine[i].z + there.z * sine[i].z, y.w = y.w * cosine[i].w + there.w * sine[i].w;
        }
        if (piece < pieces) ((float4 *)to)[piece] = y;
    }
}
