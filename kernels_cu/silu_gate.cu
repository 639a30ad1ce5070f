/* y [tokens, ffn] = silu(gate) * up from the joined projections [tokens, 2 * ffn], narrowed for the
 * product that follows; ffn is a multiple of 4. Grid: (ffn / 4 / 128, tokens). Moves 2 values in and 1 out
 * for each. */
__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

extern "C" __global__ void silu_gate(PRODUCT_PARAMETERS, Held *y, int ffn)
{
    let_next_start();
    wait_for_previous();
    Product gate_up = PRODUCT;
    int column = (blockIdx.x * blockDim.x + threadIdx.x) * 4, token = blockIdx.y;
    if (column >= ffn) return;
    float4 both[2];
    gate_up.at4(token, {column, ffn + column}, both);
    float4 gate = both[0], up = both[1];
    Held *to = y + (size_t)token * ffn + column;
    to[0] = narrow(silu(gate.x) * up.x);
    to[1] = narrow(silu(gate.y) * up.y);
    to[2] = narrow(silu(gate.z) * up.z);
    to[3] = narrow(silu(gate.w) * up.w);
}
