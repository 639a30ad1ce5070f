/* QUEST's bound (arXiv 2406.10774) of the scores in each page, for some tokens' queries: the sum over channels of
 * max(q smallest, q largest), with q in the bounds' format. Bounds are those of the codes where a group of pages has
 * them (cache/pages.cuh).
 *
 * q [sequences, sequence_tokens, heads, head_dim], tokens [sequences, count], null: all; rows are those of query_index;
 * those without a query are undefined. Writes the prefixes' pages of scores [sequences, kv_heads, rows, stride], and
 * clears marks [sequences, kv_heads, words] for mark_pages.cu.
 *
 * Grid: (kv_heads, blocks that share_of_block divides, rows / PLAIN_ROWS), one warp per page at a time. Must read the
 * bounds of sequences that have active tokens, which it does once for PLAIN_ROWS rows. */
#define LANE_CHANNELS (2 * LARGEST_HEAD_DIM / WARP)

__device__ __forceinline__ bool is_coded(const PageBounds &bounds)
{
    float base = widen(*bounds.base());
    return base == base;
}

__device__ __forceinline__ float decoded(const PageBounds &bounds, int page, int kind, int channel)
{
    int code = bounds.codes(page, kind)[channel / 8] >> code_shift(channel) & 15;
    return widen(coded_bound(bounds.base()[channel], bounds.step()[channel], code));
}

extern "C" __global__ void __launch_bounds__(SCORES_THREADS, 2)
    page_scores(const float *q, const int *tokens, int count, int sequence_tokens, int heads, CachesView caches,
                float *scores, int stride, unsigned *marks, int words, int sequences, int fixed)
{
    wait_for_previous();
    let_next_start();
    extern __shared__ float shared[];
    int dim = caches.head_dim, kv_head = blockIdx.x, group = heads / caches.kv_heads, rows = count * group;
    clear_marks(marks, sequences * caches.kv_heads, words);
    SequenceShare mine = share_of_block(tokens, count, sequences, fixed, (int *)shared, nullptr);
    if (mine.sequence < 0) return;
    int sequence = mine.sequence, first_row = blockIdx.z * PLAIN_ROWS;
    CacheView cache = caches.of(sequence);
    if (tokens) tokens += sequence * count;
    q += (size_t)sequence * sequence_tokens * heads * dim;
    int head = sequence * cache.kv_heads + kv_head; /* among those of all sequences */
    int length = *cache.length, pages = cache.pages(length), chunk_groups = cache.chunk_groups();
    int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    for (int i = threadIdx.x; i < PLAIN_ROWS * 2 * dim; i += blockDim.x) {
        int index = query_index(tokens, first_row + i / (2 * dim), rows, kv_head, group, heads);
        float x = index < 0 ? 0.0f : widen(narrow<KVOperand>(q[(size_t)index * dim + i % dim]));
        /* As it meets the smallest, then the largest keys: the bound is a dot product. */
        shared[i] = i % (2 * dim) < dim ? fminf(x, 0.0f) : fmaxf(x, 0.0f);
    }
    __syncthreads();
    for (int page = mine.part * warps + threadIdx.x / WARP; page < pages; page += mine.parts * warps) {
        PageBounds bounds = cache.bounds(kv_head, page / GROUP_PAGES, chunk_groups);
        bool coded = page / GROUP_PAGES < cache.full_groups(length) && is_coded(bounds);
        float values[LANE_CHANNELS];
#pragma unroll
        for (int i = 0; i < LANE_CHANNELS; i++) {
            int kind = (i * WARP + lane) / dim, channel = (i * WARP + lane) % dim;
            values[i] = kind > 1 ? 0.0f
                        : coded  ? decoded(bounds, page, kind, channel)
                                 : widen(bounds.exact(page, kind)[channel]);
        }
        for (int r = 0; r < PLAIN_ROWS && first_row + r < rows; r++) {
            float score = 0;
#pragma unroll
            for (int i = 0; i < LANE_CHANNELS; i++)
                if (i * WARP + lane < 2 * dim) score += shared[r * 2 * dim + i * WARP + lane] * values[i];
            score = warp_sum(score);
            if (lane == 0) scores[((size_t)head * rows + first_row + r) * stride + page] = score;
        }
    }
}
