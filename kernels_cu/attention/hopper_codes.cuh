/* Attention of query rows over a cache of 8-bit codes by wgmma, for compute capability 9.0.
 *
 * Codes become operands in registers, and only there: wgmma takes them as its first operand, so that keys are the rows
 * of scores [64 keys][query rows], and channels those of sums [HEAD_DIM channels][query rows]. Queries and weights are
 * its second operand, in shared memory. A key's scale is a factor of its scores, a value's one of its weights.
 *
 * Weights are relative to a row's base: it sets the highest weight of the first tile to 2^BASE_WEIGHT, and is only
 * raised where a thread's weights of a tile add up to more than MOST_WEIGHTS, since that takes all four warps. Values'
 * scales are relative to a power of 2, the unit, which is raised where one is above MOST_SCALE units. So weights times
 * scales are at most 2^15 and fit into float16, into which codes are unpacked by fewer instructions than into bfloat16.
 *
 * Thread 32 w + 4 g + t of a warpgroup has keys 16 w + g and 8 more of scores, channels w * HEAD_DIM / 4 + 16 m + g and
 * 8 more of sums m, and of each 8 query rows numbers 2t and 2t + 1: element n * 4 + half * 2 + j is that of row n * 8 +
 * 2t + j. */
#if IS_CODED
#define BASE_WEIGHT 3.0f
#define MOST_WEIGHTS 2048.0f
#define MOST_SCALE 16.0f
#define SUM_TILES (HEAD_DIM / 64)
#define ELEMENTS (WARPGROUP_ROWS / 2) /* a thread's of scores, and of each of sums */
#define THREAD_ROWS (WARPGROUP_ROWS / 4)
#define KEY_GROUP_BYTES (TILE_BYTES / (TILE / 8)) /* of 8 positions */
static_assert(TILE == 64, "rows of scores");
static_assert(2 * SPLIT_FLOATS(WARPGROUP_ROWS) * 4 <= TILES_BYTES + QUERY_BYTES, "sums leave what is exchanged alone");
static_assert(STAGES > KEY_GROUPS, "a warpgroup's next tile must come before it has left the one before");

struct CodedRows {
    float sum[SUM_TILES][ELEMENTS];              /* of weighted values, over the unit */
    float base[THREAD_ROWS], total[THREAD_ROWS]; /* of row n * 8 + 2t + j at n * 2 + j: in units of ln 2, and the sum
                                                  * of own weights */
    float unit, inverse;                         /* of values' scales, and 1 / unit */
};

/* Calls action(element, index of its row in CodedRows, half) for a thread's elements. */
template <class Action> __device__ __forceinline__ void each_element(const Action &action)
{
#pragma unroll
    for (int i = 0; i < ELEMENTS; i++) action(i, i / 4 * 2 + i % 2, i % 4 / 2);
}

__device__ __forceinline__ int row_of(int index) { return index / 2 * 8 + threadIdx.x % 4 * 2 + index % 2; }

/* 2^x, 0 instead of subnormal numbers. */
__device__ __forceinline__ float power_of_2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ unsigned multiply_pairs(unsigned a, unsigned b)
{
    unsigned product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
    return product;
}

/* A word's codes as operands: the first two, and the others. */
__device__ __forceinline__ void unpack_word(unsigned word, unsigned &low, unsigned &high)
{
#if LOSART_KV == KV_INT8
    asm("{.reg .b32 even, odd;\n" /* or-ed into the mantissa of 1024 */
        "prmt.b32 even, %2, 0x64646464, 0x4240; prmt.b32 odd, %2, 0x64646464, 0x4341;\n"
        "add.rn.f16x2 %0, even, %3; add.rn.f16x2 %1, odd, %3;}"
        : "=r"(low), "=r"(high)
        : "r"(word), "r"(BOTH(0xe480u)));
#else
    asm("{.reg .b32 ordered; .reg .b16 first, second;\n"
        "prmt.b32 ordered, %2, 0, 0x3120; mov.b32 {first, second}, ordered;\n"
        "cvt.rn.f16x2.e4m3x2 %0, first; cvt.rn.f16x2.e4m3x2 %1, second;}"
        : "=r"(low), "=r"(high)
        : "r"(word));
#endif
}

/* Called by all compute warps: the block's scaled queries into shared memory, channels in the order in which lanes have
 * those of keys. */
