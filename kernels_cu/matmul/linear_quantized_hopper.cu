/* As linear_quantized, by wgmma: for compute capability 9.0.
 *
 * Codes become operands in registers, and only there, since wgmma takes its first one from them; x is the second, in
 * shared memory. Each of four warpgroups has sums of 64 rows [64][TOKENS tokens]: of each of four tiles of codes 16
 * rows, the same in all. It unpacks a piece of their columns, multiplies and waits, while the others do that at other
 * times.
 *
 * COPY_WARPS more warps fill STAGES buffers, in turn, with COLUMNS columns of a panel: one lane copies codes, scales
 * and zeros, by bulk copies, all lanes x. In rows of x pairs of columns are put where lanes have those of the codes.
 *
 * Compiled with LINEAR_TILES = tokens / 8, COPY_WARPS, STAGES, ZEROS, GROUPS, of a stage: 1 (which other stages may
 * share), 2 or 4, and RESIDENT, 2 where an SM is to have room for a thread block of the next matmul. Grid: units /
 * share. Must read the codes and scales once. */
#define TOKENS (LINEAR_TILES * 8)
#define TILES (QUANTIZED_PANEL / CODE_ROWS)
#define WARPS (QUANTIZED_PANEL / 16) /* that multiply */
#define THREADS ((WARPS + COPY_WARPS) * WARP)
#define COLUMNS (QUANTIZED_STAGE_BITS / CODE_BITS)
#define STEPS (COLUMNS / STEP_COLUMNS)
#define UNIT_STAGES (QUANTIZED_UNIT / COLUMNS)
#define PIECES (GROUPS > STEPS ? GROUPS : STEPS) /* of a stage's columns: what is multiplied before it is scaled */
#define BLOCKS (COLUMNS / PIECES / 16)           /* of a piece: columns of a wgmma */
#define X_ROW_BYTES (STEP_COLUMNS * 2)
#define X_STEP_BYTES (TOKENS * X_ROW_BYTES)
#define X_BYTES (STEPS * X_STEP_BYTES)
#define X_CHUNKS (X_BYTES / (WARP * 16))      /* that a warp copies at a time: 4 tokens, STEP_COLUMNS columns */
#define X_BATCH (X_CHUNKS < 8 ? X_CHUNKS : 8) /* of a lane in flight */
#define TILE_BYTES (CODE_ROWS * STEP_COLUMNS * CODE_BITS / 8)
#define CODES_BYTES (STEPS * TILES * TILE_BYTES)
#define SCALES_BYTES (GROUPS * QUANTIZED_PANEL * (int)sizeof(Scale))
#define ZEROS_BYTES (ZEROS * GROUPS * QUANTIZED_PANEL * 2)
#define STAGE_BYTES ((X_BYTES + CODES_BYTES + SCALES_BYTES + ZEROS_BYTES + 1023) / 1024 * 1024)
static_assert(WARPS == 2 * TILES && STEP_COLUMNS == 64, "a warp has half of a tile's rows");
static_assert(STAGES % COPY_WARPS == 0, "a buffer is always filled by the same warp");

/* 16 bytes of x that a lane copies with a chunk of a stage. Rows past the last token are some token's. */
__device__ __forceinline__ uint4 load_x(const Activation *x, int chunk, int column, int inner, int tokens)
{
    int lane = threadIdx.x % WARP, token = min(chunk % (TOKENS / 4) * 4 + lane / 8, tokens - 1);
    int k = column + chunk / (TOKENS / 4) * STEP_COLUMNS + lane % 8 * 8;
    return k < inner ? *(const uint4 *)(x + token * inner + k) : make_uint4(0, 0, 0, 0);
}

__device__ __forceinline__ void store_x(unsigned to, int chunk, uint4 v)
{
    int lane = threadIdx.x % WARP, half = lane / 4 % 2, t = lane % 4, row = lane / 8;
    to += chunk / (TOKENS / 4) * X_STEP_BYTES + chunk % (TOKENS / 4) * 4 * X_ROW_BYTES;
    const unsigned pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int p = 0; p < 4; p++) { /* piece half * 4 + p of the row, swizzled */
        unsigned at = row * X_ROW_BYTES + (half * 4 + (p ^ row)) * 16 + t * 4;
        store_shared(to + (at ^ chunk % 2 * 64), pairs[p]);
    }
}

/* Where in a stage row g's scale is; the next one is that of row g + 8. */
__device__ __forceinline__ int first_scale(int tile, int m, int piece)
{
    return (GROUPS == 1 ? 0 : piece) * QUANTIZED_PANEL + tile * CODE_ROWS + threadIdx.x % WARP / 4 * 4 + m * 2;
}

