/* Mean squared change of each token's query, and the tokens of largest change: LoSA's active set (arXiv
 * 2604.12056, section 3). Of equal changes the earlier token is taken, a NaN before all.
 *
 * q and previous [tokens, width]. Only tokens rows[0], ..., rows[*row_count - 1] can be active; all of them
 * where rows is null. active [count] gets the active tokens, rising, and then -1. With `keep`, q is written over
 * previous. `done` is 0 between launches.
 *
 * Grid: tokens, 256 threads; the block that ends last takes the active set. Moves q and previous in. */
__device__ __forceinline__ double sum_of_block(double x, double *shared)
{
    for (int lane = WARP / 2; lane; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
    __syncthreads();
    x = 0;
    for (int warp = 0; warp < blockDim.x / WARP; warp++) x += shared[warp];
    return x;
}

extern "C" __global__ void __launch_bounds__(256)
    query_change(const float *q, float *previous, int width, int keep, const int *rows, const int *row_count,
                 float *change, unsigned *done, int *active, int count)
{
    __shared__ double shared[256 / WARP];
    __shared__ bool last;
    wait_for_previous();
    let_next_start();
    size_t first = (size_t)blockIdx.x * width;
    double total = 0;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        float now = q[first + i];
        double difference = (double)now - previous[first + i];
        total += difference * difference;
        if (keep) previous[first + i] = now;
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
        int i = base + threadIdx.x, token = 0, rank = 0;
        if (i < candidates) {
            token = rows ? rows[i] : i;
            float mine = changes[token];
            for (int j = 0; j < candidates; j++) {
                float other = changes[rows ? rows[j] : j];
                rank += other > mine || (other == mine && j < i);
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
