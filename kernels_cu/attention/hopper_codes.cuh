/* Attention of query rows over a cache of 8-bit codes by wgmma, for compute capability 9.0.
 *
 * Codes become operands in registers, and only there: wgmma takes them as its first operand, so that keys are the rows
 * of scores [64 keys][64 query rows], and channels those of sums [HEAD_DIM channels][64 query rows]. Queries and
 * weights are its second operand, in shared memory. A key's scale is a factor of its scores, a value's one of its
 * weights.
 *
 * Weights are relative to a row's base, which is not its highest score, but at most MARGIN less: finding the highest
 * takes all four warps, which they need only do where some score is beyond that, mostly in the first tile.
 *
 * Thread 32 w + 4 g + t of a warpgroup has keys 16 w + g and 8 more of scores, channels w * HEAD_DIM / 4 + 16 m + g and
 * 8 more of sums m, and of each 8 query rows numbers 2t and 2t + 1: element n * 4 + half * 2 + j is that of row n * 8 +
 * 2t + j. */
#if IS_CODED
/* Weights are at most 2^MARGIN; float16 holds no more than the values themselves. */
#define MARGIN (OPERAND_FORMAT == BFLOAT16 ? 8.0f : 0.0f)
#define SUM_TILES (HEAD_DIM / 64)
#define KEY_GROUP_BYTES (TILE_BYTES / (TILE / 8)) /* of 8 positions */
static_assert(TILE == 64 && HOPPER_ROWS == 64, "rows and columns of scores");
static_assert(2 * SPLIT_FLOATS(HOPPER_ROWS) * 4 <= TILES_BYTES + QUERY_BYTES, "sums leave what is exchanged alone");
static_assert(STAGES > KEY_GROUPS, "a warpgroup's next tile must come before it has left the one before");

struct CodedRows {
    float sum[SUM_TILES][32];  /* of weighted values, times VALUE_FACTOR */
    float base[16], total[16]; /* of row n * 8 + 2t + j at n * 2 + j: in units of ln 2, and the sum of own weights */
};

/* Calls action(element, index of its row in CodedRows, half) for a thread's elements of [64][64]. */
template <class Action> __device__ __forceinline__ void each_element(const Action &action)
{
#pragma unroll
    for (int i = 0; i < 32; i++) action(i, i / 4 * 2 + i % 2, i % 4 / 2);
}

__device__ __forceinline__ int row_of(int index) { return index / 2 * 8 + threadIdx.x % 4 * 2 + index % 2; }

/* 2^x, 0 instead of subnormal numbers. */
__device__ __forceinline__ float power_of_2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
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
                words[t] = pack<KVOperand>(pair.x * scale, pair.y * scale);
            }
        }
        unsigned to = stages.queries() + r / 8 * EIGHT_ROWS + piece / 8 * 1024 + r % 8 * 128;
        store_shared_uint4(to + ((piece % 8) ^ (r % 8)) * 16, make_uint4(words[0], words[1], words[2], words[3]));
    }
    fence_async();
    named_barrier<1, COMPUTE_THREADS>();
}

/* Barriers of a warpgroup. */
__device__ __forceinline__ void own_barrier(int warpgroup)
{
    if (warpgroup == 0)
        named_barrier<2, WARPGROUP>();
    else
        named_barrier<3, WARPGROUP>();
}

__device__ __forceinline__ bool own_barrier_any(int warpgroup, bool holds)
{
    return warpgroup == 0 ? named_barrier_any<2, WARPGROUP>(holds) : named_barrier_any<3, WARPGROUP>(holds);
}

/* Called by all warps of a warpgroup, with scores relative to bases: bases become the highest scores. */
__device__ __forceinline__ void raise_bases(CodedRows &state, float (&score)[32], bool first, unsigned exchange,
                                            int warpgroup)
{
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4;
#pragma unroll
    for (int index = 0; index < 16; index++) {
        int e = index / 2 * 4 + index % 2; /* and e + 2 is of the other half */
        float top = fmaxf(score[e], score[e + 2]);
        for (int other = 4; other < WARP; other *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, other));
        if (lane < 4) store_shared(exchange + (warp * 64 + row_of(index)) * 4, __float_as_uint(top));
    }
    own_barrier(warpgroup);
