/* Rows of x [tokens, inner] as E4M3 codes [tokens, inner padded to whole units of QUANTIZED_UNIT columns by zeros], and
 * their scales [tokens], float32: of the largest magnitude over LARGEST_FLOAT8, so that it has the outermost code; NaN
 * where a value is not finite. Codes are the nearest ones to x over it, ties to even.
 *
 * Columns are permuted as in the rows of 64 bytes of quantized.cuh's codes, for linear_float8_hopper: bytes t * 16 to
 * t * 16 + 7 have columns from t * 8 on, those that follow columns from 32 + t * 8 on, both in the order of a word.
 *
 * Grid: tokens; inner is a multiple of 8. Must read tokens * inner values of 16 bits and write as many bytes. */
__device__ __forceinline__ unsigned four_codes(float a, float b, float c, float d, float factor)
{
    unsigned short low, high;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(c * factor), "f"(a * factor));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d * factor), "f"(b * factor));
    return low | (unsigned)high << 16;
}

extern "C" __global__ void __launch_bounds__(QUANTIZED_THREADS)
    quantize_tokens_hopper(const Activation *x, uint4 *codes, float *scales, int inner)
{
    __shared__ float largest[QUANTIZED_THREADS / WARP];
    let_next_start();
    wait_for_previous();
    int pieces = inner / 8, token = blockIdx.x; /* of 8 columns */
    const uint4 *from = (const uint4 *)(x + (size_t)token * inner);
    unsigned most = 0; /* the bits of a magnitude; of those that are not finite they are the most */
    for (int piece = threadIdx.x; piece < pieces; piece += QUANTIZED_THREADS) {
        uint4 v = from[piece];
        const unsigned pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int p = 0; p < 4; p++) most = max(most, max(pairs[p] & 0x7fff, pairs[p] >> 16 & 0x7fff));
    }
    float magnitude = widen(Activation{(unsigned short)most});
    magnitude = magnitude < INFINITE ? magnitude : INFINITE; /* NaN would not be the largest */
    magnitude = block_max(magnitude, largest, QUANTIZED_THREADS / WARP);
    float top = fmaxf(magnitude, 0x1p-100f); /* a scale of 0 has no codes, and a factor is finite */
    float factor = LARGEST_FLOAT8 / top;
    if (threadIdx.x == 0) scales[token] = magnitude < INFINITE ? top / LARGEST_FLOAT8 : NOT_A_NUMBER;

    int chunks = (inner + QUANTIZED_UNIT - 1) / QUANTIZED_UNIT * (QUANTIZED_UNIT / 16);
    codes += (size_t)token * chunks;
    for (int chunk = threadIdx.x; chunk < chunks; chunk += QUANTIZED_THREADS) {
        unsigned words[4];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int piece = chunk / 4 * 8 + half * 4 + chunk % 4;
            uint4 v = piece < pieces ? from[piece] : make_uint4(0, 0, 0, 0);
            const unsigned pairs[4] = {v.x, v.y, v.z, v.w};
            float values[8];
#pragma unroll
            for (int i = 0; i < 8; i++) values[i] = widen(Activation{(unsigned short)(pairs[i / 2] >> i % 2 * 16)});
#pragma unroll
            for (int i = 0; i < 2; i++)
                words[half * 2 + i] =
                    four_codes(values[i * 4], values[i * 4 + 1], values[i * 4 + 2], values[i * 4 + 3], factor);
        }
        codes[chunk] = make_uint4(words[0], words[1], words[2], words[3]);
    }
}
