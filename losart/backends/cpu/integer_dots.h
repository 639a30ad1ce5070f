/* Sums of products of integers, for matmuls with quantized weights.
 *
 * A panel is 16 rows of weights. A vector of 32-bit lanes has some columns of each row, and one instruction multiplies
 * and adds those of all rows with a token's, which are in every lane. Sums of a block of columns are exact; then they
 * are scaled.
 *
 *     8 bits   activations of 16: columns in pairs, codes [pair][16 rows][2], widened to 16 bits before
 *     4 bits   activations of 8: columns in fours, codes [8 columns][16 rows][4], bytes whose lower halves are the
 *              first four columns
 *
 * Of 4 bits a lane of 16 bits has at most 8 sums of two products, 15 * 127 each, hence blocks of 32 columns. */
#ifndef LOSART_INTEGER_DOTS_H
#define LOSART_INTEGER_DOTS_H

#include "simd.h"

#define PANEL 16
#define BLOCK 64   /* columns at most: sums of 2^15 * 2^7 * 64 fit into 32 bits */
#define AHEAD 8192 /* bytes that are prefetched before they are unpacked */

/* A panel of weights: scales and zeros [groups][16], each group some blocks of columns; `zero_step` is 0 where all
 * groups have the first's zeros. */
typedef struct {
    const uint8_t *codes;
    const float *scales, *zeros;
    long bits, blocks, columns, group_blocks, zero_step;
} Panel;

/* Rounded activations [blocks][tokens][columns], and of each block and token their scale and scaled sum. */
typedef struct {
    const void *values;
    const float *scales, *sums;
    long tokens;
} Activations;

/* 8-bit codes of a block as 16-bit integers. */
static void widen_block_plain(const int8_t *codes, long columns, int16_t *w)
{
    for (long i = 0; i < columns * PANEL; i++) w[i] = codes[i];
}

static int32_t pair_product(const int16_t *w, const int16_t *x, long columns, long row)
{
    int32_t sum = 0;
    for (long d = 0; d < columns; d++) sum += w[PANEL * (d / 2 * 2) + 2 * row + d % 2] * x[d];
    return sum;
}

static int32_t nibble_product(const uint8_t *w, const int8_t *x, long columns, long row)
{
    int32_t sum = 0;
    for (long d = 0; d < columns; d++) {
        uint8_t both = w[(d / 8 * PANEL + row) * 4 + d % 4];
        sum += (d % 8 < 4 ? both & 15 : both >> 4) * x[d];
    }
    return sum;
}

static void panel_product_plain(Panel w, Activations x, float *y)
{
    int16_t wide[BLOCK * PANEL];
    memset(y, 0, sizeof(float) * x.tokens * PANEL);
    for (long b = 0; b < w.blocks; b++) {
        const uint8_t *codes = w.codes + b * w.columns * PANEL * w.bits / 8;
        const float *scale = w.scales + b / w.group_blocks * PANEL, *zero = w.zeros + b / w.group_blocks * w.zero_step;
        if (w.bits == 8) widen_block_plain((const int8_t *)codes, w.columns, wide);
        for (long t = 0; t < x.tokens; t++)
            for (long r = 0; r < PANEL; r++) {
                long at = b * x.tokens + t;
                int32_t sum = w.bits == 8
                    ? pair_product(wide, (const int16_t *)x.values + at * w.columns, w.columns, r)
                    : nibble_product(codes, (const int8_t *)x.values + at * w.columns, w.columns, r);
                y[t * PANEL + r] += scale[r] * (x.scales[at] * (float)sum - zero[r] * x.sums[at]);
            }
    }
}

#if defined(__x86_64__)
#include <immintrin.h>

#define DOT_LANES 16
#define DOT_TOKENS 8
#define DOT_INT __m512i
#define DOT_FLOAT __m512
#define DOT_OP(name) _mm512_##name
#define DOT_LOAD(p) _mm512_loadu_si512(p)
#define DOT_HALF(p) _mm256_loadu_si256((const __m256i *)(p))
#define DOT_STORE(p, x) _mm512_storeu_si512(p, x)
#define DOT_AND(x, y) _mm512_and_si512(x, y)
#define DOT_ZERO _mm512_setzero_si512()

#define DOT_TARGET __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")))
#define DOT(name) name##_avx512
#include "integer_dots_body.h"

#define DOT_VNNI(name) _mm512_##name##_epi32
#define DOT_TARGET __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx512vnni,avx2,fma")))
#define DOT(name) name##_avx512vnni
#include "integer_dots_body.h"

#undef DOT_LANES
#undef DOT_TOKENS
#undef DOT_INT
#undef DOT_FLOAT
#undef DOT_OP
#undef DOT_LOAD
#undef DOT_HALF
#undef DOT_STORE
#undef DOT_AND
#undef DOT_ZERO

#define DOT_LANES 8
#define DOT_TOKENS 4
#define DOT_INT __m256i
#define DOT_FLOAT __m256
#define DOT_OP(name) _mm256_##name
#define DOT_LOAD(p) _mm256_loadu_si256((const __m256i *)(p))
#define DOT_HALF(p) _mm_loadu_si128((const __m128i *)(p))
#define DOT_STORE(p, x) _mm256_storeu_si256((__m256i *)(p), x)
#define DOT_AND(x, y) _mm256_and_si256(x, y)
#define DOT_ZERO _mm256_setzero_si256()

#define DOT_TARGET __attribute__((target("avx2,fma")))
#define DOT(name) name##_avx2
#include "integer_dots_body.h"

#if __clang_major__ >= 19 || (!defined(__clang__) && __GNUC__ >= 11)
#define HAS_AVX_VNNI __builtin_cpu_supports("avxvnni")
#define DOT_VNNI(name) _mm256_##name##_avx_epi32
#define DOT_TARGET __attribute__((target("avxvnni,avx2,fma")))
#define DOT(name) name##_avxvnni
#include "integer_dots_body.h"
#else /* a compiler that does not know it */
#define HAS_AVX_VNNI 0
#define panel_product_avxvnni panel_product_avx2
#endif
#endif

#if defined(__aarch64__) && defined(__linux__) && (__GNUC__ >= 8 || __clang_major__ >= 16)
#define HAS_NEON_DOTS
#include "integer_dots_neon.h"
#endif

/* Whether dot products of bytes are used: the processor has VNNI in vectors of that level, or Arm's, and LOSART_SIMD is
 * not below 3. */
static int has_dots(void)
{
    static int answer = -1;
    if (answer < 0) {
        int found = 0; /* other threads must not see it before it is right */
        const char *limit = getenv("LOSART_SIMD");
        if (!limit || !*limit || atoi(limit) > 2) {
#if defined(__x86_64__)
            found = simd_level() == 2 ? __builtin_cpu_supports("avx512vnni") > 0 : simd_level() == 1 && HAS_AVX_VNNI;
#elif defined(HAS_NEON_DOTS)
            found = has_dot_products();
#endif
        }
        answer = found;
    }
    return answer;
}

/* y[t][r] = the sum over blocks of scale[r] * (x_scale[t] * (w[r][:] . x[t][:]) - zero[r] * x_sum[t]). */
LOSART_INLINE void panel_product(Panel w, Activations x, float *y)
{
    if (has_dots()) {
#if defined(__x86_64__)
        if (simd_level() == 2)
            panel_product_avx512vnni(w, x, y);
        else
            panel_product_avxvnni(w, x, y);
        return;
#elif defined(HAS_NEON_DOTS)
        panel_product_neon(w, x, y);
        return;
#endif
    }
    CHOOSE(panel_product, w, x, y)
}

#endif
