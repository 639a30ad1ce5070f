/* y = x [tokens, inner] times the transposed matrix of codes [rows, inner] on tensor cores, for up to SKINNY_TOKENS
 * tokens; y is left as planes (matmul/planes.cuh) of plane_tokens tokens, of which these are the first ones from y on.
 *
 * As in linear_tensor.cu thread blocks take `share` consecutive units each of one long list, here of QUANTIZED_PANEL
 * rows and QUANTIZED_UNIT columns. A warp has 32 rows of one step at a time; K_GROUPS warps share rows, and have every
 * K_GROUPS-th step. Unpacking takes most of the instructions: with this many rows a warp reads x seldom, and with this
 * many warps the SM's schedulers stay at work, if they are not all at the same point. So a warp copies its own codes,
 * through STAGES buffers of shared memory, and warps wait for each other only where x comes, X_UNITS units of it at a
 * time through X_STAGES buffers. Sums of products with codes are scaled in float32 after each group's columns.
 *
 * Compiled with LINEAR_TILES = tokens / 8, K_GROUPS (1 or 2), STAGES, X_UNITS, X_STAGES, ZEROS, 1 where the matrix has
 * any, and GROUPS, of a unit: 1 (which other units may share), 2 or 4. Grid: units / share. Must read the codes and
 * scales once. */
static_assert(LINEAR_TILES * 8 <= SKINNY_TOKENS, "more tokens need another kernel");
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

/* Adds a warp's products of 32 rows' codes in one step and x. */
__device__ __forceinline__ void multiply(Sums &sum, const unsigned char *codes, const unsigned char *xs)
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
            uint4 piece = ((const uint4 *)codes)[(CODE_BITS == 4 ? m : m * 2 + half) * WARP + lane];
            const unsigned words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
            for (int high = 0; high < 2; high++) {
                unpack(pairs[half][m][high], words + (CODE_BITS == 4 ? half * 2 + high : high * 2));
#if ZEROS
                subtract(pairs[half][m][high], zeros.of[m * 2 + high]);
#endif
                if (half < STEP_GROUPS) factors[half][m * 2 + high] = widen(scales.of[m * 2 + high]);
            }
        }
    }
