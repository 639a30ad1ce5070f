/* y = x [tokens, inner] times the transposed matrix of E4M3 codes [rows, inner] on 8-bit tensor cores, for many tokens:
 * x too is E4M3 codes, with a scale per token (quantize_tokens_hopper.cu), whose rows are padded to whole units of
 * QUANTIZED_UNIT columns by zeros. A product is exact, and times both scales: sums of a unit's products are the tensor
 * cores', which round each to about 14 bits (arXiv 2412.19437, section 3.3.2), and those of units are float32.
 *
 * Tiles, cluster, stages, splits and what `gated` makes of y are as in linear_hopper.cu, WIDTH rows of a tile, for
 * `gated` a multiple of CODE_ROWS of each projection. Of the weights boxes of CODE_ROWS rows are copied, 64 columns
 * wide, as quantized.cuh has them: the columns of x are permuted alike. Codes of rows past the last panel arrive as
 * zeros. Boxes are so many that three warps share them; a fourth copies x and scales, and says how many bytes come in
 * all: those that come before it does are counted too. Only x is waited for.
 *
 * Compiled with CLUSTER (1 or 2), STAGES, and UNIT_SCALES: 0 where all columns of a row share a scale, 1 where units
 * have scales, each of one unit or several. Grid: as of linear_hopper.cu. Must do 2 * tokens * rows * inner operations,
 * of which there are twice as many a clock as with 16 bits. */
static_assert(TILE_TOKENS == 128 && LINEAR_HOPPER_THREADS == 3 * WARPGROUP, "two warpgroups of 64 tokens, one copies");
static_assert(QUANTIZED_UNIT == 128 && STEP_COLUMNS == 64, "a row of x is 128 bytes, one of the weights 64");
static_assert(CODES == FLOAT8 && WIDE_SCALES, "codes are multiplied as they are, and scales are copied as they are");
#define WIDTH FLOAT8_TILE_ROWS
#define BOXES (WIDTH / CODE_ROWS)
#define BOX_BYTES (CODE_ROWS * STEP_COLUMNS)
#define X_BYTES (TILE_TOKENS * QUANTIZED_UNIT)
#define STEP_BYTES (WIDTH * STEP_COLUMNS)
#define STAGE_BYTES (X_BYTES + 2 * STEP_BYTES)
#define SCALE_BYTES (UNIT_SCALES * WIDTH * 4)
#define READERS (UNIT_SCALES ? WARPGROUP / WARP : 1) /* of a warpgroup: each warp reads scales by itself */
#define CODE_WARPS (WARPGROUP / WARP - 1)
#define WARP_BOXES (BOXES / CODE_WARPS / CLUSTER)
static_assert(WIDTH % (2 * CODE_ROWS) == 0, "gate and up have as many boxes");
static_assert(BOXES % (CODE_WARPS * CLUSTER) == 0, "warps that copy codes have as many boxes");

