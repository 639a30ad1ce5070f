/* What kernels that score pages by their bounds share. */

/* The row's index among the rows [tokens, heads] of q; -1 for a negative token and past the last row. Row r of a kv
 * head is head r % group of its group, of token tokens[r / group]; with tokens null, of token r / group. */
__device__ __forceinline__ int query_index(const int *tokens, int row, int rows, int kv_head, int group, int heads)
{
    int token = row >= rows ? -1 : tokens ? tokens[row / group] : row / group;
    return token < 0 ? -1 : token * heads + kv_head * group + row % group;
}

/* Clears marks [heads, words], called by all threads of a grid. */
__device__ __forceinline__ void clear_marks(unsigned *marks, int heads, int words)
{
    int blocks = gridDim.x * gridDim.y * gridDim.z;
    int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    for (int i = block * blockDim.x + threadIdx.x; i < heads * words; i += blocks * blockDim.x) marks[i] = 0;
}
