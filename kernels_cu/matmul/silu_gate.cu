/* y [tokens, ffn] = silu(gate) * up from the joined projections [tokens, 2 * ffn], narrowed for the matmul that
 * follows; ffn is a multiple of 4.
 *
 * Grid: (ffn / 4 / SILU_THREADS, tokens). Must read two values and write one for each of tokens * ffn. */
extern "C" __global__ void silu_gate(MatmulView gate_up, Activation *y, int ffn)
{
    let_next_start();
    wait_for_previous();
    int column = (blockIdx.x * blockDim.x + threadIdx.x) * 4, token = blockIdx.y;
    if (column >= ffn) return;
    float4 both[2];
    if (gate_up.steps == 1 && !gate_up.bias) { /* one plane, as of many tokens: few instructions */
        const float *from = gate_up.planes + (size_t)token * gate_up.rows + column;
        both[0] = *(const float4 *)from, both[1] = *(const float4 *)(from + ffn);
    } else {
        gate_up.at(token, {column, ffn + column}, both);
    }
    float4 gate = both[0], up = both[1];
    store4(y + (size_t)token * ffn + column,
           make_float4(silu(gate.x) * up.x, silu(gate.y) * up.y, silu(gate.z) * up.z, silu(gate.w) * up.w));
}
