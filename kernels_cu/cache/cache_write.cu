/* Writes k, v [tokens, kv_heads, head_dim] of each cache, `tokens` of every `stride` rows, into it from position
 * `length` on, unless kv_quantize has, includes the keys, as they are held, in the bounds of their pages, and codes the
 * bounds of groups of pages that they fill. Where there is no cache nothing is written; with `rides` only of the first
 * *rides caches.
 *
 * A page's first position starts its bounds. A key that is not finite becomes NaN: so does its score, whatever the
 * query, and it shows in the logits. A group with such a key is not coded: its other pages' bounds would be lost.
 *
 * Grid: (kv_heads, groups that the tokens can touch, caches); a thread has a channel of every (blockDim / channels)-th
 * page. Must read k and v and write them once. */
#define LEAST_FLOAT16_STEP 0x1p-17f /* less is subnormal to less than 8 bits */

__device__ __forceinline__ int channel_threads(int head_dim) { return (head_dim + WARP - 1) / WARP * WARP; }

/* The next larger number; x is finite. */
template <class T> __device__ __forceinline__ T next_up(T x)
{
    return {(unsigned short)(x.bits == 0x8000 ? 1 : x.bits & 0x8000 ? x.bits - 1 : x.bits + 1)};
}
__device__ __forceinline__ float next_up(float x) { return x; } /* which holds all bounds */

/* A bound of float32 keys: with `kind` 0 the nearest number that is not above x, else that is not below it. */
__device__ __forceinline__ KVOperand outward(float x, int kind)
{
    float up = kind ? x : -x;
    KVOperand bound = narrow<KVOperand>(up);
    if (widen(bound) < up) bound = next_up(bound);
    return kind ? bound : narrow<KVOperand>(-widen(bound));
}

__device__ __forceinline__ void write_page(const CacheView &cache, const PageBounds &bounds, const float *k,
                                           const float *v, int head, int channel, int page, int first, int last,
                                           int position_of_row_0)
{
    KVOperand *low = bounds.exact(page, 0) + channel, *high = bounds.exact(page, 1) + channel;
    bool starts = first == page * cache.page_size;
    float smallest = starts ? INFINITE : widen(*low), largest = starts ? -INFINITE : widen(*high);
    for (int position = first; position < last; position++) {
        float key;
        if (IS_CODED) {
            key = cache.value(CACHED_KEYS, head, position, channel);
        } else {
            size_t from = ((size_t)(position - position_of_row_0) * cache.kv_heads + head) * cache.head_dim + channel;
            KVValue stored = narrow<KVValue>(k[from]);
            key = widen(stored);
            if (!(key - key == 0)) stored = narrow<KVValue>(key = NOT_A_NUMBER);
            *cache.at(CACHED_KEYS, head, position, channel) = stored;
            *cache.at(CACHED_VALUES, head, position, channel) = narrow<KVValue>(v[from]);
        }
        /* A NaN bound stays NaN. */
        if (!(key >= smallest)) smallest = smallest == smallest ? key : smallest;
        if (!(key <= largest)) largest = largest == largest ? key : largest;
    }
    *low = outward(smallest, 0);
    *high = outward(largest, 1);
}

/* The least step of 8 significant bits, of float16 one that it holds exactly, by which code 15 reaches `largest`. */
__device__ __forceinline__ KVOperand step_of(KVOperand base, float largest)
{
    unsigned bits = __float_as_uint((largest - widen(base)) / 15) + 0xffff;
    bits &= 0xffff0000;
    if (LOSART_KV_OPERANDS == FLOAT16) bits = max(bits, __float_as_uint(LEAST_FLOAT16_STEP));
    if (!(widen(coded_bound(base, narrow<KVOperand>(__uint_as_float(bits)), 15)) >= largest)) bits += 0x10000;
    return narrow<KVOperand>(__uint_as_float(bits));
}

