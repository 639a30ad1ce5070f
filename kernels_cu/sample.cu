/* A token for each row of logits [rows, vocab], with its probability and the entropy of the row's
 * whole distribution at the temperature, in nats. The mask token is never taken.
 *
 * temperature 0 is greedy. Otherwise the k highest logits are kept (and what ties with the last; 0:
 * all), of those the most probable up to and including the one that takes their sum above top_p,
 * and the draw is the first token whose cumulative weight is above uniform * total.
 * finite[row] is 0 where the row's maximum is no finite number.
 *
 * Plain: a block a row, a few passes over the logits, 64 more with top_k or top_p.
 * Grid: rows, 1024 threads. Must move rows * vocab logits once. */
__device__ __forceinline__ unsigned rising(float x)
{
    unsigned bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ double block_sum_double(double x, double *shared)
{
    for (int lane = WARP / 2; lane; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
    __syncthreads();
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
    __syncthreads();
    x = 0;
    for (int warp = 0; warp < blockDim.x / WARP; warp++) x += shared[warp];
    return x;
}

extern "C" __global__ void __launch_bounds__(1024)
    sample(const float *logits, const double *uniforms, int vocab, int mask_token, float temperature, int top_k,
           float top_p, int *tokens, float *confidence, float *entropy, int *finite)
{
    __shared__ float warp_tops[WARP];
    __shared__ int warp_tokens[WARP], chosen;
    __shared__ double sums[WARP], before[1024];
    int row = blockIdx.x, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    logits += (size_t)row * vocab;

    /* The maximum, of equal ones the first; a NaN anywhere makes it one. */
    float top = -INFINITE;
    int best = vocab;
    bool sound = true;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
        if (i == mask_token) continue;
        sound &= logits[i] == logits[i];
        if (logits[i] > top) top = logits[i], best = i;
    }
    for (int step = WARP / 2; step; step /= 2) {
        float other = __shfl_xor_sync(~0u, top, step);
        int other_best = __shfl_xor_sync(~0u, best, step);
        if (other > top || (other == top && other_best < best)) top = other, best = other_best;
    }
    if (lane == 0) warp_tops[warp] = top, warp_tokens[warp] = best;
    sound = __syncthreads_and(sound);
    for (int i = 0; i < blockDim.x / WARP; i++)
        if (warp_tops[i] > top || (warp_tops[i] == top && warp_tokens[i] < best))
            top = warp_tops[i], best = warp_tokens[i];
    sound &= top < INFINITE && top > -INFINITE;

    float inverse = temperature > 0 ? 1.0f / temperature : 1.0f;
    double total = 0, moment = 0;
    for (int i = threadIdx.x; i < vocab; i += blockDim.x) {
        float x = (logits[i] - top) * inverse;
        float weight = i == mask_token ? 0.0f : expf(x);
        total += weight;
        if (weight > 0) moment += weight * x;
    }
    total = block_sum_double(total, sums);
    moment = block_sum_double(moment, sums);
    if (threadIdx.x == 0) {
        finite[row] = sound;
        entropy[row] = (float)(log(total) - moment / total);
        tokens[row] = best;
        confidence[row] = (float)(1.0 / total);
    }
    if (temperature == 0 || !sound) return;

    /* The lowest logit that is kept, by bisection on its bits. */
    unsigned lowest = 0;
    if (top_k > 0 && top_k < vocab) {
        for (int bit = 31; bit >= 0; bit--) {
            unsigned candidate = lowest | 1u << bit;
            double count = 0;
            for (int i = threadIdx.x; i < vocab; i += blockDim.x)
                count += i != mask_token && rising(logits[i]) >= candidate;
            if (block_sum_double(count, sums) >= top_k) lowest = candidate;
        }
        total = 0;
        for (int i = threadIdx.x; i < vocab; i += blockDim.x)
            if (i != mask_token && rising(logits[i]) >= lowest) total += expf((logits[i] - top) * inverse);
        total = block_sum_double(total, sums);
    }
    if (top_p < 1) {
        /* The largest threshold such that what lies above it weighs no more than top_p: the tokens
         * at the threshold are the ones that take the sum above. */
        unsigned threshold = 0;
        for (int bit = 31; bit >= 0; bit--) {
            unsigned candidate = threshold | 1u << bit;
            double weight = 0;
            for (int i = threadIdx.x; i < vocab; i += blockDim.x)
                if (i != mask_token && rising(logits[i]) >= max(candidate, lowest))
                    weight += expf((logits[i] - top) * inverse);
            if (block_sum_double(weight, sums) > top_p * total) threshold = candidate;
        }
        lowest = max(lowest, threshold);
    }

    /* Threads take consecutive tokens, so that the cumulative weight rises with the thread. */
    int step = (vocab + blockDim.x - 1) / blockDim.x, first = threadIdx.x * step, last = min(first + step, vocab);
    double weight = 0;
    for (int i = first; i < last; i++)
        if (i != mask_token && rising(logits[i]) >= lowest) weight += expf((logits[i] - top) * inverse);
    before[threadIdx.x] = weight;
    __syncthreads();
    if (threadIdx.x == 0) {
        double sum = 0;
        for (int i = 0; i < blockDim.x; i++) {
            double mine = before[i];
            before[i] = sum;
            sum += mine;
        }
        sums[0] = sum;
        chosen = vocab;
    }
    __syncthreads();
    total = sums[0];
    double drawn = uniforms[row] * total, sum = before[threadIdx.x];
    for (int i = first; i < last; i++) {
        float w = i != mask_token && rising(logits[i]) >= lowest ? expf((logits[i] - top) * inverse) : 0.0f;
        sum += w;
        if (w > 0 && sum > drawn) {
            atomicMin(&chosen, i);
            break;
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        /* Rounding may leave the last draw above every sum: then the most probable token it is. */
        int token = chosen < vocab ? chosen : best;
        tokens[row] = token;
        confidence[row] = (float)(expf((logits[token] - top) * inverse) / total);
    }
}