/* Calls action(number, scale) for each of a thread's sums; at(box) has the scales of a box's rows. */
template <class At, class Action> __device__ __forceinline__ void each_scale(const At &at, const Action &action)
{
#pragma unroll
    for (int box = 0; box < BOXES; box++) {
        const FourScales *scales = (const FourScales *)at(box) + threadIdx.x % 4 * 2;
        FourScales even = scales[0], odd = scales[1]; /* rows t * 2 and t * 2 + 1 of each eight */
#pragma unroll
        for (int i = 0; i < 16; i++) action(box * 16 + i, (i % 2 ? odd : even).of[i / 4]);
    }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(LINEAR_HOPPER_THREADS, 1)
    linear_float8_hopper(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap codes,
                         const float *token_scales, QuantizedView weight, void *y, int tokens, int splits, int gated)
{
    extern __shared__ __align__(SHARED_ALIGNMENT) unsigned char shared_bytes[];
    unsigned shared = shared_address(shared_bytes); /* STAGES times x and codes, then scales, then the barriers */
    auto x_of = [&](int stage) { return shared + stage * STAGE_BYTES; };
    auto codes_of = [&](int stage) { return x_of(stage) + X_BYTES; };
    auto scales_of = [&](int stage) { return shared + STAGES * STAGE_BYTES + stage * SCALE_BYTES; };
    Ring ring = {scales_of(STAGES)};
    int block = blockIdx.x % CLUSTER, first = blockIdx.x / CLUSTER, stride = gridDim.x / CLUSTER;
    int rows = weight.rows, units = (weight.inner + QUANTIZED_UNIT - 1) / QUANTIZED_UNIT;
    const Scale *scales = (const Scale *)weight.scales;
    int panels = (rows + QUANTIZED_PANEL - 1) / QUANTIZED_PANEL;
    int across = (tokens + TILE_TOKENS * CLUSTER - 1) / (TILE_TOKENS * CLUSTER);
    int tiles = across * splits * ((rows + WIDTH - 1) / WIDTH); /* of the clusters */
    auto first_token = [&](int tile) { return (tile % across * CLUSTER + block) * TILE_TOKENS; };
    auto split_of = [&](int tile) { return tile / across % splits; };
    auto first_row = [&](int tile) { return tile / across / splits * (gated ? WIDTH / 2 : WIDTH); };
    auto row_of_box = [&](int row, int box) {
        return row + box * CODE_ROWS + (gated && box >= BOXES / 2 ? (rows - WIDTH) / 2 : 0);
    };
    /* Of a box's rows in unit 0; past the last panel those of its last rows will do. */
    auto scales_at = [&](int row) {
        return (int)place_of_scale(min(row, panels * QUANTIZED_PANEL - CODE_ROWS), 0, weight.groups);
    };

    if (threadIdx.x == 0) {
        ring.initialize(2 * CLUSTER * READERS);
        fence_barrier_init();
        fence_async();
    }
    cluster_barrier();

    if (threadIdx.x >= 2 * WARPGROUP) {
        set_registers_down<40>();
        int warp = __shfl_sync(~0u, threadIdx.x % WARPGROUP / WARP, 0); /* the same, as the compiler sees then */
        if (threadIdx.x % WARP == 0) {
            int i = 0;
            if (warp == CODE_WARPS) {
                prefetch_map(&x);
                wait_for_previous();
            } else {
                prefetch_map(&codes);
            }
            for (int tile = first; tile < tiles; tile += stride) {
                TileRange range = tiles_of_part(units, split_of(tile), splits);
                int token = first_token(tile), row = first_row(tile);
                if (warp == CODE_WARPS) {
#if UNIT_SCALES
                    int scale_rows[BOXES]; /* in unit 0 */
#pragma unroll
                    for (int box = 0; box < BOXES; box++) scale_rows[box] = scales_at(row_of_box(row, box));
#endif
#pragma unroll 1
                    for (int unit = range.first; unit < range.last; unit++, i++) {
                        int stage = i % STAGES;
                        unsigned full = ring.full(stage);
                        ring.wait_until_empty(i);
                        barrier_arrive_expecting(full, STAGE_BYTES + SCALE_BYTES);
                        copy_box(x_of(stage), &x, unit * QUANTIZED_UNIT, token, full);
#if UNIT_SCALES
                        const Scale *from = scales + unit * QUANTIZED_UNIT / weight.group * QUANTIZED_PANEL;
#pragma unroll
                        for (int box = 0; box < BOXES; box++)
                            bulk_copy(scales_of(stage) + box * CODE_ROWS * 4, from + scale_rows[box], CODE_ROWS * 4,
                                      full);
#endif
                    }
                } else {
                    int boxes[WARP_BOXES], map_rows[WARP_BOXES]; /* in unit 0 */
#pragma unroll
                    for (int j = 0; j < WARP_BOXES; j++) {
                        boxes[j] = (j * CODE_WARPS + warp) * CLUSTER + block;
                        int from = row_of_box(row, boxes[j]);
                        map_rows[j] = from / QUANTIZED_PANEL * (units * 2 * QUANTIZED_PANEL) + from % QUANTIZED_PANEL;
                    }
#pragma unroll 1
                    for (int unit = range.first; unit < range.last; unit++, i++) {
                        int stage = i % STAGES;
                        ring.wait_until_empty(i);
#pragma unroll
                        for (int j = 0; j < WARP_BOXES; j++)
#pragma unroll
                            for (int step = 0; step < 2; step++) {
                                unsigned to = codes_of(stage) + step * STEP_BYTES + boxes[j] * BOX_BYTES;
                                int from = map_rows[j] + (unit * 2 + step) * QUANTIZED_PANEL;
                                if (CLUSTER == 1)
                                    copy_box(to, &codes, 0, from, ring.full(stage));
                                else
                                    copy_box_to((1 << CLUSTER) - 1, to, &codes, 0, from, ring.full(stage));
                            }
                    }
                }
            }
            /* As in linear_hopper.cu: then this thread block may exit. */
            for (int last = i + STAGES; i < last; i++) ring.wait_until_empty(i);
        }
    } else {
        set_registers_up<232>();
        wait_for_previous();
        let_next_start();
        int warpgroup = threadIdx.x / WARPGROUP, thread = threadIdx.x % WARPGROUP;
        auto release = [&](int i) {
            if (UNIT_SCALES) __syncwarp();
            int reader = thread % (WARPGROUP / READERS);
            if (reader < CLUSTER) barrier_arrive_in(reader, ring.empty(i % STAGES));
        };
        int i = 0;
        float part[WIDTH / 2] = {}; /* initialised, as in linear_hopper.cu */
        for (int tile = first; tile < tiles; tile += stride) {
            TileRange range = tiles_of_part(units, split_of(tile), splits);
            float sum[WIDTH / 2] = {};
#pragma unroll 1
            for (int unit = range.first; unit < range.last; unit++, i++) {
                int stage = i % STAGES;
                ring.wait_until_full(i);
                unsigned xs = x_of(stage) + warpgroup * 64 * QUANTIZED_UNIT, ws = codes_of(stage);
                pin(part);
                wgmma_fence();
#pragma unroll
                for (int k = 0; k < QUANTIZED_UNIT / 32; k++)
                    wgmma_float8(part, descriptor(xs + k * 32, 8 * QUANTIZED_UNIT, 0),
                                 descriptor_of_64_bytes(ws + k / 2 * STEP_BYTES + k % 2 * 32), k == 0);
                wgmma_commit();
                wgmma_wait<0>();
                pin(part);
                /* While these are added the tensor cores work for the other warpgroup. */
#if UNIT_SCALES
                each_scale([&](int box) { return shared_bytes + scales_of(stage) - shared + box * CODE_ROWS * 4; },
                           [&](int e, float scale) { sum[e] += scale * part[e]; });
                release(i);
#else
                release(i);
#pragma unroll
                for (int e = 0; e < WIDTH / 2; e++) sum[e] += part[e];
#endif
            }

            int token = first_token(tile) + warpgroup * 64, row = first_row(tile);
            float of_token[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int own = token + thread / WARP * 16 + thread % WARP / 4 + half * 8;
                of_token[half] = token_scales[min(own, tokens - 1)];
            }
#if UNIT_SCALES
#pragma unroll
            for (int e = 0; e < WIDTH / 2; e++) sum[e] *= of_token[e / 2 % 2];
#else
            each_scale([&](int box) { return scales + scales_at(row_of_box(row, box)); },
                       [&](int e, float scale) { sum[e] *= scale * of_token[e / 2 % 2]; });
#endif
            if (gated)
                store_sums<true>(sum, (Activation *)y, token, row, tokens, rows);
            else
                store_sums<false>(sum, (float *)y + (size_t)split_of(tile) * tokens * rows, token, row, tokens, rows);
        }
    }
}
