/* How a warp multiplies the codes of a panel by rows of x on tensor cores, in linear_quantized and experts_quantized:
 * after quantized.cuh.
 *
 * A warp has 32 rows of one step at a time; K_GROUPS warps share rows, and have every K_GROUPS-th step. Unpacking takes
 * most of the instructions: with this many rows a warp reads x seldom, and with this many warps the SM's schedulers
 * stay at work, if they are not all at the same point. So a warp copies its own codes, through STAGES buffers of shared
 * memory, and warps wait for each other only where x comes, X_UNITS units of it at a time through X_STAGES buffers.
 * Sums of products with codes are scaled in float32 after each group's columns.
 *
 * Compiled with LINEAR_TILES = rows of x / 8, K_GROUPS (1 or 2), STAGES, X_UNITS, X_STAGES, ZEROS, 1 where the matrix
 * has any, and GROUPS, of a unit: 1 (which other units may share), 2 or 4. */
static_assert((X_STAGES - 1) * X_UNITS >= STAGES - 1, "x must not come later than codes");
#define ROW_WARPS (QUANTIZED_PANEL / CODE_ROWS)
#define THREADS (ROW_WARPS * K_GROUPS * WARP)
#define UNIT_STEPS (QUANTIZED_UNIT / STEP_COLUMNS)
#define OWN_STEPS (UNIT_STEPS / K_GROUPS) /* of a warp in a unit */
#define STEP_GROUPS (GROUPS == 4 ? 2 : 1)
#define X_ROWS (LINEAR_TILES * 8)
#define X_ROW_BYTES (QUANTIZED_UNIT * 2 + 64) /* so that eight lanes, with four pieces of two rows, read all banks */
#define X_BYTES (X_UNITS * X_ROWS * X_ROW_BYTES)
static_assert(X_UNITS * X_ROWS * (QUANTIZED_UNIT / 8) % THREADS == 0, "all threads copy as much of x");
#define CODES_BYTES (CODE_ROWS * STEP_COLUMNS * CODE_BITS / 8) /* of a warp's step, as all that follows */
#define SCALES_BYTES (STEP_GROUPS * CODE_ROWS * (int)sizeof(Scale))
#define ZEROS_BYTES (ZEROS * STEP_GROUPS * CODE_ROWS * 2)
#define STEP_BYTES (CODES_BYTES + SCALES_BYTES + ZEROS_BYTES)
#define STAGE_BYTES (OWN_STEPS * STEP_BYTES)

/* Sums of 16 rows and 8 tokens each, as mma has them. */
using Sums = float[2][LINEAR_TILES][4];

/* Calls action(number, 16 rows, 8 tokens, element, sum) for each. */
template <class Action> __device__ __forceinline__ void each_sum(Sums &sums, const Action &action)
{
#pragma unroll
    for (int i = 0; i < LINEAR_TILES * 8; i++) {
        int m = i / 4 / LINEAR_TILES, n = i / 4 % LINEAR_TILES, j = i % 4;
        action(i, m, n, j, sums[m][n][j]);
    }
}

/* Adds a warp's products of 32 rows' codes in one step and the first `tiles` times 8 rows of x. */
__device__ __forceinline__ void multiply(Sums &sum, const unsigned char *codes, const unsigned char *xs,
                                         int tiles = LINEAR_TILES)
{
    int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    unsigned pairs[2][2][2][4]; /* of each half of the columns and 16 rows, the lower and the higher 8 */
    float factors[STEP_GROUPS][4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int group = half * (STEP_GROUPS - 1) * CODE_ROWS + g * 4;
        FourScales scales = *(const FourScales *)((const Scale *)(codes + CODES_BYTES) + group);
#if ZEROS
        FourZeros zeros = *(const FourZeros *)((const Operand *)(codes + CODES_BYTES + SCALES_BYTES) + group);
#endif
#pragma unroll
        for (int m = 0; m < 2; m++) {
#pragma unroll
            for (int high = 0; high < 2; high++) {
                uint4 piece = ((const uint4 *)codes)[(CODE_BITS == 4 ? m : m * 2 + high) * WARP + lane];
                const unsigned words[4] = {piece.x, piece.y, piece.z, piece.w};
                unpack(pairs[half][m][high], words + half * 2 + (CODE_BITS == 4 ? high : 0));
#if ZEROS
                subtract(pairs[half][m][high], zeros.of[m * 2 + high]);
#endif
                if (half < STEP_GROUPS) factors[half][m * 2 + high] = widen(scales.of[m * 2 + high]);
            }
        }
    }
#pragma unroll
    for (int n = 0; n < LINEAR_TILES; n++) {
        if (n >= tiles) break;
        float part[2][4];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            uint4 v = *(const uint4 *)(xs + (n * 8 + g) * X_ROW_BYTES + (half * 4 + t) * 16);
#pragma unroll
            for (int m = 0; m < 2; m++) {
                auto &a = pairs[half][m][0], &b = pairs[half][m][1];
                if (half < STEP_GROUPS)
                    mma_from_zero(part[m], a[0], b[0], a[1], b[1], v.x, v.y);
                else
                    mma(part[m], a[0], b[0], a[1], b[1], v.x, v.y);
                mma(part[m], a[2], b[2], a[3], b[3], v.z, v.w);
                if (half < 2 - STEP_GROUPS) continue;
#pragma unroll
                for (int j = 0; j < 4; j++)
                    sum[m][n][j] += factors[half * (STEP_GROUPS - 1)][m * 2 + j / 2] * part[m][j];
            }
        }
    }
}

/* Copies scales or zeros of a warp's rows in a step, `bytes` of them: of a unit whose first group is `group`, among
 * those of all panels. */
__device__ __forceinline__ void copy_factors(unsigned to, const void *from, int bytes, int group, int row_warp,
                                             int step)
{
    int lane = threadIdx.x % WARP, group_bytes = bytes / STEP_GROUPS, of_group = lane * 16 / group_bytes;
    size_t at = group + (GROUPS == 1 ? 0 : step * STEP_GROUPS) + of_group;
    if (lane * 16 < bytes)
        copy_16_bytes_async(to + lane * 16,
                            (const char *)from + (at * ROW_WARPS + row_warp) * group_bytes + lane * 16 % group_bytes);
}

/* Copies what a warp has of a unit, whose codes of this lane begin at codes_at. */
__device__ __forceinline__ void copy_weights(unsigned char *stage, const QuantizedView &weight, const char *codes_at,
                                             int group, int row_warp, int k_group)
{
    int lane = threadIdx.x % WARP;
    unsigned to = shared_address(stage);
#pragma unroll
    for (int i = 0; i < OWN_STEPS; i++, to += STEP_BYTES) {
        int step = i * K_GROUPS + k_group;
#pragma unroll
        for (int at = 0; at < CODES_BYTES; at += WARP * 16)
            copy_16_bytes_async(to + at + lane * 16, codes_at + i * K_GROUPS * ROW_WARPS * CODES_BYTES + at);
        copy_factors(to + CODES_BYTES, weight.scales, SCALES_BYTES, group, row_warp, step);
        if (ZEROS) copy_factors(to + CODES_BYTES + SCALES_BYTES, weight.zeros, ZEROS_BYTES, group, row_warp, step);
    }
}

/* Copies 16 bytes of x, or zeros, at once or as all other copies. */
__device__ __forceinline__ void copy_x(unsigned char *to, const Activation *from, bool inside, bool at_once)
{
    if (at_once)
        *(uint4 *)to = inside ? *(const uint4 *)from : make_uint4(0, 0, 0, 0);
    else
        copy_16_bytes_async(shared_address(to), from, inside);
}
