/* A matrix of codes as values [rows, inner], rounded to what tensor cores multiply.
 *
 * Grid: rows * inner / 8 / CODES_THREADS, one thread per 8 columns; inner is a multiple of 8. Must read the codes and
 * write 16 bits for each. */
extern "C" __global__ void __launch_bounds__(CODES_THREADS) widen_codes(CodesView from, Operand *to)
{
    let_next_start();
    int pieces = from.inner / 8;
    size_t thread = (size_t)blockIdx.x * CODES_THREADS + threadIdx.x;
    int row = thread / pieces, piece = thread % pieces;
    if (row < from.rows) {
        CodePlace place = place_of_codes(row, piece, from.inner);
        unsigned words[2], pairs[4];
        for (int i = 0; i < 2; i++) words[i] = ((const unsigned *)from.codes)[place.word + min(i, place.count - 1)];
        unpack(pairs, words);
        size_t at = place_of_scale(row, piece * 8 / from.group, from.groups);
        if (from.zeros) subtract(pairs, ((const Operand *)from.zeros)[at]);
        float scale = widen(((const Scale *)from.scales)[at]);
#pragma unroll
        for (int p = 0; p < 4; p++)
            pairs[p] = pack<Operand>(scale * widen(low_half(pairs[p])), scale * widen(high_half(pairs[p])));
        wait_for_previous(); /* which may still read what was widened before */
        *(uint4 *)(to + thread * 8) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    } else {
        wait_for_previous();
    }
}