#pragma unroll
    for (int index = 0; index < 16; index++) {
        int e = index / 2 * 4 + index % 2;
        float rise = first ? -INFINITE : 0.0f;
#pragma unroll
        for (int w = 0; w < 4; w++) rise = fmaxf(rise, load_shared(exchange + (w * 64 + row_of(index)) * 4));
        if (rise == -INFINITE) rise = 0;                 /* of a row that sees no key */
        float factor = first ? 1.0f : power_of_2(-rise); /* the first time sums are 0 */
        state.base[index] += rise, state.total[index] *= factor;
        score[e] -= rise, score[e + 2] -= rise;
#pragma unroll
        for (int m = 0; m < SUM_TILES; m++) state.sum[m][e] *= factor, state.sum[m][e + 2] *= factor;
    }
}

/* Called by all compute warps. Only tiles from `ragged` on have positions that some row does not see: limit(row). */
template <class Limit>
__device__ __forceinline__ void attend(CodedRows &state, const Stages &stages, int first, int last, int ragged,
                                       const Limit &limit)
{
    int warpgroup = threadIdx.x / WARPGROUP, key_group = warpgroup % KEY_GROUPS;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4, g = lane / 4, t = lane % 4;
    unsigned queries = stages.queries() + warpgroup / KEY_GROUPS * 8 * EIGHT_ROWS;
    unsigned weights = stages.weights(warpgroup);
    unsigned k[HEAD_DIM / 16][4];
    auto load_keys = [&](int i) {
        stages.ring().wait_until_full(i);
        unsigned keys = stages.keys(i % STAGES) + warp * 2 * KEY_GROUP_BYTES;
#pragma unroll
        for (int c = 0; c < HEAD_DIM / 64; c++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                uint4 codes = load_shared_uint4(keys + half * KEY_GROUP_BYTES + c * 512 + lane * 16);
                const unsigned words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
                for (int step = 0; step < 4; step++) {
                    k[c * 4 + step][half] = unpack_codes<false>(words[step]);
                    k[c * 4 + step][half + 2] = unpack_codes<true>(words[step]);
                }
            }
    };
    int tiles = last - first;
    if (key_group < tiles) load_keys(key_group);
    for (int i = key_group; i < tiles; i += KEY_GROUPS) {
        int stage = i % STAGES;
        unsigned keys = stages.keys(stage) + warp * 2 * KEY_GROUP_BYTES, values = stages.values(stage);
        float score[32], key_scale[2], value_scale[2];
        unsigned v[TILE / 16][SUM_TILES][4];
        auto load_values = [&](int first_step, int last_step) {
#pragma unroll
            for (int step = first_step; step < last_step; step++)
#pragma unroll
                for (int high = 0; high < 2; high++) {
                    /* With HEAD_DIM 64 two warps have different ones of the same words. */
                    int channels_32 = SUM_TILES == 2 ? warp : warp / 2;
                    uint2 codes =
                        load_shared_uint2(values + (step * 2 + high) * KEY_GROUP_BYTES + channels_32 * 256 + lane * 8);
#pragma unroll
                    for (int m = 0; m < SUM_TILES; m++) {
                        unsigned word = (SUM_TILES == 2 ? m : warp % 2) ? codes.y : codes.x;
                        v[step][m][high * 2] = unpack_codes<false>(word);
                        v[step][m][high * 2 + 1] = unpack_codes<true>(word);
                    }
                }
        };
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < HEAD_DIM / 16; step++)
            wgmma(score, k[step], descriptor(queries + step / 4 * 1024 + step % 4 * 32, EIGHT_ROWS, 0), step == 0);
        wgmma_commit();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            unsigned at = half * KEY_GROUP_BYTES + 8 * HEAD_DIM + g * 4;
            key_scale[half] = load_shared(keys + at);
            value_scale[half] = load_shared(values + warp * 2 * KEY_GROUP_BYTES + at) * VALUE_FACTOR;
        }
        load_values(0, TILE / 32);
        wgmma_wait<0>();
        pin(score);

        each_element([&](int e, int index, int half) { score[e] = score[e] * key_scale[half] - state.base[index]; });
        if (first + i >= ragged) {
#pragma unroll
            for (int index = 0; index < 16; index++) {
                int seen = limit(row_of(index)) - ((first + i) * TILE + warp * 16 + g);
                if (seen <= 0) score[index / 2 * 4 + index % 2] = -INFINITE;
                if (seen <= 8) score[index / 2 * 4 + 2 + index % 2] = -INFINITE;
            }
        }
        float highest[4] = {score[0], score[1], score[2], score[3]};
        each_element([&](int e, int, int) { highest[e % 4] = fmaxf(highest[e % 4], score[e]); });
        bool beyond = fmaxf(fmaxf(highest[0], highest[1]), fmaxf(highest[2], highest[3])) > MARGIN;
        /* All warps have used the last tile's weights too. */
        if (own_barrier_any(warpgroup, beyond || i == key_group))
            raise_bases(state, score, i == key_group, stages.exchange(warpgroup), warpgroup);
        each_element([&](int e, int index, int) {
            score[e] = power_of_2(score[e]);
            state.total[index] += score[e];
        });
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                store_shared(weights + (warp * 2 + half) * 1024 + g * 128 + (n ^ g) * 16 + t * 4,
                             pack<KVOperand>(score[n * 4 + half * 2] * value_scale[half],
                                             score[n * 4 + half * 2 + 1] * value_scale[half]));
        load_values(TILE / 32, TILE / 16); /* not sooner: registers are short */
        fence_async();
        own_barrier(warpgroup);
