/* From the experts of each token, the places of each expert, ascending and one expert's after the other's, and items of
 * work: up to `tile` places of an expert each, in the same order. *used grows by the experts that have any, of the
 * first `routed`, which are not shared.
 *
 * Each thread block counts for all experts, and lists one's.
 *
 * Grid: experts, shared ones included; an int of dynamic shared memory for each. Must read the experts once. */
extern "C" __global__ void __launch_bounds__(LISTS_MAX_THREADS)
    expert_lists(RoutingView routing, int routed, int tile, int *used)
{
    let_next_start();
    wait_for_previous();
    extern __shared__ int counts[];
    __shared__ int of_warps[WARP];
    int experts = gridDim.x, expert = blockIdx.x, all = routing.tokens * routing.slots;
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    for (int i = threadIdx.x; i < experts; i += blockDim.x) counts[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < all; i += blockDim.x) atomicAdd(counts + routing.experts[i], 1);
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
    for (int begin = 0, found = 0; found < count; begin += blockDim.x) {
        int place = begin + threadIdx.x;
        bool mine = place < all && routing.experts[place] == expert;
        unsigned which = __ballot_sync(~0u, mine);
        if (lane == 0) of_warps[warp] = __popc(which);
        __syncthreads();
        int other = lane < warps ? of_warps[lane] : 0;
        int before = warp_sum(lane < warp ? other : 0) + __popc(which & ((1u << lane) - 1));
        if (mine) routing.places[first + found + before] = place;
        found += warp_sum(other);
        __syncthreads();
    }
}
