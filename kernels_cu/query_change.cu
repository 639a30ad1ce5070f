/* Mean squared change of each token's query, and the tokens of largest change: LoSA's active set (arXiv
 * 2604.12056, section 3). Of equal changes the earlier token is taken; a NaN ranks with the
 * largest, and of too many the earlier tokens are taken.
 *
 * q and previous [tokens, width]. Only tokens rows[0], ..., rows[*row_count - 1] can be active; all of them
 * where rows is null. active [count] gets the active tokens, rising, and then -1. With `keep`, q is written over
 * previous. `done` is 0 between launches.
 *
 * Grid: tokens, 256 threads; the block that ends last takes the active set. Moves q and previous in; width is a
 * multiple of 4. */
#define THREADS 256
#define AHEAD 4 /* pieces of a thread that are loaded at once */

__device__ __forceinline__ double sum_of_block(double x, double *shared)
{
    for (int lane = WARP / 2; lane; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
    __syncthreads();
    x = threadIdx.x % WARP < THREADS / WARP ? shared[threadIdx.x % WARP] : 0;
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
    int pieces = width / 4;
    float4 then[AHEAD], now[AHEAD];
    auto load = [&](float4 *to, const float4 *all, int first) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) to[i] = all[min(first + i * THREADS + (int)threadIdx.x, pieces - 1)];
    };
    load(then, before, 0); /* of an earlier pass: there before this one began */
    wait_for_previous();
    let_next_start();
    double total = 0;
    for (int first = 0; first < pieces; first += AHEAD * THREADS) {
        load(now, from, first);
        if (first) load(then, before, first);
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int piece = first + i * THREADS + threadIdx.x;
            if (piece >= pieces) continue;
            double x = (double)now[i].x - then[i].x, y = (double)now[i].y - then[i].y,
                   z = (double)now[i].z - then[i].z, w = (double)now[i].w - then[i].w;
            total += x * x + y * y + z * z + w * w;
            if (keep) before[piece] = now[i];
        }
    }
    total = sum_of_block(total, shared);
    if (threadIdx.x == 0) {
        change[blockIdx.x] = (float)(total / width);
        /* What this thread wrote is there for whoever counts after it. */
        unsigned others;
        asm volatile("atom.acq_rel.gpu.inc.u32 %0, [%1], %2;"
                     : "=r"(others)
                     : "l"(done), "r"(gridDim.x - 1)
                     : "memory");
        last = others == gridDim.x - 1;
    }
    __syncthreads();
    if (!last || threadIdx.x >= WARP) return;

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