__device__ __forceinline__ void load_queries(const Stages &stages, const float *q, const QueryRows &rows)
{
    float scale = QUERY_SCALE;
#pragma unroll 4
    for (int i = threadIdx.x; i < BLOCK_ROWS * (HEAD_DIM / 8); i += COMPUTE_THREADS) {
        int r = i / (HEAD_DIM / 8), piece = i % (HEAD_DIM / 8), row = rows.first + r;
        unsigned words[4] = {};
        if (row < rows.count) {
            const float *from = q + rows.index(row) * HEAD_DIM + piece / 8 * 64 + piece % 8 * 2;
#pragma unroll
            for (int t = 0; t < 4; t++) {
                float2 pair = *(const float2 *)(from + t * 16);
                words[t] = pack<Operand>(pair.x * scale, pair.y * scale);
            }
        }
        unsigned to = stages.queries() + r / 8 * EIGHT_ROWS + piece / 8 * 1024 + r % 8 * 128;
        store_shared_uint4(to + ((piece % 8) ^ (r % 8)) * 16, make_uint4(words[0], words[1], words[2], words[3]));
    }
    fence_async();
    named_barrier<COMPUTE_THREADS>(1);
}

/* Barriers of a warpgroup. */
__device__ __forceinline__ void own_barrier(int warpgroup) { named_barrier<WARPGROUP>(2 + warpgroup); }

__device__ __forceinline__ bool own_barrier_any(int warpgroup, bool holds)
{
    return named_barrier_any<WARPGROUP>(2 + warpgroup, holds);
}

/* Called by all warps of a warpgroup, with scores relative to bases and the highest of a thread's value scales: bases
 * and unit become as of the highest. */
__device__ __forceinline__ void raise_bases(CodedRows &state, float (&score)[ELEMENTS], float value_scale, bool first,
                                            unsigned exchange, int warpgroup)
{
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4;
    unsigned scales = exchange + 4 * HOPPER_ROWS * 4;
    float highest = warp_max(value_scale);
    if (lane == 0) store_shared(scales + warp * 4, __float_as_uint(highest));
#pragma unroll
    for (int index = 0; index < THREAD_ROWS; index++) {
        int e = index / 2 * 4 + index % 2; /* and e + 2 is of the other half */
        float top = fmaxf(score[e], score[e + 2]);
        for (int other = 4; other < WARP; other *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, other));
        if (lane < 4) store_shared(exchange + (warp * HOPPER_ROWS + row_of(index)) * 4, __float_as_uint(top));
    }
    own_barrier(warpgroup);
#pragma unroll
    for (int w = 0; w < 4; w++) highest = fmaxf(highest, load_shared(scales + w * 4));
    float unit = __uint_as_float((__float_as_uint(highest) & 0x7f800000) + 0x00800000), shrink = 1.0f;
    if (first || unit > state.unit) {
        float inverse = __uint_as_float(0x7f000000 - __float_as_uint(unit));
        shrink = first ? 1.0f : state.unit * inverse; /* the first time sums are 0 */
        state.unit = unit, state.inverse = inverse;
    }
#pragma unroll
    for (int index = 0; index < THREAD_ROWS; index++) {
        int e = index / 2 * 4 + index % 2;
        float top = first ? -INFINITE : BASE_WEIGHT;
#pragma unroll
        for (int w = 0; w < 4; w++) top = fmaxf(top, load_shared(exchange + (w * HOPPER_ROWS + row_of(index)) * 4));
        float rise = top == -INFINITE ? 0.0f : top - BASE_WEIGHT; /* of a row that sees no key */
        float factor = first ? 1.0f : power_of_2(-rise);
        state.base[index] += rise, state.total[index] *= factor;
        score[e] -= rise, score[e + 2] -= rise;
#pragma unroll
        for (int m = 0; m < SUM_TILES; m++) state.sum[m][e] *= factor * shrink, state.sum[m][e + 2] *= factor * shrink;
    }
}