#pragma unroll
        for (int m = 0; m < SUM_TILES; m++) pin(state.sum[m]);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < TILE / 16; step++)
#pragma unroll
            for (int m = 0; m < SUM_TILES; m++)
                wgmma(state.sum[m], v[step][m], descriptor(weights + step * 2048, 1024, 1024));
        wgmma_commit();
        if (i + KEY_GROUPS < tiles) load_keys(i + KEY_GROUPS);
        wgmma_wait<0>();
#pragma unroll
        for (int m = 0; m < SUM_TILES; m++) pin(state.sum[m]);
        if (threadIdx.x % WARPGROUP == 0) barrier_arrive(stages.ring().empty(stage));
    }
}

/* Called by all compute warps: their rows of one part; shared memory is that of the tiles. */
__device__ __forceinline__ void write_part(CodedRows &state, float *shared, const Stages &stages,
                                           const PartsView &parts, int part, const QueryRows &rows)
{
    int warpgroup = threadIdx.x / WARPGROUP, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP % 4, g = lane / 4;
    unsigned exchange = stages.exchange(warpgroup);
    float *sums = shared + warpgroup * SPLIT_FLOATS(HOPPER_ROWS), *tops = sums + HOPPER_ROWS * SUM_STRIDE;
    named_barrier<1, COMPUTE_THREADS>();
#pragma unroll
    for (int i = 0; i < 16; i++) {
        float total = state.total[i];
        for (int other = 4; other < WARP; other *= 2) total += __shfl_xor_sync(~0u, total, other);
        if (g == 0) store_shared(exchange + (warp * 64 + row_of(i)) * 4, __float_as_uint(total));
    }
#pragma unroll
    for (int m = 0; m < SUM_TILES; m++)
        each_element([&](int e, int index, int half) {
            int channel = warp * (HEAD_DIM / 4) + m * 16 + half * 8 + g;
            sums[row_of(index) * SUM_STRIDE + channel] = state.sum[m][e] * (1.0f / VALUE_FACTOR);
        });
    own_barrier(warpgroup);
#pragma unroll
    for (int i = 0; i < 16; i++) {
        float total = 0;
#pragma unroll
        for (int w = 0; w < 4; w++) total += load_shared(exchange + (w * 64 + row_of(i)) * 4);
        if (threadIdx.x % WARPGROUP < 4) {
            tops[row_of(i)] = total == 0 ? -INFINITE : state.base[i];
            tops[HOPPER_ROWS + row_of(i)] = total;
        }
    }
    named_barrier<1, COMPUTE_THREADS>();
    write_part<HOPPER_ROWS, KEY_GROUPS, BLOCK_ROWS, COMPUTE_THREADS, 4>(shared, parts, part, rows);
}
#endif
