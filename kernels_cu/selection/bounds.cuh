/* What kernels that score pages by their bounds share. */

/* The row's index among the rows [tokens, heads] of q; -1 for a negative token and past the last row. Row r of a kv
 * head is head r % group of its group, of token tokens[r / group]; with tokens null, of token r / group. */
__device__ __forceinline__ int query_index(const int *tokens, int row, int rows, int kv_head, int group, int heads)
{
    int token = row >= rows ? -1 : tokens ? tokens[row / group] : row / group;
    return token < 0 ? -1 : token * heads + kv_head * group + row % group;
}

/* Called by all thread blocks of a grid (kv_heads, splits, any): those with a sequence's first row clear the
 * marks of its kv head, which is number `head` of all sequences'. */
__device__ __forceinline__ void clear_marks(unsigned *marks, int words, int head, int first_row)
{
    if (first_row == 0)
        for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < words; i += gridDim.y * blockDim.x)
            marks[(size_t)head * words + i] = 0;
}
