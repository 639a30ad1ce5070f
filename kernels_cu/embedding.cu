/* x [tokens, hidden] = rows `ids` of the table [vocab, hidden].
 * Grid: a block a token. Moves tokens * hidden values in and out. */
extern "C" __global__ void embedding(const Held *table, const int *ids, float *x, int hidden)
{
    const Held *row = table + (size_t)ids[blockIdx.x] * hidden;
    for (int i = threadIdx.x; i < hidden; i += blockDim.x) x[(size_t)blockIdx.x * hidden + i] = widen(row[i]);
}
