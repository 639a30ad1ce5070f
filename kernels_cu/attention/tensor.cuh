/* Attention of query rows over the cache on tensor cores, by the online softmax, for compute capability 8.0 and later.
 *
 * A thread block has ROW_WARPS * KEY_WARPS warps: a warp has 16 query rows, and of each tile of TENSOR_TILE positions
 * its KEY_WARPS-th. Tiles go through STAGES buffers of shared memory by asynchronous copies, in the cache's layout, so
 * that ldmatrix, or lanes that load codes, have no bank conflicts. All query heads of a kv head share every load.
 *
 * Compiled with HEAD_DIM (a multiple of 64), ROW_WARPS, KEY_WARPS and STAGES. */
static_assert(STAGES >= MIN_STAGES, "one tile is computed while the next one is copied");
static_assert(TENSOR_ROWS == 16, "rows of an A fragment");
#define GROUP_PIECES (position_values(HEAD_DIM) * (int)sizeof(KVValue) / 2) /* of 16 bytes of 8 positions */
#define WARP_KEYS (TENSOR_TILE / KEY_WARPS)
#define THREADS (WARP * ROW_WARPS * KEY_WARPS)
#define TILE_PIECES (TENSOR_TILE / 8 * GROUP_PIECES)
#define TILE_BYTES (TILE_PIECES * 16)
#define BLOCK_ROWS (TENSOR_ROWS * ROW_WARPS)

struct TensorRows : FragmentRows {
    unsigned query[HEAD_DIM / 16][4]; /* scaled A fragments */
};

/* Shared address of 16 bytes of a tile. */
__device__ __forceinline__ unsigned piece_address(unsigned tile, int row, int piece)
{
    return tile + row / 8 * (HEAD_DIM * 16) + piece / 8 * 1024 + row % 8 * 128 + ((piece % 8) ^ (row % 8)) * 16;
}

/* With `tokens`, row r is of token tokens[r / group]. */
__device__ __forceinline__ void load_queries(TensorRows &state, const float *q, const int *tokens,
                                             const QueryRows &rows)
{
    int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    float scale = QUERY_SCALE;
    state.reset(rows.first + threadIdx.x / WARP / KEY_WARPS * TENSOR_ROWS + g);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = min(state.row[half], rows.count - 1), token = row / rows.group;
        const float *from = q + rows.index(tokens ? tokens[token] : token, row) * HEAD_DIM;
#pragma unroll
        for (int k = 0; k < HEAD_DIM / 16; k++) {
            /* As lanes have the channels of keys. */
            int low_at = IS_CODED ? k / 4 * 64 + t * 16 + k % 4 * 4 : k * 16 + t * 2,
                high_at = low_at + (IS_CODED ? 2 : 8);
            float2 low = *(const float2 *)(from + low_at), high = *(const float2 *)(from + high_at);
            state.query[k][half] = pack<KVOperand>(low.x * scale, low.y * scale);
            state.query[k][half + 2] = pack<KVOperand>(high.x * scale, high.y * scale);
        }
    }
}

/* Scores of the warp's rows and its keys of a tile; and the warp's weighted values of a tile, which are added up. */
#if IS_CODED
/* Of 8 keys or values in shared memory: codes of each lane, and the scales of positions 2t and 2t + 1. */
struct CodedGroup {
    unsigned address;

    /* `index` among the warp's groups of a tile. */
    __device__ __forceinline__ CodedGroup(unsigned tile, int index)
    {
        int key_warp = threadIdx.x / WARP % KEY_WARPS;
        address = tile + (key_warp * (WARP_KEYS / 8) + index) * (GROUP_PIECES * 16);
    }
    __device__ __forceinline__ uint4 keys(int channels_64) const
    {
        return load_shared_uint4(address + channels_64 * 512 + threadIdx.x % WARP * 16);
    }
    __device__ __forceinline__ uint2 values(int channels_32) const
    {
        return load_shared_uint2(address + channels_32 * 256 + threadIdx.x % WARP * 8);
    }
    __device__ __forceinline__ float2 scales() const
    {
        return load_shared_float2(address + HEAD_DIM * 8 + threadIdx.x % 4 * 8);
    }
};

