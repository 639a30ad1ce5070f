/* x [tokens, hidden] = rows `ids` of the table [vocab, hidden].
 *
 * Grid: (hidden / EMBEDDING_THREADS, tokens), one thread per channel. Must read and write tokens * hidden values. */
extern "C" __global__ void embedding(WeightView table, BatchView batch, float *x)
{
    let_next_start();
    wait_for_previous();
    int channel = blockIdx.x * blockDim.x + threadIdx.x, token = blockIdx.y, hidden = table.inner;
    if (channel < hidden)
        x[(size_t)token * hidden + channel] = widen(table.data()[(size_t)batch.ids[token] * hidden + channel]);
}
