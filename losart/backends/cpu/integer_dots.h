/* Sums of products of 16-bit integers, for matmuls with quantized weights.
 *
 * A panel is 16 rows of weights, their columns in pairs: w[pair][16 rows][2], so that a vector of 32-bit lanes has a
 * pair of each row, and one instruction multiplies and adds the pairs of all of them with a token's pair, which is in
 * every lane. Sums of a block of columns are exact; then they are scaled. */
#ifndef LOSART_INTEGER_DOTS_H
#define LOSART_INTEGER_DOTS_H

#include "simd.h"

#define PANEL 16
#define AHEAD 2048 /* bytes that are prefetched before they are unpacked */

#if defined(__x86_64__)
#include <immintrin.h>

#define DOT_LANES 16
#define DOT_TOKENS 8
#define DOT_TARGET __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")))
#define DOT(name) name##_avx512
#define DOT_INT __m512i
#define DOT_FLOAT __m512
#define DOT_OP(name) _mm512_##name
#define DOT_LOAD(p) _mm512_loadu_si512(p)
#define DOT_HALF(p) _mm256_loadu_si256((const __m256i *)(p))
#define DOT_STORE(p, x) _mm512_storeu_si512(p, x)
#define DOT_AND(x, y) _mm512_and_si512(x, y)
#define DOT_ZERO _mm512_setzero_si512()
#include "integer_dots_body.h"

#define DOT_LANES 8
#define DOT_TOKENS 4
#define DOT_TARGET __attribute__((target("avx2,fma")))
#define DOT(name) name##_avx2
#define DOT_INT __m256i
#define DOT_FLOAT __m256
#define DOT_OP(name) _mm256_##name
#define DOT_LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define DOT_HALF(p) _mm_loadu_si128((const __m128i *)(p))
#define DOT_STORE(p, x) _mm256_storeu_si256((__m256i *)(p), x)
#define DOT_AND(x, y) _mm256_and_si256(x, y)
#define DOT_ZERO _mm256_setzero_si256()
#include "integer_dots_body.h"
#endif

static void unpack_block_plain(const uint8_t *codes, long columns, int bits, int16_t *w)
{
    if (bits == 8) {
        for (long i = 0; i < columns * PANEL; i++) w[i] = (int8_t)codes[i];
        return;
    }
    for (long i = 0; i < columns / 4; i++)
        for (long j = 0; j < 2 * PANEL; j++) {
            w[4 * PANEL * i + j] = codes[2 * PANEL * i + j] & 15;
            w[4 * PANEL * i + 2 * PANEL + j] = codes[2 * PANEL * i + j] >> 4;
        }
}

static void add_block_plain(const int16_t *w, long columns, const float *scale, const float *zero, const int16_t *x,
                            const float *x_scale, const float *x_sum, long tokens, float *sums)
{
    for (long t = 0; t < tokens; t++)
        for (long r = 0; r < PANEL; r++) {
            int32_t sum = 0;
            for (long d = 0; d < columns; d += 2)
                sum += w[PANEL * d + 2 * r] * x[t * columns + d] + w[PANEL * d + 2 * r + 1] * x[t * columns + d + 1];
            sums[t * PANEL + r] += scale[r] * (x_scale[t] * (float)sum - zero[r] * x_sum[t]);
        }
}

/* Codes of a panel's block of columns, a multiple of 4, as 16-bit integers w[columns / 2][16][2]: of 8 bits in the same
 * order, signed; of 4 bits [columns / 4][16][2], unsigned, the first pair of four columns in the lower halves. */
LOSART_INLINE void unpack_block(const uint8_t *codes, long columns, int bits, int16_t *w)
{
    CHOOSE(unpack_block, codes, columns, bits, w)
}

/* sums[t][r] += scale[r] * (x_scale[t] * (w[r][:] . x[t][:]) - zero[r] * x_sum[t]), x [tokens][columns]. */
LOSART_INLINE void add_block(const int16_t *w, long columns, const float *scale, const float *zero, const int16_t *x,
                             const float *x_scale, const float *x_sum, long tokens, float *sums)
{
    CHOOSE(add_block, w, columns, scale, zero, x, x_scale, x_sum, tokens, sums)
}

#endif
