/* y [tokens, ffn] = silu(gate) * up from the joined projections [tokens, 2 * ffn].
 * Grid: over values. Moves 2 values in and 1 out for each. */
extern "C" __global__ void silu_gate(const float *gate_up, float *y, int tokens, int ffn)
{
    size_t count = (size_t)tokens * ffn;
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < count; i += (size_t)gridDim.x * blockDim.x) {
        size_t token = i / ffn, column = i % ffn;
        float gate = gate_up[token * 2 * ffn + column], up = gate_up[token * 2 * ffn + ffn + column];
        y[i] = gate / (1.0f + expf(-gate)) * up;
    }
}
