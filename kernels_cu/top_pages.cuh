/* Choice of a row's pages of highest score, of equal ones the earlier, by a thread block.
 *
 * A thread holds every THREADS-th page's key, the first KEYS of them in registers. 4 threads are a group: a key that
 * `count` groups reach is reached by `count` pages at least, and as a rule by few more. Those are collected, and each
 * counts how many go before it. Where there are more groups wanted than there are, or too many pages are collected
 * (many tie), the key of the last page is found two bits at a time instead, by counting pages. */
#define THREADS 512
#define GROUPS (THREADS / 4)

/* Orders as the floats do: -0 equals 0, NaN is above all. Keys of scores are above 0. */
__device__ __forceinline__ unsigned rising(float x)
{
    if (x != x) return ~0u;
    unsigned bits = __float_as_uint(x + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000;
}

/* How many of `count` values in shared memory are above x. */
template <class T> __device__ __forceinline__ int count_above(const T *values, int count, T x)
{
    int found = 0;
#pragma unroll 8
    for (int i = 0; i < count; i++) found += values[i] > x;
    return found;
}

/* Calls visit(page, key) for all of a thread's pages and for some beyond the last, of key 0. */
template <class KeyAt, class Visit>
__device__ __forceinline__ void each_page(const unsigned (&keys)[KEYS], int rounds, const KeyAt &key_at,
                                          const Visit &visit)
{
#pragma unroll
    for (int i = 0; i < KEYS; i++) visit(i * THREADS + (int)threadIdx.x, keys[i]);
    for (int page = KEYS * THREADS + threadIdx.x; page < rounds * THREADS; page += THREADS) visit(page, key_at(page));
}

/* Calls take(page) for each page chosen: all, if there are no more than `count`. */
template <class KeyOf, class Take>
__device__ __forceinline__ void choose_top(int pages, int count, const KeyOf &key_of, const Take &take)
{
    __shared__ unsigned long long collected[THREADS], group_tops[GROUPS];
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
        top = max(top, __shfl_xor_sync(~0u, top, 1));
        top = max(top, __shfl_xor_sync(~0u, top, 2));
        int group = threadIdx.x / 4;
        /* No two are equal. */
        unsigned long long mine = (unsigned long long)top << 32 | group;
        if (threadIdx.x % 4 == 0) group_tops[group] = mine;
        if (threadIdx.x == 0) collected_count = 0;
        __syncthreads();
        if (threadIdx.x < GROUPS && count_above(group_tops, GROUPS, group_tops[threadIdx.x]) == count - 1)
            reached = max((unsigned)(group_tops[threadIdx.x] >> 32), 1u);
        __syncthreads();
        unsigned least = reached;
        each_page(keys, rounds, key_at, [&](int page, unsigned key) {
            if (key >= least) {
                int at = atomicAdd(&collected_count, 1);
                if (at < THREADS) collected[at] = (unsigned long long)key << 32 | ~(unsigned)page;
            }
        });
        __syncthreads();
        int found = collected_count;
        if (found <= THREADS) {
            if (threadIdx.x < found) {
                unsigned long long one = collected[threadIdx.x];
                if (count_above(collected, found, one) < count) take((int)~(unsigned)one);
            }
            return;
        }
    }

    /* Sum over the block's threads; the next call has another turn. */
    auto sum = [&](int x, int turn, int j) {
        x = __reduce_add_sync(~0u, x);
        if (lane == 0) partial[turn][j][warp] = x;
    };
    auto summed = [&](int turn, int j) {
        return __reduce_add_sync(~0u, lane < THREADS / WARP ? partial[turn][j][lane] : 0);
    };
    unsigned threshold = 0;
    int above = pages, turn = 0; /* pages of keys >= threshold */
    for (int shift = 30; shift >= 0 && above > count; shift -= 2, turn ^= 1) {
        int found[3] = {};
#pragma unroll
        for (int j = 0; j < 3; j++) {
            unsigned candidate = threshold + ((j + 1u) << shift);
            each_page(keys, rounds, key_at, [&](int, unsigned key) { found[j] += key >= candidate; });
            sum(found[j], turn, j);
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < 3; j++) found[j] = summed(turn, j);
        int best = found[2] >= count ? 3 : found[1] >= count ? 2 : found[0] >= count ? 1 : 0;
        threshold += (unsigned)best << shift;
        if (best) above = found[best - 1];
    }
    /* More than `count` only if pages tie at the threshold; then the last of those are left out. */
    int left_out = max(0, above - count), ties = 0;
    if (left_out) {
        int equal = 0;
        each_page(keys, rounds, key_at, [&](int, unsigned key) { equal += key == threshold; });
        sum(equal, turn, 0);
        __syncthreads();
        ties = summed(turn, 0) - left_out;
        turn ^= 1;
    }
    int seen = 0; /* ties in earlier rounds */
    auto settle = [&](int page, unsigned key) {
        bool taken = page < pages && key >= threshold;
        if (left_out) {
            unsigned equal = __ballot_sync(~0u, taken && key == threshold);
            if (lane == 0) partial[turn][0][warp] = __popc(equal);
            __syncthreads();
            int of_warp = lane < THREADS / WARP ? partial[turn][0][lane] : 0;
            int before = seen + __reduce_add_sync(~0u, lane < warp ? of_warp : 0) + __popc(equal & ((1u << lane) - 1));
            seen += __reduce_add_sync(~0u, of_warp);
            taken = taken && (key > threshold || before < ties);
            turn ^= 1;
        }
        if (taken) take(page);
    };
    each_page(keys, rounds, key_at, settle);
}
