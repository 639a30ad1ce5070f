/* Chooses a row's pages of highest score, of equal ones the earlier, by a thread block of TOP_PAGES_THREADS.
 *
 * A thread has every TOP_PAGES_THREADS-th page. 4 threads are a group: at least `count` pages reach a key that `count`
 * groups reach, and rarely many more. Those are collected, and each counts how many precede it. If `count` is close to
 * the number of groups, or too many pages are collected (many tie), the last page's key is found two bits at a time
 * instead, by counting pages.
 *
 * Scores are read again in every round: from the L1 cache. */
#define THREADS TOP_PAGES_THREADS
#define GROUPS (THREADS / 4)
#define KEY_BATCH 8

/* Above 0, and NaN above all. */
__device__ __forceinline__ unsigned page_key(float score) { return score != score ? ~0u : ascending_key(score); }

/* Calls visit(page, key) for all of a thread's pages, and for some past the last page, whose key is 0. KEY_BATCH loads
 * are in flight at once: none of them depends on whether its page is there. */
template <class KeyOf, class Visit>
__device__ __forceinline__ void each_page(int pages, const KeyOf &key_of, const Visit &visit)
{
#pragma unroll 1
    for (int first = 0; first < pages; first += KEY_BATCH * THREADS) {
        unsigned keys[KEY_BATCH];
#pragma unroll
        for (int i = 0; i < KEY_BATCH; i++) keys[i] = key_of(min(first + i * THREADS + (int)threadIdx.x, pages - 1));
#pragma unroll
        for (int i = 0; i < KEY_BATCH; i++) {
            int page = first + i * THREADS + threadIdx.x;
            visit(page, page < pages ? keys[i] : 0u);
        }
    }
}

/* Calls take(page) for each chosen page: for all pages, if there are no more than `count`. */
template <class KeyOf, class Take>
__device__ __forceinline__ void choose_top(int pages, int count, const KeyOf &key_of, const Take &take)
{
    __shared__ u64 collected[THREADS], group_tops[GROUPS];
    __shared__ int partial[2][3][WARP], collected_count;
    __shared__ unsigned reached;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    if (pages <= count) {
        for (int page = threadIdx.x; page < pages; page += THREADS) take(page);
        return;
    }
    if (count <= GROUPS * 3 / 4) {
        unsigned top = 0;
        each_page(pages, key_of, [&](int, unsigned key) { top = max(top, key); });
        /* The group number makes them distinct. */
        int group = threadIdx.x / 4, member = threadIdx.x % 4, above = 0;
        u64 mine = (u64)quad_max(top) << 32 | group;
        if (member == 0) group_tops[group] = mine;
        if (threadIdx.x == 0) collected_count = 0;
        __syncthreads();
#pragma unroll 8
        for (int i = member; i < GROUPS; i += 4) above += group_tops[i] > mine;
        if (quad_sum(above) == count - 1 && member == 0) reached = max((unsigned)(mine >> 32), 1u);
        __syncthreads();
        unsigned lowest = reached;
        auto collect = [&](int page, unsigned key) {
            if (key < lowest) return;
            int at = atomicAdd(&collected_count, 1);
            if (at < THREADS) collected[at] = (u64)key << 32 | ~(unsigned)page;
        };
        if (top >= lowest) each_page(pages, key_of, collect);
        __syncthreads();
        int total = collected_count;
        if (total <= THREADS) {
            if (threadIdx.x < total) {
                u64 one = collected[threadIdx.x];
                int above = 0;
#pragma unroll 8
                for (int i = 0; i < total; i++) above += collected[i] > one;
                if (above < count) take((int)~(unsigned)one);
            }
            return;
        }
    }

    unsigned threshold = 0;
    /* Pages whose keys reach the threshold, and those that reach the lowest candidate above it. */
    int reached_count = pages, above = 0, turn = 0;
    for (int shift = 30; shift >= 0 && reached_count > count; shift -= 2, turn ^= 1) {
        int reach[3] = {};
        each_page(pages, key_of, [&](int, unsigned key) {
            for (unsigned j = 0; j < 3; j++) reach[j] += key >= threshold + ((j + 1) << shift);
        });
        for (int j = 0; j < 3; j++) {
            int of_warp = __reduce_add_sync(~0u, reach[j]);
            if (lane == 0) partial[turn][j][warp] = of_warp;
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < 3; j++) {
            int in_all = __reduce_add_sync(~0u, lane < THREADS / WARP ? partial[turn][j][lane] : 0);
            if (in_all >= count) {
                threshold += 1u << shift;
                reached_count = in_all;
            } else {
                above = max(above, in_all);
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
    each_page(pages, key_of, settle);
}
