/* Chooses a row's pages of highest score, of equal ones the earlier, by a thread block of TOP_PAGES_THREADS.
 *
 * A thread has the key of every TOP_PAGES_THREADS-th page, the first KEYS of them in registers. 4 threads are a group:
 * at least `count` pages reach a key that `count` groups reach, and rarely many more. Those are collected, and each
 * counts how many precede it. If `count` is close to the number of groups, or too many pages are collected (many tie),
 * the last page's key is found two bits at a time instead, by counting pages.
 *
 * Compiled with KEYS, up to TOP_PAGES_MAX_KEYS. */
static_assert(KEYS <= TOP_PAGES_MAX_KEYS, "keys in registers");
#define THREADS TOP_PAGES_THREADS
#define GROUPS (THREADS / 4)

/* Above 0, and NaN above all. */
__device__ __forceinline__ unsigned page_key(float score) { return score != score ? ~0u : ascending_key(score); }

/* How many of `count` values in shared memory are above x. */
template <class T> __device__ __forceinline__ int count_above(const T *values, int count, T x)
{
    int above = 0;
#pragma unroll 8
    for (int i = 0; i < count; i++) above += values[i] > x;
    return above;
}

/* Calls visit(page, key) for all of a thread's pages, and for some past the last page, whose key is 0. */
template <class KeyAt, class Visit>
__device__ __forceinline__ void each_page(const unsigned (&keys)[KEYS], int rounds, const KeyAt &key_at,
                                          const Visit &visit)
{
#pragma unroll
    for (int i = 0; i < KEYS; i++) visit(i * THREADS + (int)threadIdx.x, keys[i]);
    for (int page = KEYS * THREADS + threadIdx.x; page < rounds * THREADS; page += THREADS) visit(page, key_at(page));
}

/* Calls take(page) for each chosen page: for all pages, if there are no more than `count`. */
template <class KeyOf, class Take>
__device__ __forceinline__ void choose_top(int pages, int count, const KeyOf &key_of, const Take &take)
{
    __shared__ u64 collected[THREADS], group_tops[GROUPS];
    __shared__ int partial[2][3][WARP], collected_count;
    __shared__ unsigned reached;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, rounds = (pages + THREADS - 1) / THREADS;
    auto key_at = [&](int page) { return page < pages ? key_of(page) : 0u; };
    if (pages <= count) {
        for (int page = threadIdx.x; page < pages; page += THREADS) take(page);
        return;
    }
    unsigned keys[KEYS];
#pragma unroll
    for (int i = 0; i < KEYS; i++) keys[i] = key_at(i * THREADS + threadIdx.x);

    if (count <= GROUPS * 3 / 4) {
        unsigned top = 0;
        each_page(keys, rounds, key_at, [&](int, unsigned key) { top = max(top, key); });
        top = quad_max(top);
        int group = threadIdx.x / 4;
        /* The group number makes them distinct. */
        u64 mine = (u64)top << 32 | group;
        if (threadIdx.x % 4 == 0) group_tops[group] = mine;
        if (threadIdx.x == 0) collected_count = 0;
        __syncthreads();
        if (threadIdx.x < GROUPS && count_above(group_tops, GROUPS, group_tops[threadIdx.x]) == count - 1)
            reached = max((unsigned)(group_tops[threadIdx.x] >> 32), 1u);
        __syncthreads();
        unsigned lowest = reached;
        each_page(keys, rounds, key_at, [&](int page, unsigned key) {
            if (key >= lowest) {
                int at = atomicAdd(&collected_count, 1);
                if (at < THREADS) collected[at] = (u64)key << 32 | ~(unsigned)page;
            }
        });
        __syncthreads();
        int total = collected_count;
        if (total <= THREADS) {
            if (threadIdx.x < total) {
                u64 one = collected[threadIdx.x];
                if (count_above(collected, total, one) < count) take((int)~(unsigned)one);
            }
            return;
        }
    }

    unsigned threshold = 0;
    /* Pages whose keys reach the threshold, and those that reach the lowest candidate above it. */
    int reached_count = pages, above = 0, turn = 0;
    for (int shift = 30; shift >= 0 && reached_count > count; shift -= 2, turn ^= 1) {
#pragma unroll
        for (int j = 0; j < 3; j++) {
            unsigned candidate = threshold + ((j + 1u) << shift);
            int reach = 0;
            each_page(keys, rounds, key_at, [&](int, unsigned key) { reach += key >= candidate; });
            reach = __reduce_add_sync(~0u, reach);
            if (lane == 0) partial[turn][j][warp] = reach;
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < 3; j++) {
            int reach = __reduce_add_sync(~0u, lane < THREADS / WARP ? partial[turn][j][lane] : 0);
            if (reach >= count) {
                threshold += 1u << shift;
                reached_count = reach;
            } else {
                above = max(above, reach);
            }
        }
    }
    /* There are more than `count` only if pages tie at the threshold; then the last of those are left out. */
    int seen = 0; /* ties in earlier rounds */
    auto settle = [&](int page, unsigned key) {
        bool taken = page < pages && key >= threshold;
        if (reached_count > count) {
            unsigned equal = __ballot_sync(~0u, taken && key == threshold);
            if (lane == 0) partial[turn][0][warp] = __popc(equal);
            __syncthreads();
            int of_warp = lane < THREADS / WARP ? partial[turn][0][lane] : 0;
            int before = seen + __reduce_add_sync(~0u, lane < warp ? of_warp : 0) + __popc(equal & ((1u << lane) - 1));
            seen += __reduce_add_sync(~0u, of_warp);
            taken = taken && (key > threshold || above + before < count);
            turn ^= 1;
        }
        if (taken) take(page);
    };
    each_page(keys, rounds, key_at, settle);
}