/* Called by all compute warps. Only tiles from `ragged` on have positions that some row does not see: limit(row). */
template <class Limit>
__device__ __forceinline__ void attend(CodedRows &state, const Stages &stages, int first, int last, int ragged,
                                       const Limit &limit)
{
    /* The same in all lanes, so that addresses and descriptors are in uniform registers. */
    int warpgroup = __shfl_sync(~0u, threadIdx.x / WARPGROUP, 0), key_group = warpgroup % KEY_GROUPS;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4, g = lane / 4;
    unsigned long long queries = descriptor(stages.queries() + warpgroup / KEY_GROUPS * 8 * EIGHT_ROWS, EIGHT_ROWS, 0);
    unsigned long long weights = descriptor(stages.weights(warpgroup), 1024, 1024);
    /* Lane 8 i + r has row r of matrix i: key i % 2 * 8 + r, query rows i / 2 * 8 and after. */
    unsigned own_weights =
        stages.weights(warpgroup) + (warp * 2 + lane / 8 % 2) * 1024 + lane % 8 * 128 + ((lane / 16) ^ (lane % 8)) * 16;
    unsigned own_keys = stages.keys(0) + warp * 2 * KEY_GROUP_BYTES;
    unsigned own_codes = own_keys + lane * 16, own_scales = own_keys + 8 * HEAD_DIM + g * 4;
    /* With HEAD_DIM 64 two warps have different ones of the same words. */
    unsigned own_values = stages.values(0) + (SUM_TILES == 2 ? warp : warp / 2) * 256 + lane * 8;
    unsigned k[HEAD_DIM / 16][4];
    auto load_keys = [&](int stage, int parity) {
        barrier_wait(stages.ring().full(stage), parity);
        unsigned keys = own_codes + stage * 2 * TILE_BYTES;
#pragma unroll
        for (int c = 0; c < HEAD_DIM / 64; c++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                uint4 codes = load_shared_uint4(keys + half * KEY_GROUP_BYTES + c * 512);
                const unsigned words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
                for (int step = 0; step < 4; step++)
                    unpack_word(words[step], k[c * 4 + step][half], k[c * 4 + step][half + 2]);
            }
    };
    int tiles = last - first, stage = key_group, parity = 0;
    if (key_group < tiles) load_keys(stage, parity);
    for (int i = key_group; i < tiles; i += KEY_GROUPS) {
        unsigned scales = own_scales + stage * 2 * TILE_BYTES, values = own_values + stage * 2 * TILE_BYTES;
        float score[ELEMENTS], key_scale[2], value_scale[2];
        unsigned v[TILE / 16][SUM_TILES][4];
        auto load_values = [&](int first_step, int last_step) {
#pragma unroll
            for (int step = first_step; step < last_step; step++)
#pragma unroll
                for (int high = 0; high < 2; high++) {
                    uint2 codes = load_shared_uint2(values + (step * 2 + high) * KEY_GROUP_BYTES);
#pragma unroll
                    for (int m = 0; m < SUM_TILES; m++) {
                        unsigned word = (SUM_TILES == 2 ? m : warp % 2) ? codes.y : codes.x;
                        unpack_word(word, v[step][m][high * 2], v[step][m][high * 2 + 1]);
                    }
                }
        };
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < HEAD_DIM / 16; step++)
            wgmma(score, k[step], queries + (step / 4 * 1024 + step % 4 * 32) / 16, step == 0);
        wgmma_commit();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            key_scale[half] = load_shared(scales + half * KEY_GROUP_BYTES);
            value_scale[half] = load_shared(scales + TILE_BYTES + half * KEY_GROUP_BYTES);
        }
        load_values(0, TILE / 32);
        wgmma_wait<0>();
        pin(score);

        each_element([&](int e, int index, int half) { score[e] = score[e] * key_scale[half] - state.base[index]; });
        if (first + i >= ragged) {
#pragma unroll
            for (int index = 0; index < THREAD_ROWS; index++) {
                int row = row_of(index);
                asm volatile("" : "+r"(row)); /* or limits would be found before the first tile, and take registers */
                int seen = limit(row) - ((first + i) * TILE + warp * 16 + g);
                if (seen <= 0) score[index / 2 * 4 + index % 2] = -INFINITE;
                if (seen <= 8) score[index / 2 * 4 + 2 + index % 2] = -INFINITE;
            }
        }
        unsigned weight[THREAD_ROWS];
        float added[THREAD_ROWS];
        auto weigh = [&]() {
#pragma unroll
            for (int n = 0; n < WARPGROUP_ROWS / 8; n++) {
                float p[4];
#pragma unroll
                for (int j = 0; j < 4; j++) p[j] = power_of_2(score[n * 4 + j]);
                weight[n * 2] = pack<Operand>(p[0], p[1]), weight[n * 2 + 1] = pack<Operand>(p[2], p[3]);
                added[n * 2] = p[0] + p[2], added[n * 2 + 1] = p[1] + p[3];
            }
            float sums[4] = {added[0], added[1], added[2], added[3]};
#pragma unroll
            for (int index = 4; index < THREAD_ROWS; index++) sums[index % 4] += added[index];
            return sums[0] + sums[1] + (sums[2] + sums[3]);
        };
        float highest = fmaxf(value_scale[0], value_scale[1]);
        bool beyond = weigh() > MOST_WEIGHTS || highest * state.inverse > MOST_SCALE;
        /* All warps have used the last tile's weights too. */
        if (own_barrier_any(warpgroup, beyond || i == key_group)) {
            raise_bases(state, score, highest, i == key_group, stages.exchange(warpgroup), warpgroup);
            weigh();
        }
