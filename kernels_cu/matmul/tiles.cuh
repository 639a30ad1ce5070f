/* A step of a tile of TILE_TOKENS tokens by TILE_ROWS rows of weights, on tensor cores: after tensor.cuh and
 * swizzle.cuh. */

/* sum += the 64 rows of xs from warp_token on times the 32 of weights from warp_row on, STEP_COLUMNS columns of both:
 * the part of one warp, as fragments of 16 by 8. */
__device__ __forceinline__ void multiply_tiles(float (&sum)[4][4][4], unsigned xs, unsigned weights, int warp_token,
                                               int warp_row)
{
    int lane = threadIdx.x % WARP;
#pragma unroll
    for (int k = 0; k < STEP_COLUMNS / 16; k++) {
        unsigned a[4][4], b[2][4];
#pragma unroll
        for (int m = 0; m < 4; m++)
            load_matrices(a[m], xs + place_for_matrices(warp_token + m * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
        for (int n = 0; n < 2; n++) {
            int row = warp_row + n * 16 + lane / 16 * 8 + lane % 8;
            load_matrices(b[n], weights + place_for_matrices(row, k * 2 + lane / 8 % 2));
        }
#pragma unroll
        for (int m = 0; m < 4; m++)
#pragma unroll
            for (int n = 0; n < 4; n++)
                mma(sum[m][n], a[m][0], a[m][1], a[m][2], a[m][3], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
    }
}