/* Of the 16 values: with `kind` 0 the code of the largest that is not above the bound, else of the smallest that is
 * not below it. */
__device__ __forceinline__ unsigned code_of(KVOperand base, KVOperand step, float bound, int kind)
{
    int steps = 0; /* from the end that bounds whatever is there */
#pragma unroll
    for (int more = 8; more; more /= 2) {
        int code = kind ? 15 - steps - more : steps + more;
        float value = widen(coded_bound(base, step, code));
        if (kind ? value >= bound : value <= bound) steps += more;
    }
    return kind ? 15 - steps : steps;
}

/* Called by all threads once the bounds of all pages are written. */
__device__ __forceinline__ void code_bounds(const PageBounds &bounds, int channel, int row, int rows)
{
    __shared__ float lows[CACHE_WRITE_THREADS], highs[CACHE_WRITE_THREADS];
    int channels = channel_threads(bounds.head_dim);
    bool exists = channel < bounds.head_dim;
    float smallest = INFINITE, largest = -INFINITE;
    for (int page = row; page < GROUP_PAGES && exists; page += rows) {
        float low = widen(bounds.exact(page, 0)[channel]), high = widen(bounds.exact(page, 1)[channel]);
        smallest = low >= smallest ? smallest : low;
        largest = high <= largest ? largest : high;
        if (low != low) break; /* and stays */
    }
    lows[threadIdx.x] = smallest, highs[threadIdx.x] = largest;
    __syncthreads();
    bool finite = true;
    for (int i = 0; i < rows; i++) {
        float low = lows[i * channels + channel], high = highs[i * channels + channel];
        finite &= low == low;
        smallest = fminf(smallest, low), largest = fmaxf(largest, high);
    }
    KVOperand base = narrow<KVOperand>(smallest), step = step_of(base, largest);
    float reached = widen(coded_bound(base, step, 15));
    finite &= reached - reached == 0;
    if (__syncthreads_or(exists && !finite)) base = narrow<KVOperand>(NOT_A_NUMBER);
    if (row == 0 && exists) bounds.base()[channel] = base, bounds.step()[channel] = step;
    for (int page = row; page < GROUP_PAGES; page += rows)
        for (int kind = 0; kind < 2; kind++) {
            unsigned word = 0;
            if (exists)
                word = code_of(base, step, widen(bounds.exact(page, kind)[channel]), kind) << code_shift(channel);
            for (int other = 1; other < 8; other *= 2) word |= __shfl_xor_sync(~0u, word, other);
            if (exists && channel % 8 == 0) bounds.codes(page, kind)[channel / 8] = word;
        }
}

extern "C" __global__ void __launch_bounds__(CACHE_WRITE_THREADS)
    cache_write(CachesView caches, const float *k, const float *v, int tokens, int stride, int sequences,
                const int *rides)
{
    let_next_start();
    wait_for_previous();
    if (rides && blockIdx.z >= *rides) return;
    CacheView cache = caches.of(blockIdx.z * sequences);
    if (!cache.kv_chunks) return;
    int channels = channel_threads(cache.head_dim), channel = threadIdx.x % channels, row = threadIdx.x / channels;
    int rows = blockDim.x / channels, head = blockIdx.x, length = *cache.length, end = length + tokens;
    int group = cache.full_groups(length) + blockIdx.y, first_page = group * GROUP_PAGES;
    if (first_page * cache.page_size >= end) return;
    PageBounds bounds = cache.bounds(head, group, cache.chunk_groups());
    for (int page = first_page + row; page < first_page + GROUP_PAGES; page += rows) {
        int first = max(length, page * cache.page_size), last = min(end, (page + 1) * cache.page_size);
        if (channel < cache.head_dim && first < last)
            write_page(cache, bounds, k, v, head, channel, page, first, last, length - (int)blockIdx.z * stride);
    }
    if (cache.full_groups(end) <= group) return;
    __syncthreads();
    code_bounds(bounds, channel, row, rows);
}
