/* A matrix of codes as values [rows, inner], rounded to what tensor cores multiply.
 *
 * Grid: rows * inner / 8 / QUANTIZED_THREADS, one thread per 8 columns; inner is a multiple of 8. Must read the codes
 * and write 16 bits for each. */
extern "C" __global__ void __launch_bounds__(QUANTIZED_THREADS) dequantize(QuantizedView from, Operand *to)
{
    size_t thread = (size_t)blockIdx.x * QUANTIZED_THREADS + threadIdx.x;
    int pieces = from.inner / 8, row = thread / pieces, piece = thread % pieces;
    float values[8];
    if (row < from.rows) entries(values, from, row, piece);
    wait_for_previous(); /* which may still read what was widened before */
    if (row >= from.rows) return;
    unsigned pairs[4];
#pragma unroll
    for (int p = 0; p < 4; p++) pairs[p] = pack<Operand>(values[p * 2], values[p * 2 + 1]);
    *(uint4 *)(to + thread * 8) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}