__device__ __forceinline__ void scores_of_tile(float (&score)[WARP_KEYS / 2], const TensorRows &state, unsigned keys)
{
#pragma unroll
    for (int n = 0; n < WARP_KEYS / 8; n++) {
        CodedGroup group(keys, n);
#pragma unroll
        for (int c = 0; c < HEAD_DIM / 64; c++) {
            uint4 codes = group.keys(c);
            const unsigned words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const unsigned (&a)[4] = state.query[c * 4 + i];
                mma(score + n * 4, a[0], a[1], a[2], a[3], unpack_codes<false>(words[i]), unpack_codes<true>(words[i]));
            }
        }
        float2 scales = group.scales();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            score[n * 4 + half * 2] *= scales.x;
            score[n * 4 + half * 2 + 1] *= scales.y;
        }
    }
}

__device__ __forceinline__ void accumulate_values(TensorRows &state, const float (&weight)[WARP_KEYS / 2],
                                                  unsigned values)
{
#pragma unroll
    for (int k = 0; k < WARP_KEYS / 16; k++) {
        CodedGroup groups[2] = {{values, 2 * k}, {values, 2 * k + 1}};
        unsigned p[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            float2 scales = groups[j / 2].scales();
            p[j] = pack<KVOperand>(weight[k * 8 + j * 2] * (scales.x * VALUE_FACTOR),
                                   weight[k * 8 + j * 2 + 1] * (scales.y * VALUE_FACTOR));
        }
#pragma unroll
        for (int c = 0; c < HEAD_DIM / 32; c++) {
            uint2 low = groups[0].values(c), high = groups[1].values(c);
            const unsigned lows[2] = {low.x, low.y}, highs[2] = {high.x, high.y};
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float *sum = state.sum + (c * 4 + i * 2) * 4;
                mma(sum, p[0], p[1], p[2], p[3], unpack_codes<false>(lows[i]), unpack_codes<false>(highs[i]));
                mma(sum + 4, p[0], p[1], p[2], p[3], unpack_codes<true>(lows[i]), unpack_codes<true>(highs[i]));
            }
        }
    }
}
#else
__device__ __forceinline__ void scores_of_tile(float (&score)[WARP_KEYS / 2], const TensorRows &state, unsigned keys)
{
    int key_warp = threadIdx.x / WARP % KEY_WARPS, lane = threadIdx.x % WARP;
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 32; k++)
#pragma unroll
        for (int n = 0; n < WARP_KEYS / 8; n++) {
            unsigned b[4]; /* 8 keys, 32 channels */
            load_matrices(b, piece_address(keys, key_warp * WARP_KEYS + n * 8 + lane % 8, k * 4 + lane / 8));
            const unsigned (&low)[4] = state.query[2 * k], (&high)[4] = state.query[2 * k + 1];
            mma(score + n * 4, low[0], low[1], low[2], low[3], b[0], b[1]);
            mma(score + n * 4, high[0], high[1], high[2], high[3], b[2], b[3]);
        }
}

__device__ __forceinline__ void accumulate_values(TensorRows &state, const float (&weight)[WARP_KEYS / 2],
                                                  unsigned values)
{
    int key_warp = threadIdx.x / WARP % KEY_WARPS, lane = threadIdx.x % WARP;
#pragma unroll
    for (int k = 0; k < WARP_KEYS / 16; k++) {
        unsigned p[4];
#pragma unroll
        for (int j = 0; j < 4; j++) p[j] = pack<KVOperand>(weight[k * 8 + j * 2], weight[k * 8 + j * 2 + 1]);
#pragma unroll
        for (int d = 0; d < HEAD_DIM / 16; d++) {
            unsigned b[4]; /* 16 keys, 16 channels */
            int key = key_warp * WARP_KEYS + k * 16 + lane % 16;
            load_matrices_transposed(b, piece_address(values, key, d * 2 + lane / 16));
            mma(state.sum + d * 8, p[0], p[1], p[2], p[3], b[0], b[1]);
            mma(state.sum + d * 8 + 4, p[0], p[1], p[2], p[3], b[2], b[3]);
        }
    }
}
#endif