#pragma unroll
        for (int index = 0; index < THREAD_ROWS; index++) state.total[index] += added[index];
        unsigned factor[2];
#pragma unroll
        for (int half = 0; half < 2; half++)
            factor[half] = pack<Operand>(value_scale[half] * state.inverse, value_scale[half] * state.inverse);
#pragma unroll
        for (int n = 0; n < WARPGROUP_ROWS / 8; n += 2)
            store_matrices(own_weights ^ n * 16, multiply_pairs(weight[n * 2], factor[0]),
                           multiply_pairs(weight[n * 2 + 1], factor[1]), multiply_pairs(weight[n * 2 + 2], factor[0]),
                           multiply_pairs(weight[n * 2 + 3], factor[1]));
        load_values(TILE / 32, TILE / 16); /* not sooner: registers are short */
        fence_async();
        own_barrier(warpgroup);
#pragma unroll
        for (int m = 0; m < SUM_TILES; m++) pin(state.sum[m]);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < TILE / 16; step++)
#pragma unroll
            for (int m = 0; m < SUM_TILES; m++) wgmma(state.sum[m], v[step][m], weights + step * 2048 / 16);
        wgmma_commit();
        int used = stage;
        stage += KEY_GROUPS;
        if (stage >= STAGES) stage -= STAGES, parity ^= 1;
        if (i + KEY_GROUPS < tiles) load_keys(stage, parity);
        wgmma_wait<0>();
#pragma unroll
        for (int m = 0; m < SUM_TILES; m++) pin(state.sum[m]);
        if (threadIdx.x % WARPGROUP == 0) barrier_arrive(stages.ring().empty(used));
    }
}

/* Called by all compute warps: their rows of one part; shared memory is that of the tiles. */
__device__ __forceinline__ void write_part(const CodedRows &state, float *shared, const Stages &stages,
                                           const PartsView &parts, int part, const QueryRows &rows)
{
    int warpgroup = threadIdx.x / WARPGROUP, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4, g = lane / 4;
    unsigned exchange = stages.exchange(warpgroup);
    float *sums = shared + warpgroup * SPLIT_FLOATS(WARPGROUP_ROWS), *tops = sums + WARPGROUP_ROWS * SUM_STRIDE;
    named_barrier<COMPUTE_THREADS>(1);
#pragma unroll
    for (int i = 0; i < THREAD_ROWS; i++) {
        float total = state.total[i];
        for (int other = 4; other < WARP; other *= 2) total += __shfl_xor_sync(~0u, total, other);
        if (g == 0) store_shared(exchange + (warp * HOPPER_ROWS + row_of(i)) * 4, __float_as_uint(total));
    }
#pragma unroll
    for (int m = 0; m < SUM_TILES; m++)
        each_element([&](int e, int index, int half) {
            int channel = warp * (HEAD_DIM / 4) + m * 16 + half * 8 + g;
            sums[row_of(index) * SUM_STRIDE + channel] = state.sum[m][e] * state.unit;
        });
    own_barrier(warpgroup);
#pragma unroll
    for (int i = 0; i < THREAD_ROWS; i++) {
        float total = 0;
#pragma unroll
        for (int w = 0; w < 4; w++) total += load_shared(exchange + (w * HOPPER_ROWS + row_of(i)) * 4);
        if (threadIdx.x % WARPGROUP < 4) {
            tops[row_of(i)] = total == 0 ? -INFINITE : state.base[i];
            tops[WARPGROUP_ROWS + row_of(i)] = total;
        }
    }
    named_barrier<COMPUTE_THREADS>(1);
    write_part<WARPGROUP_ROWS, KEY_GROUPS, BLOCK_ROWS, COMPUTE_THREADS, 4>(shared, parts, part, rows);
}
#endif
