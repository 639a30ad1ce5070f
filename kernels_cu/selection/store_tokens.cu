/* Copies rows tokens[i] of `from` [all tokens, width] to the same rows of a stored array; all rows where tokens is
 * null. A negative token is none.
 *
 * Grid: rows, STORE_TOKENS_THREADS each. Must read and write the rows once. */
extern "C" __global__ void store_tokens(const float *from, const int *tokens, StoredView to, int width)
{
    float *stored = to.at<float>();
    wait_for_previous(); /* before the next kernel starts, since block_attention may follow: common/overlap.cuh */
    let_next_start();
    int token = tokens ? tokens[blockIdx.x] : blockIdx.x;
    if (token < 0) return;
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        stored[(size_t)token * width + i] = from[(size_t)token * width + i];
}
