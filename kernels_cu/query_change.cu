/* Mean squared change of each token's query, and the tokens of largest change: LoSA's active set (arXiv
 * 2604.12056, section 3). Of equal changes the earlier token is taken, a NaN before all.
 *
 * q and previous [tokens, width]. Only tokens rows[0], ..., rows[*row_count - 1] can be active; all of them
 * where rows is null. active [count] gets the active tokens, rising, and then -1. With `keep`, q is written over
 * previous. `done` is 0 between launches.
 *
 * Grid: tokens, 1024 threads; the block that ends last takes the active set. Moves q and previous in; width is a
 * multiple of 4. */
#define THREADS 1024

__device__ __forceinline__ double sum_of_block(double x, double *shared)
{
    for (int lane = WARP / 2; lane; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
    __syncthreads();
    x = shared[threadIdx.x % WARP];
    for (int lane = WARP / 2; lane; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
    return x;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    query_change(const float *q, float *previous, int width, int keep, const int *rows, const int *row_count,
                 float *change, unsigned *done, int *active, int count)
{
    __shared__ double shared[THREADS / WARP];
    __shared__ bool last;
    const float4 *from = (const float4 *)(q + (size_t)blockIdx.x * width);
    float4 *before = (float4 *)(previous + (size_t)blockIdx.x * width);
    int pieces = width / 4, mine = threadIdx.x;
    /* Of an earlier pass: there before this one began. */
    float4 then = before[min(mine, pieces - 1)];
    wait_for_previous();
    let_next_start();
    double total = 0;
    for (; mine < pieces; mine += THREADS) {
        float4 now = from[mine];
        if (mine >= THREADS) then = before[mine];
        double x = (double)now.x - then.x, y = (double)now.y - then.y, z = (double)now.z - then.z,
               w = (double)now.w - then.w;
        total += x * x + y * y + z * z + w * w;
        if (keep) before[mine] = now;
    }
    total = sum_of_block(total, shared);
    if (threadIdx.x == 0) {
        change[blockIdx.x] = (float)(total / width);
        __threadfence();
        last = atomicInc(done, gridDim.x - 1) == gridDim.x - 1;
    }
    __syncthreads();
    if (!last || threadIdx.x >= WARP) return;

    __threadfence();
    const volatile float *changes = change;
    int candidates = rows ? *row_count : gridDim.x, wanted = min(count, candidates), filled = 0;
    for (int base = 0; base < candidates; base += WARP) {
        int i = base + threadIdx.x, token = i < candidates ? rows ? rows[i] : i : 0, rank = 0;
        float mine = changes[token];
        for (int start = 0; start < candidates; start += WARP) {
            int there = min(start + (int)threadIdx.x, candidates - 1);
            float theirs = start == base ? mine : changes[rows ? rows[there] : there];
            for (int k = 0; k < min(WARP, candidates - start); k++) {
                float other = __shfl_sync(~0u, theirs, k);
                rank += other > mine || (other == mine && start + k < i);
            }
        }
        unsigned taken = __ballot_sync(~0u, i < candidates && rank < wanted);
        int place = filled + __popc(taken & ((1u << threadIdx.x) - 1));
        /* A NaN ranks first, so that there can be too many. */
        if ((taken >> threadIdx.x & 1) && place < wanted) active[place] = token;
        filled += __popc(taken);
    }
    for (int i = min(filled, wanted) + threadIdx.x; i < count; i += WARP) active[i] = -1;
}
