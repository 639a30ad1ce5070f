/* Mean squared change of each token's query, with `relative` over the mean square of the stored one, and the tokens
 * whose queries changed most and by more than the threshold: LoSA's active set (arXiv 2604.12056, section 3). Of equal
 * changes the earlier token is taken; a NaN ranks with the largest, and if there are too many, the earlier tokens are
 * taken.
 *
 * q [sequences, tokens, width] and `stored` [tokens, width] of each sequence, width a multiple of 4; with `keep`, q is
 * then stored. Only tokens of which masked [sequences, tokens] is 1 can be active; all of them where it is null. active
 * [sequences, count] gets the active tokens, ascending, then -1. done [sequences] is 0 between launches.
 *
 * Grid: (tokens, sequences); the last thread block of a sequence to finish finds its active set. Must read q and
 * `stored` once, and with `keep` write q. */
#define THREADS QUERY_CHANGE_THREADS
#define PIECE_BATCH 4 /* pieces of a thread whose loads are in flight at once */

extern "C" __global__ void __launch_bounds__(THREADS)
    query_change(const float *q, StoredView stored, int width, int relative, int keep, const int *masked,
                 float threshold, float *change, unsigned *done, int *active, int count)
{
    __shared__ double shared[2][THREADS / WARP];
    __shared__ bool last;
    int token = blockIdx.x, tokens = gridDim.x, sequence = blockIdx.y;
    const float4 *from = (const float4 *)(q + ((size_t)sequence * tokens + token) * width);
    float4 *previous = (float4 *)(stored.of<float>(sequence) + (size_t)token * width);
    change += sequence * tokens, active += sequence * count;
    if (masked) masked += sequence * tokens;
    int pieces = width / 4;
    float4 then[PIECE_BATCH], now[PIECE_BATCH];
    auto load = [&](float4 *to, const float4 *all, int first) {
#pragma unroll
        for (int i = 0; i < PIECE_BATCH; i++) to[i] = all[min(first + i * THREADS + (int)threadIdx.x, pieces - 1)];
    };
    load(then, previous, 0); /* stored before this pass began */
    wait_for_previous();
    let_next_start();
    double total = 0, size = 0;
    for (int first = 0; first < pieces; first += PIECE_BATCH * THREADS) {
        load(now, from, first);
        if (first) load(then, previous, first);
#pragma unroll
        for (int i = 0; i < PIECE_BATCH; i++) {
            int piece = first + i * THREADS + threadIdx.x;
            if (piece >= pieces) continue;
            double x = (double)now[i].x - then[i].x, y = (double)now[i].y - then[i].y;
            double z = (double)now[i].z - then[i].z, w = (double)now[i].w - then[i].w;
            total += x * x + y * y + z * z + w * w;
            x = then[i].x, y = then[i].y, z = then[i].z, w = then[i].w;
            size += x * x + y * y + z * z + w * w;
            if (keep) previous[piece] = now[i];
        }
    }
    total = block_sum_tree(total, shared[0], THREADS / WARP);
    size = block_sum_tree(size, shared[1], THREADS / WARP);
    if (threadIdx.x == 0) {
        change[token] = (float)(total / (relative ? size : width));
        /* Releases what this thread wrote to the thread block that counts last. */
        unsigned others;
        asm volatile("atom.acq_rel.gpu.inc.u32 %0, [%1], %2;"
                     : "=r"(others)
                     : "l"(done + sequence), "r"(tokens - 1)
                     : "memory");
        last = others == tokens - 1;
    }
    __syncthreads();
    if (!last || threadIdx.x >= WARP) return;

    const volatile float *changes = change;
    auto eligible = [&](int i) { return i < tokens && (!masked || masked[i]); };
    int candidates = 0, filled = 0;
    for (int base = 0; base < tokens; base += WARP)
        candidates += __popc(__ballot_sync(~0u, eligible(base + threadIdx.x)));
    int wanted = min(count, candidates);
    for (int base = 0; base < tokens; base += WARP) {
        int i = base + threadIdx.x, rank = 0;
        float mine = changes[min(i, tokens - 1)];
        for (int start = 0; start < tokens && wanted < candidates; start += WARP) {
            float theirs = changes[min(start + (int)threadIdx.x, tokens - 1)];
            unsigned counted = __ballot_sync(~0u, eligible(start + threadIdx.x));
            for (int k = 0; k < min(WARP, tokens - start); k++) {
                float other = __shfl_sync(~0u, theirs, k);
                rank += (counted >> k & 1) && (other > mine || (other == mine && start + k < i));
            }
        }
        unsigned taken = __ballot_sync(~0u, eligible(i) && rank < wanted && !(mine <= threshold));
        int index = filled + __popc(taken & ((1u << threadIdx.x) - 1));
        /* All NaN rank first, so that there can be too many. */
        if ((taken >> threadIdx.x & 1) && index < wanted) active[index] = i;
        filled += __popc(taken);
    }
    for (int i = min(filled, wanted) + threadIdx.x; i < count; i += WARP) active[i] = -1;
}
