/* x [tokens, hidden] = rows `ids` of the table [vocab, hidden].
 * Grid: (hidden / 256, tokens), a thread a channel. Moves tokens * hidden values in and out. */
extern "C" __global__ void embedding(const Held *table, const int *ids, float *x, int hidden)
{
    let_next_start();
    wait_for_previous();
    int channel = blockIdx.x * blockDim.x + threadIdx.x, token = blockIdx.y;
    if (channel < hidden) x[(size_t)token * hidden + channel] = widen(table[(size_t)ids[token] * hidden + channel]);
}
