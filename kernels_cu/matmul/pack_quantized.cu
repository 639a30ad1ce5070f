/* Some rows of a matrix into its codes, scales and zeros (matmul/quantized.cuh), from codes [count, inner], E4M3's bits
 * or integers from -8 or -128 on, scales [count, groups] and zeros alike, or null. They become rows `first` to `first`
 * + 7, and `stride` rows further the next eight, and so on.
 *
 * Grid: count * inner / 8 / QUANTIZED_THREADS, one thread per 8 columns; inner is a multiple of 8, and a group has no
 * fewer.
 */
extern "C" __global__ void __launch_bounds__(QUANTIZED_THREADS)
    pack_quantized(const signed char *codes, const float *scales, const float *zeros, QuantizedView to, int first,
                   int stride, int count)
{
    let_next_start();
    wait_for_previous();
    int pieces = to.inner / 8;
    size_t thread = (size_t)blockIdx.x * QUANTIZED_THREADS + threadIdx.x;
    int index = thread / pieces, piece = thread % pieces, row = first + index / 8 * stride + index % 8;
    if (index >= count) return;
    const signed char *from = codes + (size_t)index * to.inner + piece * 8;
    unsigned words[2] = {};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int code = from[i] + (CODES == INT4 ? 8 : CODES == INT8 ? 128 : 0);
        words[first_bit(i) / 32] |= (unsigned)(code & ((1 << CODE_BITS) - 1)) << first_bit(i) % 32;
    }
    CodePlace place = place_of_codes(row, piece, to.inner);
    for (int i = 0; i < place.count; i++) ((unsigned *)to.codes)[place.word + i] = words[i];
    int groups = (to.inner + to.group - 1) / to.group; /* but for those that pad the last unit */
    if (piece >= groups) return;
    size_t at = place_of_scale(row, piece, to.groups), of_row = (size_t)index * groups + piece;
    ((Scale *)to.scales)[at] = narrow<Scale>(scales[of_row]);
    if (zeros) ((Operand *)to.zeros)[at] = narrow<Operand>(zeros[of_row]);
}
