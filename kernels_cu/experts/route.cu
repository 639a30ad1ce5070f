/* The experts that each token goes to, and their weights, by the rule of losart.config.model.ExpertsConfig: places
 * [tokens, slots] of both, by descending score, of equal ones the earlier expert first; shared experts, which are
 * numbered after the others, come last, with weight 1.
 *
 * How many are before an expert is counted for all at the same time, which needs no loop over slots.
 *
 * Grid: tokens, one thread per expert; 3 * blockDim.x values of dynamic shared memory. Must read the logits once. */
#define LEAST_SUM 1e-20f /* of scores that are divided by it */

__device__ __forceinline__ int keys_before(const unsigned *keys, int first, int last, unsigned key, int index)
{
    int before = 0;
#pragma unroll 8
    for (int i = first; i < last; i++) before += keys[i] > key || (keys[i] == key && i < index);
    return before;
}

extern "C" __global__ void __launch_bounds__(MOST_EXPERTS)
    route(MatmulView logits, const float *bias, RoutingView routing, int experts, int per_token, int groups,
          int kept_groups, int sigmoid, int normalize, float scaling)
{
    let_next_start();
    wait_for_previous();
    extern __shared__ unsigned keys[];
    float *best = (float *)(keys + blockDim.x), *chosen = best + blockDim.x;
    __shared__ float shared[WARP];
    int token = blockIdx.x, expert = threadIdx.x;
    bool is_one = expert < experts;
    float logit = is_one ? logits.at<float>(token, expert) : -INFINITE, score;
    if (sigmoid) {
        score = 1 / (1 + expf(-logit));
    } else {
        float top = block_max(logit, shared, blockDim.x / WARP);
        score = is_one ? expf(logit - top) : 0;
        score /= block_sum(score, shared, blockDim.x / WARP);
    }
    float rank = sigmoid ? score : logit;
    if (bias && is_one) rank += bias[expert];
    unsigned key = is_one ? ascending_key(rank) : 0;
    keys[threadIdx.x] = key;
    __syncthreads();
    if (groups > 1) {
        int size = experts / groups, group = expert / size, ahead = 0;
        int before = keys_before(keys, group * size, min(experts, (group + 1) * size), key, expert);
        if (is_one && before < 2) best[group * 2 + before] = rank;
        __syncthreads();
        if (is_one) {
            unsigned mine = ascending_key(best[group * 2] + best[group * 2 + 1]);
            for (int i = 0; i < groups; i++) {
                unsigned other = ascending_key(best[i * 2] + best[i * 2 + 1]);
                ahead += other > mine || (other == mine && i < group);
            }
            if (ahead >= kept_groups) keys[threadIdx.x] = key = 0;
        }
        __syncthreads();
    }
    int before = keys_before(keys, 0, experts, key, expert);
    routing.experts += (size_t)token * routing.slots, routing.weights += (size_t)token * routing.slots;
    if (is_one && before < per_token) {
        routing.experts[before] = expert;
        chosen[before] = score;
    }
    __syncthreads();
    for (int slot = threadIdx.x; slot < routing.slots; slot += blockDim.x) {
        float weight = 1, sum = LEAST_SUM;
        if (slot < per_token) {
            for (int i = 0; i < per_token; i++) sum += chosen[i];
            weight = (normalize ? chosen[slot] / sum : chosen[slot]) * scaling;
        } else {
            routing.experts[slot] = experts + slot - per_token;
        }
        routing.weights[slot] = weight;
    }
}
