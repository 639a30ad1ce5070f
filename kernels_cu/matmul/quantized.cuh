/* Matrices of codes: entries are (code - zero) * scale, where columns of a group share zero and scale.
 *
 * Codes lie as linear_quantized takes them, which reads them from one end to the other: [panels of QUANTIZED_PANEL
 * rows, units of QUANTIZED_UNIT columns, steps, tiles of CODE_ROWS rows], and a tile of a step as the lanes of a warp
 * have it for the tensor cores. Lane 4 g + t has rows g, g + 8, g + 16 and g + 24, of each of which 8 columns from t *
 * 8 and 8 from 32 + t * 8 on. They are pieces of 16 bytes, [pieces, lanes]: of 4 bits one for two rows, a word for each
 * 8 columns of a row; of 8 bits one for a row. Within words codes are in the order in which they are unpacked two at a
 * time. Integers are held from 0 on. Rows that pad a panel are any numbers; columns that pad a unit are 0.
 *
 * So codes of 8 bits are [panels, steps, rows of a panel, 64 bytes], columns of a step permuted: linear_float8_hopper
 * takes them as they are.
 *
 * Scales and zeros lie in [panels, groups, tiles, g, rows g, g + 8, g + 16 and g + 24], as activations are held; with
 * WIDE_SCALES scales are float32. Compiled with CODES (INT4, INT8 or FLOAT8, which is E4M3 without NaN) and
 * WIDE_SCALES.
 */
#define CODE_BITS (CODES == INT4 ? 4 : 8)
static_assert(CODE_ROWS == 32 && STEP_COLUMNS == 64, "a lane has 8 times 8 codes");

#if WIDE_SCALES
using Scale = float;
#else
using Scale = Activation;
#endif

struct __align__(4 * sizeof(Scale)) FourScales { /* of rows g, g + 8, g + 16 and g + 24 */
    Scale of[4];
};
struct __align__(8) FourZeros {
    Operand of[4];
};

struct CodePlace {
    size_t word; /* of a row's 8 columns, the first one */
    int count;   /* of words, one after the other */
};

/* Where the codes of 8 columns of a row are, `piece` = column / 8. */
__device__ __forceinline__ CodePlace place_of_codes(int row, int piece, int inner)
{
    int r = row % CODE_ROWS, lane = r % 8 * 4 + piece % 4, half = piece / 4 % 2, pair = r / 16, high = r / 8 % 2;
    size_t step = (size_t)(row / QUANTIZED_PANEL) * ((inner + QUANTIZED_UNIT - 1) / QUANTIZED_UNIT) *
                  (QUANTIZED_UNIT / STEP_COLUMNS);
    size_t tile = (step + piece / 8) * (QUANTIZED_PANEL / CODE_ROWS) + row % QUANTIZED_PANEL / CODE_ROWS;
    if (CODE_BITS == 4) return {((tile * 2 + pair) * WARP + lane) * 4 + half * 2 + high, 1};
    return {((tile * 4 + pair * 2 + high) * WARP + lane) * 4 + half * 2, 2};
}

/* Where a row's scale of a group is. */
__device__ __forceinline__ size_t place_of_scale(int row, int group, int groups)
{
    int r = row % CODE_ROWS;
    return ((size_t)(row / QUANTIZED_PANEL) * groups + group) * QUANTIZED_PANEL + row % QUANTIZED_PANEL - r +
           r % 8 * 4 + r / 8;
}

/* The bits that column 0 <= i < 8 has in a row's words, lowest first. */
__device__ __forceinline__ int first_bit(int i)
{
    return CODE_BITS == 4 ? (i / 2 + i % 2 * 4) * 4 : i / 4 * 32 + (i / 2 % 2 + i % 2 * 2) * 8;
}

/* The codes of 8 columns as pairs of operands. */
__device__ __forceinline__ void unpack(unsigned (&pairs)[4], const unsigned *words)
{
#if CODES == INT4
#pragma unroll
    for (int p = 0; p < 4; p++) {
        unsigned code = bits_or(words[0] >> p * 4, 0x000f000fu, BOTH(IS_BF16 ? 0x4300u : 0x6400u));
        pairs[p] = fma_pair(code, BOTH(IS_BF16 ? 0x3f80u : 0x3c00u), BOTH(IS_BF16 ? 0xc308u : 0xe408u));
    }
#else
#pragma unroll
    for (int i = 0; i < 2; i++) {
        pairs[i * 2] = CODES == INT8 ? unpack_integers<false>(words[i]) : unpack_floats<false>(words[i]);
        pairs[i * 2 + 1] = CODES == INT8 ? unpack_integers<true>(words[i]) : unpack_floats<true>(words[i]);
    }
#endif
}

__device__ __forceinline__ void subtract(unsigned (&pairs)[4], Operand zero)
{
    unsigned both = BOTH((unsigned)zero.bits);
#pragma unroll
    for (int p = 0; p < 4; p++) pairs[p] = fma_pair(both, MINUS_ONE, pairs[p]);
}

/* The entries of 8 columns of a row, `piece` = column / 8. */
__device__ __forceinline__ void entries(float (&values)[8], const QuantizedView &matrix, int row, int piece)
{
    CodePlace place = place_of_codes(row, piece, matrix.inner);
    unsigned words[2], pairs[4];
#pragma unroll
    for (int i = 0; i < 2; i++) words[i] = ((const unsigned *)matrix.codes)[place.word + min(i, place.count - 1)];
    unpack(pairs, words);
    size_t at = place_of_scale(row, piece * 8 / matrix.group, matrix.groups);
    if (matrix.zeros) subtract(pairs, ((const Operand *)matrix.zeros)[at]);
    float scale = widen(((const Scale *)matrix.scales)[at]);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        Operand code = {(unsigned short)(pairs[i / 2] >> i % 2 * 16)};
        values[i] = scale * widen(code);
    }
}
