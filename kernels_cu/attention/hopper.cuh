/* Attention of query rows over a cache of 16-bit values by wgmma, for compute capability 9.0: its layout is the one
 * that wgmma reads from shared memory. */

/* Called by all compute warps: the block's scaled queries into shared memory. */
__device__ __forceinline__ void load_queries(FragmentRows &state, const Stages &stages, const float *q,
                                             const QueryRows &rows)
{
    if (COPY_THREADS == WARPGROUP) set_registers_up<240>();
    float scale = QUERY_SCALE;
#pragma unroll 4
    for (int i = threadIdx.x; i < BLOCK_ROWS * (HEAD_DIM / 8); i += COMPUTE_THREADS) {
        int r = i / (HEAD_DIM / 8), piece = i % (HEAD_DIM / 8), row = rows.first + r;
        uint4 packed = make_uint4(0, 0, 0, 0);
        if (row < rows.count) {
            const float4 *from = (const float4 *)(q + rows.index(row) * HEAD_DIM + piece * 8);
            float4 low = from[0], high = from[1];
            packed = make_uint4(
                pack<KVOperand>(low.x * scale, low.y * scale), pack<KVOperand>(low.z * scale, low.w * scale),
                pack<KVOperand>(high.x * scale, high.y * scale), pack<KVOperand>(high.z * scale, high.w * scale));
        }
        unsigned to = stages.queries() + r / 8 * EIGHT_ROWS + piece / 8 * 1024 + r % 8 * 128;
        to += ((piece % 8) ^ (r % 8)) * 16;
        store_shared_uint4(to, packed);
    }
    fence_async();
    named_barrier<COMPUTE_THREADS>(1);
    int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4;
    state.reset(rows.first + warp / 4 / KEY_GROUPS * HOPPER_ROWS + warp % 4 * 16 + g);
}

/* Called by all compute warps. Only tiles from `ragged` on have positions that some row does not see. */
__device__ __forceinline__ void attend(FragmentRows &state, const Stages &stages, int first, int last, int ragged)
{
    int warpgroup = threadIdx.x / WARPGROUP, key_group = warpgroup % KEY_GROUPS;
    unsigned queries = stages.queries() + warpgroup / KEY_GROUPS * 8 * EIGHT_ROWS;
    for (int i = key_group; i < last - first; i += KEY_GROUPS) {
        int stage = i % STAGES;
        stages.ring().wait_until_full(i);
        float score[TILE / 2];
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; k++) {
            int at = k / 4 * 1024 + k % 4 * 32;
            wgmma(score, descriptor(queries + at, EIGHT_ROWS, 0), descriptor(stages.keys(stage) + at, EIGHT_ROWS, 0),
                  k == 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
        pin(score);
        if (first + i >= ragged) mask_scores(score, state, (first + i) * TILE);
        softmax_step(score, state);

        unsigned p[TILE / 16][4];
#pragma unroll
        for (int k = 0; k < TILE / 16; k++)
#pragma unroll
            for (int j = 0; j < 4; j++) p[k][j] = pack<KVOperand>(score[k * 8 + j * 2], score[k * 8 + j * 2 + 1]);
        pin(state.sum);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < TILE / 16; k++)
            wgmma(state.sum, p[k], descriptor(stages.values(stage) + k * 2 * EIGHT_ROWS, EIGHT_ROWS, 1024));
        wgmma_commit();
        wgmma_wait<0>();
        pin(state.sum);
        if (threadIdx.x % WARPGROUP == 0) barrier_arrive(stages.ring().empty(stage));
    }
    finish_totals(state);
}

/* Called by all compute warps: their rows of one part; shared memory is that of the tiles. */
__device__ __forceinline__ void write_part(const FragmentRows &state, float *shared, const PartsView &parts, int part,
                                           const QueryRows &rows)
{
    named_barrier<COMPUTE_THREADS>(1);
    int thread = threadIdx.x % WARPGROUP;
    stage_part<HOPPER_ROWS>(state, shared, threadIdx.x / WARPGROUP, thread / WARP * 16 + thread % WARP / 4);
    named_barrier<COMPUTE_THREADS>(1);
    write_part<HOPPER_ROWS, KEY_GROUPS, BLOCK_ROWS, COMPUTE_THREADS, 4>(shared, parts, part, rows);
}
