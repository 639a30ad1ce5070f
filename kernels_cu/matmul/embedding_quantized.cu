/* embedding.cu of a matrix of codes [vocab, hidden], hidden a multiple of 8.
 *
 * Grid: (hidden / 8 / QUANTIZED_THREADS, tokens), one thread per 8 channels. Must read tokens * hidden codes. */
extern "C" __global__ void __launch_bounds__(QUANTIZED_THREADS)
    embedding_quantized(QuantizedView table, BatchView batch, float *x)
{
    let_next_start();
    wait_for_previous();
    int piece = blockIdx.x * QUANTIZED_THREADS + threadIdx.x, token = blockIdx.y;
    if (piece >= table.inner / 8) return;
    float values[8];
    entries(values, table, batch.ids[token], piece);
    float4 *to = (float4 *)(x + (size_t)token * table.inner + piece * 8);
    to[0] = make_float4(values[0], values[1], values[2], values[3]);
    to[1] = make_float4(values[4], values[5], values[6], values[7]);
}