/* Copies a tile's keys and values, whose groups of positions are contiguous in the cache. */
__device__ __forceinline__ void load_tile(unsigned to, const CacheView &cache, WholePrefix, int kv_head, int tile, int)
{
    const KVValue *keys = cache.group(CACHED_KEYS, kv_head, tile * TENSOR_TILE);
    const KVValue *values = keys + cache.values_after_keys();
#pragma unroll
    for (int i = threadIdx.x; i < TILE_PIECES; i += THREADS) {
        copy_16_bytes_async(to + i * 16, (const uint4 *)keys + i);
        copy_16_bytes_async(to + TILE_BYTES + i * 16, (const uint4 *)values + i);
    }
}

/* From index `end` on there are no pages: zeros. */
__device__ __forceinline__ void load_tile(unsigned to, const CacheView &cache, const ListedPages &where, int kv_head,
                                          int tile, int end)
{
#pragma unroll
    for (int i = threadIdx.x; i < TILE_PIECES; i += THREADS) {
        int index = tile * TENSOR_TILE + i / GROUP_PIECES * 8, piece = i % GROUP_PIECES;
        bool inside = index < end;
        const KVValue *keys = cache.group(CACHED_KEYS, kv_head, where(inside ? index : tile * TENSOR_TILE));
        copy_16_bytes_async(to + i * 16, (const uint4 *)keys + piece, inside);
        copy_16_bytes_async(to + TILE_BYTES + i * 16, (const uint4 *)(keys + cache.values_after_keys()) + piece,
                            inside);
    }
}

/* Tiles first <= tile < last of the positions that `where` gives. Only tiles from `ragged` on have positions that some
 * row does not see. `load_queries` sets the state while the first tiles are on their way, but for the end of a list,
 * limit[0], which is set before. */
template <class Where, class Load>
__device__ __forceinline__ void attend(TensorRows &state, const CacheView &cache, const Where &where, int kv_head,
                                       int first, int last, int ragged, unsigned shared, const Load &load_queries)
{
    int key_warp = threadIdx.x / WARP % KEY_WARPS;
    auto load = [&](int tile) {
        load_tile(shared + (tile - first) % STAGES * (2 * TILE_BYTES), cache, where, kv_head, tile, state.limit[0]);
    };
    start_copies<STAGES>(first, last, load);
    load_queries();
    for (int tile = first; tile < last; tile++) {
        advance_copies<STAGES>(tile, last, load);
        unsigned keys = shared + (tile - first) % STAGES * (2 * TILE_BYTES), values = keys + TILE_BYTES;
        float score[WARP_KEYS / 2] = {};
        scores_of_tile(score, state, keys);
        if (tile >= ragged) mask_scores(score, state, tile * TENSOR_TILE + key_warp * WARP_KEYS);
        softmax_step(score, state);
        accumulate_values(state, score, values);
    }
    finish_totals(state);
}

/* This thread block's rows of one part; shared memory is that of the tiles. */
__device__ __forceinline__ void write_part(const TensorRows &state, float *shared, const PartsView &parts, int part,
                                           const QueryRows &rows)
{
    wait_copies<0>();
    __syncthreads();
    stage_part<TENSOR_ROWS>(state, shared, threadIdx.x / WARP, threadIdx.x % WARP / 4);
    __syncthreads();
    write_part<TENSOR_ROWS, KEY_WARPS, BLOCK_ROWS, THREADS, 1>(shared, parts, part, rows);
}
