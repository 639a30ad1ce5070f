/* How a warpgroup of linear_hopper and linear_float8_hopper stores its sums [64 tokens][2 * COUNT rows], of which a
 * thread has those of two tokens, as wgmma leaves them: of a tile that begins at this token and row. y [tokens, rows]
 * is float32; or, where the weights are joined gate and up projections and the sums are of as many rows of both,
 * [tokens, rows / 2] = silu(gate) * up, narrowed for the matmul that follows; then rows / 2 is even. */
template <bool GATED_SUMS, class Output, int COUNT>
__device__ __forceinline__ void store_sums(const float (&sum)[COUNT], Output *y, int first_token, int first_row,
                                           int tokens, int rows)
{
    int thread = threadIdx.x % WARPGROUP, g = thread % WARP / 4, t = thread % 4;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int token = first_token + thread / WARP * 16 + g + half * 8;
        int column = first_row + t * 2, columns = GATED_SUMS ? rows / 2 : rows;
        Output *to = y + (size_t)token * columns + column;
        int left = token < tokens ? columns - column : 0;
        if constexpr (GATED_SUMS) {
#pragma unroll
            for (int n = 0; n < COUNT / 8; n++) {
                const float *gate = sum + n * 4 + half * 2, *up = gate + COUNT / 2;
                if (n * 8 < left)
                    *(unsigned *)(to + n * 8) = pack<Output>(silu(gate[0]) * up[0], silu(gate[1]) * up[1]);
            }
        } else if (rows % 2 == 0) {
#pragma unroll
            for (int n = 0; n < COUNT / 4; n++)
                if (n * 8 < left)
                    *(float2 *)(to + n * 8) = make_float2(sum[n * 4 + half * 2], sum[n * 4 + half * 2 + 1]);
        } else {
#pragma unroll
            for (int n = 0; n < COUNT / 4; n++)
#pragma unroll
                for (int j = 0; j < 2; j++)
                    if (n * 8 + j < left) to[n * 8 + j] = sum[n * 4 + half * 2 + j];
        }
    }
}