__device__ __forceinline__ void load_scales(float (&scales)[2], unsigned codes, int tile, int m, int piece)
{
    unsigned from = codes + CODES_BYTES + first_scale(tile, m, piece) * (int)sizeof(Scale);
#if WIDE_SCALES
    float2 pair = load_shared_float2(from);
    scales[0] = pair.x, scales[1] = pair.y;
#else
    unsigned pair = __float_as_uint(load_shared(from));
    scales[0] = widen(Scale{(unsigned short)pair}), scales[1] = widen(Scale{(unsigned short)(pair >> 16)});
#endif
}

/* What a lane has of a piece's columns: of rows g and g + 8 of its warp. */
struct Codes {
    unsigned words[2][4]; /* of each half of a step, of both rows a word or two */
    unsigned zeros;

    static constexpr int PER_STEP = PIECES / STEPS, HALVES = 2 / PER_STEP;

    __device__ __forceinline__ void load(unsigned codes, int tile, int m, int piece)
    {
        int lane = threadIdx.x % WARP;
        unsigned from = codes + (piece / PER_STEP * TILES + tile) * TILE_BYTES + lane * 16;
#if CODES == INT4
        from += m * (WARP * 16);
        if (HALVES == 2) {
            uint4 v = load_shared_uint4(from);
            words[0][0] = v.x, words[0][2] = v.y, words[1][0] = v.z, words[1][2] = v.w;
        } else {
            uint2 v = load_shared_uint2(from + piece % 2 * 8);
            words[0][0] = v.x, words[0][2] = v.y;
        }
#else
#pragma unroll
        for (int high = 0; high < 2; high++) {
            uint4 v = load_shared_uint4(from + (m * 2 + high) * (WARP * 16));
            words[0][high * 2] = v.x, words[0][high * 2 + 1] = v.y;
            words[1][high * 2] = v.z, words[1][high * 2 + 1] = v.w;
        }
#endif
#if ZEROS
        zeros = __float_as_uint(load_shared(codes + CODES_BYTES + SCALES_BYTES + first_scale(tile, m, piece) * 2));
#endif
    }

