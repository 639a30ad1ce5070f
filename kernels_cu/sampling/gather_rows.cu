/* Masked rows of x [tokens, hidden], one after the other, for the matmul that makes their logits; zeros after the last.
 *
 * Grid: (hidden / GATHER_THREADS, proposing rows at most). Must read and write proposed_count * hidden values. */
extern "C" __global__ void __launch_bounds__(GATHER_THREADS)
    gather_rows(const Activation *x, BatchView batch, Activation *y, int hidden)
{
    let_next_start();
    wait_for_previous();
    int channel = blockIdx.x * GATHER_THREADS + threadIdx.x, row = blockIdx.y;
    if (channel >= hidden) return;
    bool proposes = row < *batch.proposed_count;
    y[(size_t)row * hidden + channel] =
        proposes ? x[(size_t)batch.proposed[row] * hidden + channel] : narrow<Activation>(0.0f);
}
