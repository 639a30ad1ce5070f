/* Whose rows a thread block has: of which sequence, from which row on, and that sequence's tokens (null: all). */
struct SequenceRows {
    int sequence, first_row;
    const int *tokens;

    /* tokens [sequences, count], null: all; a grid's z counts blocks of block_rows of the count * group rows. */
    __device__ __forceinline__ SequenceRows(const int *tokens, int count, int group, int block_rows)
    {
        int blocks = (count * group + block_rows - 1) / block_rows;
        sequence = blockIdx.z / blocks, first_row = blockIdx.z % blocks * block_rows;
        this->tokens = tokens ? tokens + sequence * count : nullptr;
    }
};

/* Which of a pass's blocks are of a cache. Without `rides` every cache has `per_cache`; else the first *rides caches
 * have two, a commit and the block after it, and all others one. The host copies *rides before the pass. */
struct CacheBlocks {
    int first, count;

    __device__ __forceinline__ CacheBlocks(int cache, const int *rides, int per_cache)
        : first(cache * per_cache), count(per_cache)
    {
        if (!rides) return;
        int riding = *rides;
        first = cache + min(cache, riding), count = 1 + (cache < riding);
    }

    static __device__ __forceinline__ int cache_of(int block, const int *rides, int per_cache)
    {
        return !rides ? block / per_cache : block < 2 * *rides ? block / 2 : block - *rides;
    }
};

/* A thread block's share of the work on one of several sequences. */
struct SequenceShare {
    int sequence, part, parts; /* -1: there is nothing to do */
};

/* Divides the thread blocks of a grid's y among sequences, as a list of work for the device to make: in proportion to
 * their active tokens, at least one to each that has any. tokens [sequences, count], -1 after the last; null: all are
 * active. With `fixed` every sequence has that many thread blocks.
 *
 * Called by all threads of a block of whole warps, when `tokens` are known. `scratch` has room for so many ints;
 * gridDim.y >= sequences. One thread block writes starts [sequences + 1], if not null: everyone's first. */
__device__ __forceinline__ SequenceShare share_of_block(const int *tokens, int count, int sequences, int fixed,
                                                        int *scratch, int *starts)
{
    int block = blockIdx.y, blocks = gridDim.y, lane = threadIdx.x % WARP;
    if (fixed) return {block / fixed, block % fixed, fixed};
    for (int i = threadIdx.x; i < sequences; i += blockDim.x) scratch[i] = tokens ? 0 : count;
    __syncthreads();
    for (int i = threadIdx.x; tokens && i < sequences * count; i += blockDim.x)
        if (tokens[i] >= 0) atomicAdd(scratch + i / count, 1);
    __syncthreads();
    /* A lane has some consecutive sequences. */
    int each = (sequences + WARP - 1) / WARP, begin = min(sequences, lane * each), end = min(sequences, begin + each);
    int weight = 0, having = 0;
    for (int i = begin; i < end; i++) weight += scratch[i], having += scratch[i] > 0;
    int weights_through = weight, having_through = having;
    for (int step = 1; step < WARP; step *= 2) {
        int other_weight = __shfl_up_sync(~0u, weights_through, step);
        int other_having = __shfl_up_sync(~0u, having_through, step);
        if (lane >= step) weights_through += other_weight, having_through += other_having;
    }
    int all = __shfl_sync(~0u, weights_through, WARP - 1), rest = blocks - __shfl_sync(~0u, having_through, WARP - 1);
    weight = weights_through - weight, having = having_through - having; /* before this lane's */
    auto first = [&]() { return all ? having + (int)((unsigned)rest * weight / all) : 0; };
    bool writes = starts && blockIdx.x + blockIdx.y + blockIdx.z == 0 && threadIdx.x < WARP;
    SequenceShare mine = {-1, 0, 1};
    for (int i = begin; i < end; i++) {
        int start = first();
        weight += scratch[i], having += scratch[i] > 0;
        if (start <= block && block < first()) mine = {i, block - start, first() - start};
        if (writes) starts[i] = start;
    }
    if (writes && lane == 0) starts[sequences] = all ? blocks : 0;
    unsigned found = __ballot_sync(~0u, mine.sequence >= 0);
    int source = found ? __ffs(found) - 1 : 0;
    mine.sequence = __shfl_sync(~0u, mine.sequence, source);
    mine.part = __shfl_sync(~0u, mine.part, source), mine.parts = __shfl_sync(~0u, mine.parts, source);
    __syncthreads(); /* scratch may be used for something else */
    return mine;
}

/* What part number `part` takes of some tiles; tiles * parts < 2^32, since division of 64 bits takes long. */
struct TileRange {
    int first, last;
};

__device__ __forceinline__ TileRange tiles_of_part(unsigned tiles, unsigned part, unsigned parts)
{
    return {(int)(tiles * part / parts), (int)(tiles * (part + 1) / parts)};
}