    /* As wgmma's first operand. */
    __device__ __forceinline__ void unpack_into(unsigned (&a)[BLOCKS][4]) const
    {
#pragma unroll
        for (int half = 0; half < HALVES; half++)
#pragma unroll
            for (int high = 0; high < 2; high++) {
                unsigned pairs[4];
                unpack(pairs, words[half] + high * 2);
                if (ZEROS) subtract(pairs, {(unsigned short)(zeros >> high * 16)});
#pragma unroll
                for (int p = 0; p < 4; p++) a[half * 2 + p / 2][p % 2 * 2 + high] = pairs[p];
            }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    linear_quantized_hopper(const Activation *x, QuantizedView weight, float *y, int tokens, int plane_tokens,
                            int share)
{
    extern __shared__ __align__(SHARED_ALIGNMENT) unsigned char shared_bytes[];
    unsigned shared = shared_address(shared_bytes); /* STAGES times x, codes, scales and zeros, then the barriers */
    Ring ring = {shared + STAGES * STAGE_BYTES};
    auto x_of = [&](int stage) { return shared + stage * STAGE_BYTES; };
    auto codes_of = [&](int stage) { return x_of(stage) + X_BYTES; };
    int rows = weight.rows, inner = weight.inner, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int panel_units = (inner + QUANTIZED_UNIT - 1) / QUANTIZED_UNIT, panel_stages = panel_units * UNIT_STAGES;
    int panels = (rows + QUANTIZED_PANEL - 1) / QUANTIZED_PANEL;
    int first = blockIdx.x * share, count = min(share, panels * panel_units - first) * UNIT_STAGES;
    int early = min(STAGES, count), first_in_panel = first % panel_units * UNIT_STAGES;
    auto column_of = [&](int i) { return (first_in_panel + i) % panel_stages * COLUMNS; };

    auto load_weights = [&](int i) {
        unsigned full = ring.full(i % STAGES), to = codes_of(i % STAGES);
        barrier_arrive_expecting(full, CODES_BYTES + SCALES_BYTES + ZEROS_BYTES);
        int at = first * UNIT_STAGES + i;
        bulk_copy(to, (const char *)weight.codes + (size_t)at * CODES_BYTES, CODES_BYTES, full);
        size_t group = at / panel_stages * weight.groups + column_of(i) / weight.group;
        const char *scales = (const char *)weight.scales + group * (QUANTIZED_PANEL * sizeof(Scale));
        bulk_copy(to + CODES_BYTES, scales, SCALES_BYTES, full);
        const char *zeros = (const char *)weight.zeros + group * (QUANTIZED_PANEL * 2);
        if (ZEROS) bulk_copy(to + CODES_BYTES + SCALES_BYTES, zeros, ZEROS_BYTES, full);
    };
    if (threadIdx.x == WARPS * WARP) {
        for (int stage = 0; stage < STAGES; stage++) {
            barrier_init(ring.full(stage), 2);
            barrier_init(ring.empty(stage), WARPS);
        }
        fence_async();
        for (int i = 0; i < early; i++) load_weights(i);
    }
    constexpr int EARLY = (STAGES * X_CHUNKS + WARPS - 1) / WARPS; /* chunks of a warp */
    int columns[EARLY];
#pragma unroll
    for (int j = 0; j < EARLY; j++) columns[j] = column_of((j * WARPS + warp) / X_CHUNKS);
    wait_for_previous();
    let_next_start();
    if (warp < WARPS) {
        uint4 pieces[EARLY];
#pragma unroll
        for (int j = 0; j < EARLY; j++) /* what is past the last stage is not used */
            pieces[j] = load_x(x, (j * WARPS + warp) % X_CHUNKS, columns[j], inner, tokens);
#pragma unroll
        for (int j = 0; j < EARLY; j++) {
            int chunk = j * WARPS + warp;
            if (chunk < STAGES * X_CHUNKS) store_x(x_of(chunk / X_CHUNKS), chunk % X_CHUNKS, pieces[j]);
        }
        fence_async();
    }
    __syncthreads();

    if (warp >= WARPS) {
        if (threadIdx.x == WARPS * WARP)
            for (int i = 0; i < early; i++) barrier_arrive(ring.full(i));
#pragma unroll 1
        for (int i = STAGES + warp - WARPS; i < count; i += COPY_WARPS) {
            int column = column_of(i);
#pragma unroll 1
            for (int chunk = 0; chunk < X_CHUNKS; chunk += X_BATCH) {
                uint4 pieces[X_BATCH];
#pragma unroll
                for (int j = 0; j < X_BATCH; j++) pieces[j] = load_x(x, chunk + j, column, inner, tokens);
                if (chunk == 0) {
                    ring.wait_until_empty(i);
                    if (lane == 0) load_weights(i);
                }
#pragma unroll
                for (int j = 0; j < X_BATCH; j++) store_x(x_of(i % STAGES), chunk + j, pieces[j]);
            }
            fence_async();
            __syncwarp();
            if (lane == 0) barrier_arrive(ring.full(i % STAGES));
        }
        return;
    }

    asm volatile("" : "+r"(shared)); /* or the compiler, short of registers, would find it out again for each stage */
    int tile = warp % TILES, m = warp / TILES, last = panel_stages - first_in_panel - 1; /* of the panel */
    float sum[TOKENS / 2] = {}, part[TOKENS / 2] = {};
#pragma unroll 1
    for (int i = 0; i < count; i++) {
        int stage = i % STAGES;
        ring.wait_until_full(i);
        unsigned long long xs = descriptor(x_of(stage), 8 * X_ROW_BYTES, 0);
        Codes codes;
        codes.load(codes_of(stage), tile, m, 0);
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++) {
            unsigned a[BLOCKS][4];
            codes.unpack_into(a);
            int at = piece * BLOCKS / 4 * X_STEP_BYTES + piece * BLOCKS % 4 * 32;
            pin(part);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < BLOCKS; k++) wgmma(part, a[k], further(xs, at + k * 32), k == 0);
            wgmma_commit();
            if (piece + 1 < PIECES) codes.load(codes_of(stage), tile, m, piece + 1);
            wgmma_wait<0>();
            pin(part);
            float scales[2];
            load_scales(scales, codes_of(stage), tile, m, piece);
#pragma unroll
            for (int e = 0; e < TOKENS / 2; e++) sum[e] += scales[e / 2 % 2] * part[e];
        }
        if (lane == 0) barrier_arrive(ring.empty(stage));
        if (i < last && i + 1 < count) continue;

        int panel = (first * UNIT_STAGES + i) / panel_stages, plane = blockIdx.x - panel * panel_units / share;
#pragma unroll
        for (int e = 0; e < TOKENS / 2; e++) {
            int token = e / 4 * 8 + lane % 4 * 2 + e % 2;
            int row = panel * QUANTIZED_PANEL + tile * CODE_ROWS + m * 16 + lane / 4 + e / 2 % 2 * 8;
            if (token < tokens && row < rows) y[((size_t)plane * plane_tokens + token) * rows + row] = sum[e];
            sum[e] = 0;
        }
        last += panel_stages;
    }
}
