/* A token for each masked row, with its probability and the entropy of the row's whole distribution at
 * the temperature, in nats.
 *
 * temperature 0 is greedy. Otherwise the k highest logits are kept (and what ties with the last; 0:
 * all), of those the most probable up to and including the one that takes their sum above top_p (and
 * what ties with it), and the draw is the first token whose cumulative weight is above uniform * total.
 * finite is 0 where the row has a NaN or its maximum is no finite number. The results of row rows[i] go to i.
 *
 * Grid: tokens, 1024 threads; block i takes row rows[i], if i < *count; the others write zeros. Greedy rows
 * read their slices only; the rest twice their logits, and 4 times more for top_k, 5 times for top_p. */
#define THREADS 1024

/* Orders as the floats do. */
__device__ __forceinline__ unsigned rising(float x)
{
    unsigned bits = __float_as_uint(x + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

/* The largest key such that keys of it and above measure `goal` or more together, or 0; by digits of 8 bits from
 * the top. Measures are whole numbers, so that their sum does not depend on the order. */
template <class Measure>
__device__ unsigned threshold(const float *logits, int vocab, unsigned lowest, unsigned long long goal,
                              unsigned long long *bins, Measure measure)
{
    __shared__ unsigned digit_found;
    __shared__ unsigned long long above_found;
    unsigned prefix = 0, mask = 0;
    unsigned long long above = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        __syncthreads();
        if (threadIdx.x < 256) bins[threadIdx.x] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < vocab; i += THREADS) {
            unsigned key = rising(logits[i]);
            unsigned long long size = key >= lowest && (key & mask) == prefix ? measure(logits[i]) : 0;
            if (size) atomicAdd(bins + (key >> shift & 255), size);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int digit = 255;
            while (digit > 0 && above + bins[digit] < goal) above += bins[digit--];
            digit_found = digit;
            above_found = above;
        }
        __syncthreads();
        above = above_found;
        prefix |= digit_found << shift;
        mask |= 255u << shift;
    }
    return prefix;
}

__device__ double block_sum_double(double x, double *shared)
{
    for (int lane = WARP / 2; lane; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
    __syncthreads();
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
    __syncthreads();
    x = 0;
    for (int warp = 0; warp < THREADS / WARP; warp++) x += shared[warp];
    return x;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    sample(const Row *slices, int slice_count, const float *logits, int vocab, const int *rows, const int *count,
           const double *uniforms, float temperature, int top_k, double top_p, int *tokens, float *confidence,
           float *entropy, int *finite)
{
    let_next_start();
    __shared__ Row shared_row;
    __shared__ double sums[WARP], cumulative[THREADS];
    __shared__ unsigned long long bins[256];
    __shared__ int chosen;
    wait_for_previous();
    if (blockIdx.x >= *count) {
        /* They travel to the host with the others. */
        if (threadIdx.x == 0) {
            tokens[blockIdx.x] = finite[blockIdx.x] = 0;
            confidence[blockIdx.x] = entropy[blockIdx.x] = 0;
        }
        return;
    }
    int place = rows[blockIdx.x];
    bool greedy = temperature == 0;
    if (greedy) temperature = 1;
    if (threadIdx.x < WARP) {
        Row mine = {-INFINITE, vocab, 1, 0, 0};
        for (int i = threadIdx.x; i < slice_count; i += WARP) join(mine, slices[blockIdx.x * slice_count + i], temperature);
        join_warp(mine, temperature);
        if (threadIdx.x == 0) shared_row = mine;
    }
    __syncthreads();
    Row row = shared_row;
    bool sound = row.sound && row.top < INFINITE && row.top > -INFINITE;
    if (threadIdx.x == 0) {
        finite[blockIdx.x] = sound;
        entropy[blockIdx.x] = (float)(log(row.total) - row.moment / row.total);
        tokens[blockIdx.x] = row.token;
        confidence[blockIdx.x] = (float)(1.0 / row.total);
    }
    if (greedy || !sound) return;

    logits += (size_t)place * vocab;
    auto weight_of = [&](float logit) { return expf((logit - row.top) / temperature); };
    unsigned lowest = rising(-INFINITE) + 1; /* the mask token's logit is -inf */
    if (top_k > 0 && top_k < vocab)
        lowest = max(lowest, threshold(logits, vocab, lowest, top_k, bins, [](float) { return 1ull; }));
    if (top_p < 1) {
        double weights = 0;
        for (int i = threadIdx.x; i < vocab; i += THREADS)
            if (rising(logits[i]) >= lowest) weights += weight_of(logits[i]);
        double total = block_sum_double(weights, sums);
        /* Weights in units of 2^-40: 2^18 of them do not overflow. */
        const double unit = 1099511627776.0;
        auto measure = [&](float logit) { return (unsigned long long)(weight_of(logit) * unit); };
        unsigned long long goal = (unsigned long long)(top_p * total * unit) + 1;
        lowest = max(lowest, threshold(logits, vocab, lowest, goal, bins, measure));
    }

    /* Threads take consecutive tokens, so that the cumulative weight rises with the thread. */
    int step = (vocab + THREADS - 1) / THREADS, first = threadIdx.x * step, last = min(first + step, vocab);
    double mine = 0;
    for (int i = first; i < last; i++)
        if (rising(logits[i]) >= lowest) mine += weight_of(logits[i]);
    cumulative[threadIdx.x] = mine;
    __syncthreads();
    if (threadIdx.x == 0) {
        double sum = 0;
        for (int i = 0; i < THREADS; i++) {
            double next = sum + cumulative[i];
            cumulative[i] = sum;
            sum = next;
        }
        sums[0] = sum;
        chosen = vocab;
    }
    __syncthreads();
    double total = sums[0], drawn = uniforms[place] * total, sum = cumulative[threadIdx.x];
    for (int i = first; i < last; i++) {
        float weight = rising(logits[i]) >= lowest ? weight_of(logits[i]) : 0.0f;
        sum += weight;
        if (weight > 0 && sum > drawn) {
            atomicMin(&chosen, i);
            break;
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        /* Rounding may leave the last draw above every sum: then the most probable token it is. */
        int token = chosen < vocab ? chosen : row.token;
        tokens[blockIdx.x] = token;
        confidence[blockIdx.x] = (float)(weight_of(logits[token]) / total);
    }
}
