/* QUEST's bound (arXiv 2406.10774) of each page's scores, for some tokens' queries: the sum over channels of
 * max(q smallest, q largest). q [all tokens, heads, head_dim]; row r of a kv head is (tokens[r / group], head
 * r % group of the group); tokens null: all; a negative token is none, and its rows get 0.
 * scores [kv_heads, rows, stride], of which the prefix's pages are written; marks [kv_heads, words] become 0, for
 * mark_pages.cu.
 *
 * Grid: (kv_heads, splits, rows / ROWS), a warp a page at a time. Moves the bounds in, once every ROWS rows. */
#define ROWS 16
#define CHANNELS_OF_LANE 16 /* of 2 * head_dim, up to 512 */

extern "C" __global__ void __launch_bounds__(256)
    page_scores(const float *q, const int *tokens, int rows, int heads, BOUNDS_PARAMETERS, float *scores, int stride,
                unsigned *marks, int words)
{
    wait_for_previous();
    let_next_start();
    clear_marks(marks, words, blockIdx.x);
    extern __shared__ float shared[];
    BoundsView bounds = BOUNDS_VIEW;
    int dim = bounds.head_dim, kv_head = blockIdx.x, group = heads / bounds.kv_heads, first_row = blockIdx.z * ROWS;
    int pages = (*cache_length + page_size - 1) / page_size, lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    for (int i = threadIdx.x; i < ROWS * 2 * dim; i += blockDim.x) {
        int row = first_row + i / (2 * dim), token = row >= rows ? -1 : tokens ? tokens[row / group] : row / group;
        const float *from = q + ((size_t)token * heads + kv_head * group + row % group) * dim;
        shared[i] = token < 0 ? 0.0f : facing(from, i % (2 * dim), dim);
    }
    __syncthreads();
    for (int page = blockIdx.y * warps + threadIdx.x / WARP; page < pages; page += gridDim.y * warps) {
        const Held *bound = bounds.page(kv_head, page);
        float values[CHANNELS_OF_LANE];
#pragma unroll
        for (int i = 0; i < CHANNELS_OF_LANE; i++)
            values[i] = i * WARP + lane < 2 * dim ? widen(bound[i * WARP + lane]) : 0.0f;
        for (int r = 0; r < ROWS && first_row + r < rows; r++) {
            float score = 0;
#pragma unroll
            for (int i = 0; i < CHANNELS_OF_LANE; i++)
                if (i * WARP + lane < 2 * dim) score += shared[r * 2 * dim + i * WARP + lane] * values[i];
            score = warp_sum(score);
            if (lane == 0) scores[((size_t)kv_head * rows + first_row + r) * stride + page] = score;
        }
    }
}
