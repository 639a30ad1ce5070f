/* Masked rows of x [tokens, hidden], one after the other, for the matmul that makes their logits; zeros after the last.
 *
 * Grid: (hidden / GATHER_THREADS, masked rows at most). Must read and write masked_count * hidden values. */
extern "C" __global__ void __launch_bounds__(GATHER_THREADS)
    gather_rows(const Activation *x, BatchView batch, Activation *y, int hidden)
{
    let_next_start();
    wait_for_previous();
    int channel = blockIdx.x * GATHER_THREADS + threadIdx.x, row = blockIdx.y;
    if (channel >= hidden) return;
    bool masked = row < *batch.masked_count;
    y[(size_t)row * hidden + channel] =
        masked ? x[(size_t)batch.masked[row] * hidden + channel] : narrow<Activation>(0.0f);
}
