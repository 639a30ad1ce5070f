/* The `count` pages of highest score of each row, of equal ones the earlier; -0 equals 0, NaN is above all.
 *
 * scores [kv_heads, sums, rows, stride]: a page's score is the sum over `sums`, and over its `units` values, of
 * which the last page may have fewer.
 * Rows of a token tokens[row / group] < 0 select none.
 * With UNITE, the rows of a kv head are united: marks [kv_heads, words], a bit a page, are 0 between launches, as is
 * done [kv_heads]; ids [kv_heads, capacity] gets the pages, rising, counts [kv_heads] how many, and *positions rises
 * by those that they hold; the block that ends last of a kv head makes its list. Without, ids [kv_heads, rows, count]
 * gets each row's pages, in any order, and -1 where there are fewer.
 *
 * Grid: (rows, kv_heads), 512 threads. A thread holds every 512th page's score, the first KEYS of them in
 * registers. The threshold is found bit by bit, counting the pages above it: 32 rounds at most, and as a rule
 * some 20, whatever the scores are. Moves the scores in. */
#define THREADS 512

/* Orders as the floats do. */
__device__ __forceinline__ unsigned rising(float x)
{
    if (x != x) return ~0u;
    unsigned bits = __float_as_uint(x + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000;
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    top_pages(const float *scores, int sums, int units, int stride, const int *cache_length, int page_size,
              const int *tokens, int group, int count, int *ids, int capacity, unsigned *marks, int words,
              unsigned *done, int *counts, int *positions)
{
    __shared__ int partial[2][WARP], filled;
    __shared__ bool last;
    wait_for_previous();
    let_next_start();
    int row = blockIdx.x, rows = gridDim.x, kv_head = blockIdx.y, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    bool none = tokens && tokens[row / group] < 0;
    if (none && !UNITE) return;
    int length = *cache_length, pages = none ? 0 : (length + page_size - 1) / page_size;
    int rounds = (pages + THREADS - 1) / THREADS;
    auto key_of = [&](int page) {
        if (page >= pages) return 0u;
        float score = 0;
        int unit = page_size / units, there = min(units, (length - page * page_size + unit - 1) / unit);
        for (int s = 0; s < sums; s++) {
            const float *from = scores + (((size_t)kv_head * sums + s) * rows + row) * stride + (size_t)page * units;
            for (int u = 0; u < there; u++) score = s + u ? score + from[u] : from[u];
        }
        return rising(score);
    };
    unsigned keys[KEYS];
#pragma unroll
    for (int i = 0; i < KEYS; i++) keys[i] = i < rounds ? key_of(i * THREADS + threadIdx.x) : 0u;
    auto sum_of_block = [&](int x, int turn) {
        x = __reduce_add_sync(~0u, x);
        if (lane == 0) partial[turn & 1][warp] = x;
        __syncthreads();
        return __reduce_add_sync(~0u, lane < THREADS / WARP ? partial[turn & 1][lane] : 0);
    };
    /* Keys of pages are above 0: that of -inf is 0x007fffff. */
    unsigned threshold = 0;
    int above = pages; /* pages of keys >= threshold, if not 0 */
    for (int bit = 31; bit >= 0 && above > count; bit--) {
        unsigned next = threshold | 1u << bit;
        int found = 0;
#pragma unroll
        for (int i = 0; i < KEYS; i++) found += keys[i] >= next;
        for (int i = KEYS; i < rounds; i++) found += key_of(i * THREADS + threadIdx.x) >= next;
        found = sum_of_block(found, bit);
        if (found >= count) threshold = next, above = found;
    }
    /* More than `count` only if pages tie at the threshold; then the last of those are left out. */
    int left_out = max(0, above - count), ties = 0;
    if (left_out) {
        int equal = 0;
#pragma unroll
        for (int i = 0; i < KEYS; i++) equal += keys[i] == threshold;
        for (int i = KEYS; i < rounds; i++) equal += key_of(i * THREADS + threadIdx.x) == threshold;
        __syncthreads();
        ties = sum_of_block(equal, 0) - left_out;
    }
    if (threadIdx.x == 0) filled = 0;
    __syncthreads();
    int seen = 0; /* ties in earlier rounds */
    auto take = [&](int i, unsigned key) {
        int page = i * THREADS + threadIdx.x;
        bool taken = page < pages && key >= threshold;
        if (left_out) {
            unsigned equal = __ballot_sync(~0u, taken && key == threshold);
            if (lane == 0) partial[i & 1][warp] = __popc(equal);
            __syncthreads();
            int there = lane < THREADS / WARP ? partial[i & 1][lane] : 0;
            int before = seen + __reduce_add_sync(~0u, lane < warp ? there : 0) + __popc(equal & ((1u << lane) - 1));
            seen += __reduce_add_sync(~0u, there);
            taken = taken && (key > threshold || before < ties);
        }
        unsigned word = __ballot_sync(~0u, taken);
        if (UNITE) {
            if (lane == 0 && word) atomicOr(marks + (size_t)kv_head * words + page / WARP, word);
        } else if (taken) {
            ids[((size_t)kv_head * rows + row) * count + atomicAdd(&filled, 1)] = page;
        }
    };
#pragma unroll
    for (int i = 0; i < KEYS; i++)
        if (i < rounds) take(i, keys[i]);
    for (int i = KEYS; i < rounds; i++) take(i, key_of(i * THREADS + threadIdx.x));
    if (UNITE) __threadfence();
    __syncthreads();
    if (!UNITE) {
        for (int i = filled + threadIdx.x; i < count; i += THREADS) ids[((size_t)kv_head * rows + row) * count + i] = -1;
        return;
    }
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicInc(done + kv_head, rows - 1) == rows - 1;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    pages = (length + page_size - 1) / page_size;
    list_marked(marks + (size_t)kv_head * words, pages, length, page_size, ids + (size_t)kv_head * capacity,
                counts + kv_head, positions, partial);
}
