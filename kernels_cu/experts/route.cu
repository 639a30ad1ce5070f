/* The experts that each token goes to, and their weights, by the rule of losart.config.model.ExpertsConfig: places
 * [tokens, slots] of both, by descending score, of equal ones the earlier expert first; shared experts, which are
 * numbered after the others, come last, with weight 1.
 *
 * Ranks are compared by keys, 0 where an expert is not to be chosen (any more). One warp chooses.
 *
 * Compiled with PLANE_BATCH: a sum of few columns has many planes. Grid: tokens, one thread per expert; 3 * blockDim.x
 * values of dynamic shared memory. Must read the logits once. */
#define LEAST_SUM 1e-20f /* of scores that are divided by it */

/* The largest sum of two ranks of a group, found by a warp. */
__device__ __forceinline__ float two_highest(const unsigned *keys, int size)
{
    unsigned highest = 0, second = 0;
    for (int i = threadIdx.x % WARP; i < size; i += WARP) {
        unsigned key = keys[i];
        second = max(second, min(key, highest)), highest = max(highest, key);
    }
    unsigned first = __reduce_max_sync(~0u, highest), having = __ballot_sync(~0u, highest == first);
    if (threadIdx.x % WARP == __ffs(having) - 1) highest = second;
    return float_of_key(first) + float_of_key(__reduce_max_sync(~0u, highest));
}

extern "C" __global__ void __launch_bounds__(MOST_EXPERTS, 1)
    route(MatmulView logits, const float *bias, RoutingView routing, int experts, int per_token, int groups,
          int kept_groups, int sigmoid, int normalize, float scaling)
{
    let_next_start();
    wait_for_previous();
    extern __shared__ unsigned keys[];
    float *scores = (float *)(keys + blockDim.x), *of_groups = scores + blockDim.x;
    int *chosen = (int *)of_groups;
    __shared__ float shared[WARP];
    int token = blockIdx.x, expert = threadIdx.x, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    bool is_one = expert < experts;
    float logit = is_one ? logits.at<float>(token, expert) : -INFINITE, score;
    if (sigmoid) {
        score = 1 / (1 + expf(-logit));
    } else {
        float top = block_max(logit, shared, warps);
        score = is_one ? expf(logit - top) : 0;
        score /= block_sum(score, shared, warps);
    }
    float rank = sigmoid ? score : logit;
    if (bias && is_one) rank += bias[expert];
    keys[expert] = is_one ? max(1, ascending_key(rank)) : 0;
    scores[expert] = score;
    __syncthreads();
    if (groups > 1) {
        int size = experts / groups, group = expert / size, ahead = 0;
        for (int i = expert / WARP; i < groups; i += warps) {
            float sum = two_highest(keys + i * size, size);
            if (lane == 0) of_groups[i] = sum;
        }
        __syncthreads();
        unsigned mine = is_one ? ascending_key(of_groups[group]) : 0;
        for (int i = 0; i < groups; i++) {
            unsigned other = ascending_key(of_groups[i]);
            ahead += other > mine || (other == mine && i < group);
        }
        if (ahead >= kept_groups) keys[expert] = 0;
        __syncthreads();
    }
    if (expert >= WARP) return;

    unsigned key;
    int highest; /* of this lane's experts */
    auto look = [&] {
        key = 0, highest = experts;
        for (int i = lane; i < experts; i += WARP)
            if (keys[i] > key) key = keys[i], highest = i;
    };
    look();
    for (int slot = 0; slot < per_token; slot++) {
        unsigned most = __reduce_max_sync(~0u, key);
        int found = __reduce_min_sync(~0u, key == most ? highest : experts);
        if (highest != found) continue;
        chosen[slot] = found, keys[found] = 0;
        look();
    }
    __syncwarp();
    for (int slot = lane; slot < routing.slots; slot += WARP) {
        float weight = 1, sum = LEAST_SUM;
        size_t place = (size_t)token * routing.slots + slot;
        if (slot < per_token) {
            for (int i = 0; i < per_token; i++) sum += scores[chosen[i]];
            weight = scores[chosen[slot]];
            weight = (normalize ? weight / sum : weight) * scaling;
        }
        routing.experts[place] = slot < per_token ? chosen[slot] : experts + slot - per_token;
        routing.weights[place] = weight;
    }
}
