/* The `count` pages of highest score of each of the rows, united per kv head, and those that `stored` [kv_heads,
 * stored_rows, stored_count] has for it in each sequence's slot, if it has one: -1 for none.
 *
 * scores [sequences, kv_heads, rows, stride]; rows of a token tokens[row / group] < 0 choose none, and come last. Sets
 * bits of marks [sequences, kv_heads, words], one per page, which the previous kernel has cleared. Thread blocks whose
 * rows choose none leave room for others at once, but for the first, since a kernel must wait for the one before it.
 *
 * Grid: (kv_heads, blocks that share_of_block divides). Must read the scores and the stored pages once. */
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    mark_pages(const float *scores, int rows, int stride, CachesView caches, const int *tokens, int group, int count,
               unsigned *marks, int words, int sequences, int fixed, StoredView stored, int stored_rows,
               int stored_count)
{
    __shared__ int scratch[MOST_SHARING];
    int token_count = rows / group; /* page_scores has waited for the tokens */
    SequenceShare mine = share_of_block(tokens, token_count, sequences, fixed, scratch, nullptr);
    int row = mine.part, sequence = mine.sequence;
    auto token_of = [&](int row) { return tokens ? tokens[sequence * token_count + row / group] : row / group; };
    if (sequence < 0 || row >= rows || token_of(row) < 0) {
        if (blockIdx.y == 0) wait_for_previous();
        return;
    }
    size_t head = (size_t)sequence * gridDim.x + blockIdx.x;
    CacheView cache = caches.of(sequence);
    int pages = cache.pages(*cache.length);
    wait_for_previous();
    let_next_start();
    marks += head * words;
    const int *stored_pages = stored.of<int>(sequence) + (size_t)blockIdx.x * stored_rows * stored_count;
    auto mark = [&](int page) { atomicOr(marks + page / WARP, 1u << page % WARP); };
    for (; row < rows && token_of(row) >= 0; row += mine.parts) {
        int stored_row = token_of(row) * group + row % group;
        for (int i = threadIdx.x; i < stored_count; i += THREADS) {
            int page = stored_pages[stored_row * stored_count + i];
            if ((unsigned)page < (unsigned)pages) mark(page); /* a slot that pads the group holds anything */
        }
        const float *of_row = scores + (head * rows + row) * stride;
        __syncthreads(); /* the row before has left shared memory */
        choose_top(pages, count, [&](int page) { return page_key(of_row[page]); }, mark);
    }
}
