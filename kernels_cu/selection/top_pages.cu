/* The `count` pages of highest score of each row.
 *
 * scores [caches, kv_heads, sums, rows, stride], for the last of the per_cache sequences of each cache: a page's score
 * is the sum over `sums`, and over its `units` values, of which the last page may have fewer. ids [caches, kv_heads,
 * rows, count], or where it is null `stored` [kv_heads, rows, count] of the sequence, gets each row's pages in any
 * order, then -1 where there are fewer than `count`.
 *
 * Grid: (kv_heads, rows, caches). Must read the scores once. */
extern "C" __global__ void __launch_bounds__(THREADS)
    top_pages(const float *scores, int sums, int units, int stride, CachesView caches, int per_cache, int count,
              StoredView stored, int *ids)
{
    __shared__ int filled;
    if (threadIdx.x == 0) filled = 0;
    int row = blockIdx.y, rows = gridDim.y, sequence = (blockIdx.z + 1) * per_cache - 1;
    size_t head = (size_t)blockIdx.z * gridDim.x + blockIdx.x;
    CacheView cache = caches.of(sequence);
    int length = *cache.length, page_size = cache.page_size;
    int *row_ids =
        ids ? ids + (head * rows + row) * count : stored.of<int>(sequence) + ((size_t)blockIdx.x * rows + row) * count;
    wait_for_previous();
    let_next_start();
    auto key_of = [&](int page) {
        float score = 0;
        int unit = page_size / units, filled_units = min(units, (length - page * page_size + unit - 1) / unit);
        for (int s = 0; s < sums; s++) {
            const float *from = scores + ((head * sums + s) * rows + row) * stride + (size_t)page * units;
            for (int u = 0; u < filled_units; u++) score += from[u];
        }
        return page_key(score);
    };
    __syncthreads();
    choose_top(cache.pages(length), count, key_of, [&](int page) { row_ids[atomicAdd(&filled, 1)] = page; });
    __syncthreads();
    for (int i = filled + threadIdx.x; i < count; i += THREADS) row_ids[i] = -1;
}
