/* Rows tokens[i] of `from` [all tokens, width] to the same rows of `to`; all rows where tokens is null. A
 * negative token is none. Grid: tokens, 256 threads. Moves the rows in and out. */
extern "C" __global__ void copy_tokens(const float *from, const int *tokens, float *to, int width)
{
    wait_for_previous(); /* first, since block_attention may follow: common.cuh */
    let_next_start();
    int token = tokens ? tokens[blockIdx.x] : blockIdx.x;
    if (token < 0) return;
    for (int i = threadIdx.x; i < width; i += blockDim.x) to[(size_t)token * width + i] = from[(size_t)token * width + i];
}
