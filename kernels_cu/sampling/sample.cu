/* A token for each proposing row, with its probability, and the entropy in nats of the row's whole distribution at the
 * temperature.
 *
 * Temperature 0 is greedy. Otherwise the top_k highest logits are kept (and ties with the last; 0: all), and of those
 * the most probable up to and including the one that brings their sum above top_p (and ties with it); the draw is the
 * first token whose cumulative weight is above uniform * total. `finite` is 0 where the row has a NaN, or its maximum
 * is not finite.
 *
 * Slices and logits are those of some proposing rows, from `first_row` on; results are of all.
 *
 * Grid: tokens; thread block i takes proposing row first_row + i, if there are more than so many by *proposed_count;
 * the others write zeros. Greedy rows read only their slices; the others read their logits twice, 4 times more for
 * top_k, and 5 times more for top_p. */
#define THREADS SAMPLE_THREADS

/* The largest key such that it and the keys above it measure at least `goal` together, or 0; by 8-bit digits from the
 * highest. Measures are integers, so that their sum does not depend on the order. */
template <class Measure>
__device__ unsigned threshold(const float *logits, int vocab, unsigned lowest, u64 goal, u64 *bins, Measure measure)
{
    __shared__ unsigned shared_digit;
    __shared__ u64 shared_above;
    unsigned prefix = 0, mask = 0;
    u64 above = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        __syncthreads();
        if (threadIdx.x < 256) bins[threadIdx.x] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < vocab; i += THREADS) {
            unsigned key = ascending_key(logits[i]);
            u64 size = key >= lowest && (key & mask) == prefix ? measure(logits[i]) : 0;
            if (size) atomicAdd(bins + (key >> shift & 255), size);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int digit = 255;
            while (digit > 0 && above + bins[digit] < goal) above += bins[digit--];
            shared_digit = digit;
            shared_above = above;
        }
        __syncthreads();
        above = shared_above;
        prefix |= shared_digit << shift;
        mask |= 255u << shift;
    }
    return prefix;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    sample(const Row *slices, int slice_count, const float *logits, int vocab, BatchView batch, int first_row,
           int *tokens, float *confidence, float *entropy, int *finite)
{
    let_next_start();
    __shared__ Row shared_row;
    __shared__ double sums[WARP], cumulative[THREADS];
    __shared__ u64 bins[256];
    __shared__ int chosen;
    wait_for_previous();
    int index = first_row + blockIdx.x;
    if (index >= *batch.proposed_count) {
        /* They are copied to the host with the others. */
        if (threadIdx.x == 0) {
            tokens[index] = finite[index] = 0;
            confidence[index] = entropy[index] = 0;
        }
        return;
    }
    float temperature = batch.temperature[index];
    int top_k = batch.top_k[index];
    double top_p = batch.top_p[index];
    bool greedy = temperature == 0;
    if (greedy) temperature = 1;
    if (threadIdx.x < WARP) {
        Row mine = {-INFINITE, vocab, 1, 0, 0};
        for (int i = threadIdx.x; i < slice_count; i += WARP)
            join(mine, slices[blockIdx.x * slice_count + i], temperature);
        join_warp(mine, temperature);
        if (threadIdx.x == 0) shared_row = mine;
    }
    __syncthreads();
    Row row = shared_row;
    bool sound = row.sound && row.top < INFINITE && row.top > -INFINITE;
    if (threadIdx.x == 0) {
        finite[index] = sound;
        entropy[index] = (float)(log(row.total) - row.moment / row.total);
        tokens[index] = row.token;
        confidence[index] = (float)(1.0 / row.total);
    }
    if (greedy || !sound) return;

    logits += (size_t)(batch.logits[index] - first_row) * vocab;
    auto weight_of = [&](float logit) { return expf((logit - row.top) / temperature); };
    unsigned lowest = ascending_key(-INFINITE) + 1; /* the mask token's logit is -inf */
    if (top_k > 0 && top_k < vocab)
        lowest = max(lowest, threshold(logits, vocab, lowest, top_k, bins, [](float) { return 1ull; }));
    if (top_p < 1) {
        double weights = 0;
        for (int i = threadIdx.x; i < vocab; i += THREADS)
            if (ascending_key(logits[i]) >= lowest) weights += weight_of(logits[i]);
        double total = block_sum(weights, sums, THREADS / WARP);
        /* Weights in units of 2^-40: the sum of 2^18 of them does not overflow. */
        const double unit = 1099511627776.0;
        auto measure = [&](float logit) { return (u64)(weight_of(logit) * unit); };
        u64 goal = (u64)(top_p * total * unit) + 1;
        lowest = max(lowest, threshold(logits, vocab, lowest, goal, bins, measure));
    }

    /* Threads take consecutive tokens, so that cumulative weights ascend with the thread. */
    int step = (vocab + THREADS - 1) / THREADS, first = threadIdx.x * step, last = min(first + step, vocab);
    double mine = 0;
    for (int i = first; i < last; i++)
        if (ascending_key(logits[i]) >= lowest) mine += weight_of(logits[i]);
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
    double total = sums[0], drawn = batch.uniforms[index] * total, sum = cumulative[threadIdx.x];
    for (int i = first; i < last; i++) {
        float weight = ascending_key(logits[i]) >= lowest ? weight_of(logits[i]) : 0.0f;
        sum += weight;
        if (weight > 0 && sum > drawn) {
            atomicMin(&chosen, i);
            break;
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        /* If rounding leaves the draw above every sum, it is the most probable token. */
        int token = chosen < vocab ? chosen : row.token;
        tokens[index] = token;
        confidence[index] = (float)(weight_of(logits[token]) / total);
    }
}
