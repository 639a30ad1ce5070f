/* From the experts of each token, the places of each expert, ascending and one expert's after the other's, and items of
 * work: up to `tile` places of an expert each, in the same order. *used grows by the experts that have any, of the
 * first `routed`, which are not shared.
 *
 * Each thread block counts for all experts, and lists one's.
 *
 * Grid: experts, shared ones included; an int of dynamic shared memory for each. Must read the experts once. */
#define BATCH 8 /* of places, whose loads are in flight together */

extern "C" __global__ void __launch_bounds__(LISTS_MAX_THREADS)
    expert_lists(RoutingView routing, int routed, int tile, int *used)
{
    let_next_start();
    wait_for_previous();
    extern __shared__ int counts[];
    __shared__ int of_warps[BATCH][WARP];
    int experts = gridDim.x, expert = blockIdx.x, all = routing.tokens * routing.slots;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    for (int i = threadIdx.x; i < experts; i += blockDim.x) counts[i] = 0;
    __syncthreads();
    auto load = [&](int (&experts)[BATCH], int begin) { /* -1 past the last place */
#pragma unroll
                                                        for (int i = 0; i < BATCH; i++) {
                                                            int place = begin + i * blockDim.x + threadIdx.x;
                                                            experts[i] = place < all ? routing.experts[place] : -1;
                                                        }
    };
    for (int begin = 0; begin < all; begin += BATCH * blockDim.x) {
        int batch[BATCH];
        load(batch, begin);
#pragma unroll
        for (int i = 0; i < BATCH; i++)
            if (batch[i] >= 0) atomicAdd(counts + batch[i], 1);
    }
    __syncthreads();
    int first = 0, first_item = 0, items = 0, having = 0;
    for (int i = lane; i < experts; i += WARP) {
        int count = counts[i], of_expert = (count + tile - 1) / tile;
        items += of_expert, having += i < routed && count;
        if (i < expert) first += count, first_item += of_expert;
    }
    first = warp_sum(first), first_item = warp_sum(first_item);
    if (expert == 0 && warp == 0) {
        items = warp_sum(items), having = warp_sum(having);
        if (lane == 0) {
            *routing.item_count = items;
            *used += having;
        }
    }
    int count = counts[expert];
    for (int i = threadIdx.x; i * tile < count; i += blockDim.x) {
        int *item = routing.items + (first_item + i) * 3;
        item[0] = expert, item[1] = first + i * tile, item[2] = min(tile, count - i * tile);
    }
    for (int begin = 0, found = first; found < first + count; begin += BATCH * blockDim.x) {
        int batch[BATCH], before[BATCH];
        load(batch, begin);
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            unsigned which = __ballot_sync(~0u, batch[i] == expert);
            before[i] = __popc(which & ((1u << lane) - 1));
            if (lane == 0) of_warps[i][warp] = __popc(which);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            int other = lane < warps ? of_warps[i][lane] : 0;
            before[i] += found + warp_sum(lane < warp ? other : 0), found += warp_sum(other);
            if (batch[i] == expert) routing.places[before[i]] = begin + i * blockDim.x + threadIdx.x;
        }
        __syncthreads();
    }
}
