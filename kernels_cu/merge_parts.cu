/* The parts of prefix attention into o [tokens, heads, head_dim] and log-sum-exp [tokens, heads]; over
 * an empty prefix zeros and -inf. With `tokens`, the i-th of the parts' tokens goes to row tokens[i], and nowhere if
 * that is negative. Grid: (the parts' tokens, heads), head_dim threads. Moves the parts in. */
extern "C" __global__ void merge_parts(PARTS_PARAMETERS, const int *tokens, float *o, float *lse, int head_dim)
{
    wait_for_previous();
    let_next_start();
    int token = tokens ? tokens[blockIdx.x] : blockIdx.x;
    if (token < 0) return;
    size_t row = (size_t)blockIdx.x * gridDim.y + blockIdx.y;
    Parts parts = PARTS_OF((size_t)gridDim.x * gridDim.y);
    int channel = min((int)threadIdx.x, head_dim - 1);
    float top, total, sum;
    parts.merge(row, channel, head_dim, top, total, sum);
    row = (size_t)token * gridDim.y + blockIdx.y;
    store_merged(o, lse, row, channel, head_dim, top, total, sum);
}
