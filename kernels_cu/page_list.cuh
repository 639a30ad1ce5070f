/* Marked pages of a kv head, a bit each, as a list, and the marks wiped away: by all threads of a block of up to 1024,
 * warps whole. ids gets the pages, rising, *count how many; *positions rises by those that they hold. `sums` is shared
 * memory, two times a warp. */
__device__ __forceinline__ void list_marked(unsigned *marks, int pages, int length, int page_size, int *ids, int *count,
                                            int *positions, int (&sums)[2][WARP])
{
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    /* Other blocks have marked too: not from this processor's cache. */
    volatile unsigned *marked = marks;
    int filled = 0;
    for (int base = 0, turn = 0; base * WARP < pages; base += blockDim.x, turn ^= 1) {
        int at = base + threadIdx.x;
        unsigned word = at * WARP < pages ? marked[at] : 0;
        if (word) marked[at] = 0;
        int mine = __popc(word), before = mine;
        for (int step = 1; step < WARP; step *= 2) {
            int other = __shfl_up_sync(~0u, before, step);
            if (lane >= step) before += other;
        }
        if (lane == WARP - 1) sums[turn][warp] = before;
        __syncthreads();
        int there = lane < warps ? sums[turn][lane] : 0;
        int place = filled + before - mine + __reduce_add_sync(~0u, lane < warp ? there : 0);
        filled += __reduce_add_sync(~0u, there);
        /* The last page may be part full. */
        if (at == (pages - 1) / WARP && (word >> (pages - 1) % WARP & 1)) atomicAdd(positions, length - pages * page_size);
        for (; word; word &= word - 1) ids[place++] = at * WARP + __ffs(word) - 1;
    }
    if (threadIdx.x == 0) {
        *count = filled;
        atomicAdd(positions, filled * page_size);
    }
}
