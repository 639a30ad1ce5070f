/* The `count` pages of highest mass of each row.
 *
 * masses [kv_heads, sums, rows, stride]: a page's mass is the sum over `sums`, and over its `units` values, of which
 * the last page may have fewer. ids [kv_heads, rows, count] gets each row's pages, in any order, and -1 where
 * there are fewer. Grid: (rows, kv_heads), 512 threads. Moves the masses in. */
extern "C" __global__ void __launch_bounds__(THREADS)
    top_pages(const float *masses, int sums, int units, int stride, const int *cache_length, int page_size, int count,
              int *ids)
{
    __shared__ int filled;
    if (threadIdx.x == 0) filled = 0;
    wait_for_previous();
    let_next_start();
    int row = blockIdx.x, rows = gridDim.x, kv_head = blockIdx.y, length = *cache_length;
    ids += ((size_t)kv_head * rows + row) * count;
    auto key_of = [&](int page) {
        float mass = 0;
        int unit = page_size / units, there = min(units, (length - page * page_size + unit - 1) / unit);
        for (int s = 0; s < sums; s++) {
            const float *from = masses + (((size_t)kv_head * sums + s) * rows + row) * stride + (size_t)page * units;
            for (int u = 0; u < there; u++) mass += from[u];
        }
        return rising(mass);
    };
    __syncthreads();
    choose_top((length + page_size - 1) / page_size, count, key_of,
               [&](int page) { ids[atomicAdd(&filled, 1)] = page; });
    __syncthreads();
    for (int i = filled + threadIdx.x; i < count; i += THREADS) ids[i] = -1;
}
