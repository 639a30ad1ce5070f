/* Choice of a row's pages of highest score, of equal ones the earlier, by a thread block.
 *
 * A thread holds every THREADS-th page's key, the first KEYS of them in registers. The threshold is found two bits at a
 * time, counting the pages above three candidates: 16 rounds at most, and as a rule some 10, whatever the scores are. */
#define THREADS 512

/* Orders as the floats do: -0 equals 0, NaN is above all. Keys of scores are above 0. */
__device__ __forceinline__ unsigned rising(float x)
{
    if (x != x) return ~0u;
    unsigned bits = __float_as_uint(x + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000;
}

/* Calls take(page, taken, word) for every page and some beyond: word has a bit for each of the warp's 32 pages. */
template <class KeyOf, class Take>
__device__ __forceinline__ void choose_top(int pages, int count, const KeyOf &key_of, const Take &take)
{
    __shared__ int partial[2][3][WARP];
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, rounds = (pages + THREADS - 1) / THREADS;
    auto there = [&](int i) { return i * THREADS + (int)threadIdx.x; };
    auto key_at = [&](int i) { return there(i) < pages ? key_of(there(i)) : 0u; };
    unsigned keys[KEYS];
#pragma unroll
    for (int i = 0; i < KEYS; i++) keys[i] = key_at(i);
    /* Sum over the block's threads; the next call has another turn. */
    auto sum = [&](int x, int turn, int j) {
        x = __reduce_add_sync(~0u, x);
        if (lane == 0) partial[turn][j][warp] = x;
    };
    auto summed = [&](int turn, int j) { return __reduce_add_sync(~0u, lane < THREADS / WARP ? partial[turn][j][lane] : 0); };

    unsigned threshold = 0;
    int above = pages, turn = 0; /* pages of keys >= threshold */
    for (int shift = 30; shift >= 0 && above > count; shift -= 2, turn ^= 1) {
        int found[3] = {};
#pragma unroll
        for (int j = 0; j < 3; j++) {
            unsigned candidate = threshold + ((j + 1u) << shift);
#pragma unroll
            for (int i = 0; i < KEYS; i++) found[j] += keys[i] >= candidate;
            for (int i = KEYS; i < rounds; i++) found[j] += key_at(i) >= candidate;
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
#pragma unroll
        for (int i = 0; i < KEYS; i++) equal += keys[i] == threshold;
        for (int i = KEYS; i < rounds; i++) equal += key_at(i) == threshold;
        sum(equal, turn, 0);
        __syncthreads();
        ties = summed(turn, 0) - left_out;
        turn ^= 1;
    }
    int seen = 0; /* ties in earlier rounds */
    auto settle = [&](int i, unsigned key) {
        bool taken = there(i) < pages && key >= threshold;
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
        take(there(i), taken, __ballot_sync(~0u, taken));
    };
#pragma unroll
    for (int i = 0; i < KEYS; i++)
        if (i < rounds) settle(i, keys[i]);
    for (int i = KEYS; i < rounds; i++) settle(i, key_at(i));
}