#pragma unroll
    for (int n = 0; n < LINEAR_TILES; n++) {
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

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    linear_quantized(const Activation *x, QuantizedView weight, float *y, int tokens, int plane_tokens, int share)
{
    /* Codes of each warp, x, and sums of warps that share rows. */
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    int rows = weight.rows, inner = weight.inner;
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    int row_warp = warp % ROW_WARPS, k_group = warp / ROW_WARPS;
    int panel_units = (inner + QUANTIZED_UNIT - 1) / QUANTIZED_UNIT;
    int panels = (rows + QUANTIZED_PANEL - 1) / QUANTIZED_PANEL;
    int first = blockIdx.x * share, units = min(share, panels * panel_units - first);
    int panel = first / panel_units, unit = first % panel_units; /* in the panel */
    unsigned char *own = shared_bytes + warp * (STAGES * STAGE_BYTES);
    unsigned char *xs = shared_bytes + THREADS / WARP * (STAGES * STAGE_BYTES);

    /* Codes follow one another from unit to unit, as do scales unless several units share a group. */
    const char *codes_at = (const char *)weight.codes + lane * 16;
    codes_at += ((size_t)first * UNIT_STEPS * ROW_WARPS + warp) * CODES_BYTES;
    int group_units = GROUPS == 1 ? weight.group / QUANTIZED_UNIT : 1, load_unit = unit, in_group = unit % group_units;
    int groups = weight.groups, group = panel * groups + unit / group_units * GROUPS;
    auto copy_factors = [&](unsigned to, const void *from, int bytes, int step) {
        int group_bytes = bytes / STEP_GROUPS, of_group = lane * 16 / group_bytes; /* of these 32 rows */
        size_t at = group + (GROUPS == 1 ? 0 : step * STEP_GROUPS) + of_group;
        if (lane * 16 < bytes)
            copy_16_bytes_async(to + lane * 16, (const char *)from + (at * ROW_WARPS + row_warp) * group_bytes +
                                                    lane * 16 % group_bytes);
    };
    auto load_weights = [&](int stage) {
        unsigned to = shared_address(own + stage * STAGE_BYTES);
#pragma unroll
        for (int i = 0; i < OWN_STEPS; i++, to += STEP_BYTES) {
            int step = i * K_GROUPS + k_group;
#pragma unroll
            for (int at = 0; at < CODES_BYTES; at += WARP * 16)
                copy_16_bytes_async(to + at + lane * 16, codes_at + i * K_GROUPS * ROW_WARPS * CODES_BYTES + at);
            copy_factors(to + CODES_BYTES, weight.scales, SCALES_BYTES, step);
            if (ZEROS) copy_factors(to + CODES_BYTES + SCALES_BYTES, weight.zeros, ZEROS_BYTES, step);
        }
        codes_at += UNIT_STEPS * ROW_WARPS * CODES_BYTES;
        if (GROUPS > 1) {
            group += GROUPS;
        } else {
            if (++in_group == group_units) in_group = 0, group++;
            if (++load_unit == panel_units) {
                group += in_group > 0; /* the panel's last one, which has fewer units */
                load_unit = in_group = 0;
            }
        }
    };
    int x_unit = unit;
    auto load_x = [&](int stage, bool at_once) {
        unsigned char *to = xs + stage % X_STAGES * X_BYTES;
#pragma unroll
        for (int i = 0; i < X_UNITS * X_ROWS * (QUANTIZED_UNIT / 8) / THREADS; i++) {
            int p = i * THREADS + threadIdx.x, piece = p % (QUANTIZED_UNIT / 8), row = p / (QUANTIZED_UNIT / 8);
            int token = row % X_ROWS, at = x_unit + row / X_ROWS;
            if (at >= panel_units) at = panel_units > X_UNITS ? at - panel_units : at % panel_units;
            int k = at * QUANTIZED_UNIT + piece * 8, place = row * X_ROW_BYTES + piece * 16;
            bool inside = k < inner && token < tokens;
            const Activation *from = inside ? x + (size_t)token * inner + k : x;
            if (at_once)
                *(uint4 *)(to + place) = inside ? *(const uint4 *)from : make_uint4(0, 0, 0, 0);
            else
                copy_16_bytes_async(shared_address(to + place), from, inside);
        }
        x_unit = (x_unit + X_UNITS) % panel_units;
    };
    for (int i = 0; i < STAGES - 1; i++) {
        if (i < units) load_weights(i);
        commit_copies();
    }
    wait_for_previous();
    let_next_start();
    /* The first ones overtake the codes that are on their way: asynchronous copies complete in order. */
    int x_stages = (units + X_UNITS - 1) / X_UNITS;
#pragma unroll 1
    for (int i = 0; i < min(X_STAGES - 1, x_stages); i++) load_x(i, true);

    Sums sum = {};
    int stage = 0;
#pragma unroll 1
    for (int i = 0; i < units; i++) {
        wait_copies<STAGES - 2>();
        int x_stage = i / X_UNITS;
        if (i % X_UNITS == 0) {
            __syncthreads();
            if (x_stage + X_STAGES - 1 < x_stages) load_x(x_stage + X_STAGES - 1, false);
        } else {
            __syncwarp(); /* lanes read scales that others have copied */
        }
        if (i + STAGES - 1 < units) load_weights(stage ? stage - 1 : STAGES - 1);
        commit_copies();
        const unsigned char *of_unit = xs + x_stage % X_STAGES * X_BYTES + i % X_UNITS * (X_ROWS * X_ROW_BYTES);
#pragma unroll 1
        for (int step = 0; step < OWN_STEPS; step++)
            multiply(sum, own + stage * STAGE_BYTES + step * STEP_BYTES,
                     of_unit + (step * K_GROUPS + k_group) * (STEP_COLUMNS * 2));
        stage = stage + 1 < STAGES ? stage + 1 : 0;
        if (++unit < panel_units && i + 1 < units) continue;

        float *others = (float *)(xs + X_STAGES * X_BYTES) + row_warp * (LINEAR_TILES * 8 * WARP) + lane;
        if (K_GROUPS == 2) {
            __syncthreads(); /* others' may still be read */
            if (k_group == 1) each_sum(sum, [&](int at, int, int, int, float mine) { others[at * WARP] = mine; });
            __syncthreads();
        }
        int plane = blockIdx.x - panel * panel_units / share;
        each_sum(sum, [&](int at, int m, int n, int j, float &mine) {
            int token = n * 8 + t * 2 + j % 2;
            int row = panel * QUANTIZED_PANEL + row_warp * CODE_ROWS + m * 16 + g + j / 2 * 8;
            if (k_group == 0 && token < tokens && row < rows)
                y[((size_t)plane * plane_tokens + token) * rows + row] =
                    mine + (K_GROUPS == 2 ? others[at * WARP] : 0.0f);
            mine = 0;
        });
        unit = 0, panel++;
    }
}
