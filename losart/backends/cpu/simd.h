/* Inner loops of the CPU kernels.
 *
 * A "slab" is 16 consecutive positions of one kv head: keys channel-major, k[dim][16], so that 16
 * scores form in one vector, or a few; values position-major, v[16][dim].
 *
 * Each loop is compiled for AVX-512, for AVX2 and for what every machine has, with the vector
 * extension of GCC and Clang, and chosen when it is called: simd_level().
 */
#ifndef LOSART_SIMD_H
#define LOSART_SIMD_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define SLAB 16
enum { WIDTH_BFLOAT16 = 1, WIDTH_FLOAT16 = 2, WIDTH_INT8 = 3, WIDTH_FLOAT8 = 4 }; /* codes of formats */
#define LOSART_INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));

LOSART_INLINE float bfloat16_value(uint16_t held)
{
    uint32_t bits = (uint32_t)held << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* Exponent and mantissa move to their float32 places and are scaled by 2^112, which also makes subnormal numbers right;
 * an exponent of all ones (infinity, NaN) is put back by hand. */
LOSART_INLINE float float16_value(uint16_t held)
{
    uint32_t bits = (uint32_t)(held & 0x7fff) << 13;
    uint32_t special = (held & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
    float value;
    memcpy(&value, &bits, 4);
    value *= 0x1p112f;
    memcpy(&bits, &value, 4);
    bits |= special | (uint32_t)(held & 0x8000) << 16;
    memcpy(&value, &bits, 4);
    return value;
}

/* Codes of 8 bits. Integers are held from 0 on for -128: with a scale of 0 zeroed memory is zeros. */
#define LARGEST_INT8 127.0f
#define LARGEST_FLOAT8 448.0f

LOSART_INLINE float int8_value(uint8_t code) { return (float)(code - 128); }

/* The nearest code, ties to even. */
LOSART_INLINE uint8_t int8_code(float x)
{
    x = x > LARGEST_INT8 ? LARGEST_INT8 : x < -LARGEST_INT8 ? -LARGEST_INT8 : x;
    float shifted = x + 12582912.0f; /* 1.5 * 2^23: rounds to whole numbers, which are the last bits */
    uint32_t bits;
    memcpy(&bits, &shifted, 4);
    return (uint8_t)(bits + 128);
}

/* E4M3: exponent and mantissa move to their float32 places and are scaled by 2^120, which also makes
 * subnormal numbers right. */
LOSART_INLINE float float8_value(uint8_t code)
{
    uint32_t bits = (uint32_t)(code & 0x7f) << 20 | (uint32_t)(code & 0x80) << 24;
    float value;
    memcpy(&value, &bits, 4);
    return value * 0x1p120f;
}

/* The nearest code, ties to even. */
LOSART_INLINE uint8_t float8_code(float x)
{
    uint32_t bits, units;
    memcpy(&bits, &x, 4);
    uint32_t sign = bits >> 24 & 0x80;
    float magnitude = fabsf(x) > LARGEST_FLOAT8 ? LARGEST_FLOAT8 : fabsf(x);
    float shifted = magnitude + 0x1p14f; /* rounds to units of 2^-9, those of what is below 2^-6 */
    memcpy(&bits, &magnitude, 4);
    memcpy(&units, &shifted, 4);
    uint32_t normal = (bits - 0x3c000000 + 0x7ffff + (bits >> 20 & 1)) >> 20;
    return (uint8_t)(sign | (bits < 0x3c800000 ? units - 0x46800000 : normal));
}

LOSART_INLINE float code_value(uint8_t code, int width)
{
    return width == WIDTH_INT8 ? int8_value(code) : float8_value(code);
}

#if defined(__x86_64__)
#define SIMD_WIDTH 16
#define SIMD_ROWS 6
#define SIMD_DOTS 16
#define SIMD_TARGET __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")))
#define SIMD(name) name##_avx512
#include "simd_body.h"

#define SIMD_WIDTH 8
#define SIMD_ROWS 6
#define SIMD_DOTS 8
#define SIMD_TARGET __attribute__((target("avx2,fma")))
#define SIMD(name) name##_avx2
#include "simd_body.h"
#endif

#define SIMD_WIDTH 4
#define SIMD_DOTS 8
#ifdef __aarch64__ /* twice the registers of SSE */
#define SIMD_ROWS 6
#else
#define SIMD_ROWS 3
#endif
#define SIMD_TARGET
#define SIMD(name) name##_plain
#include "simd_body.h"

/* 2 AVX-512, 1 AVX2, 0 neither. The environment variable LOSART_SIMD takes it down to that number; below 3 it also does
 * without VNNI or Arm's dot products (integer_dots.h). */
static int simd_level(void)
{
    static int level = -1;
    if (level < 0) {
        int found = 0;
        const char *limit = getenv("LOSART_SIMD");
#if defined(__x86_64__)
        __builtin_cpu_init();
        if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
            found = 1;
            if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
                found = 2;
        }
#endif
        level = limit && *limit && atoi(limit) < found ? atoi(limit) : found;
    }
    return level;
}

#if defined(__x86_64__)
#define CHOOSE(name, ...)                                    \
    switch (simd_level()) {                                  \
    case 2: return name##_avx512(__VA_ARGS__);               \
    case 1: return name##_avx2(__VA_ARGS__);                 \
    default: return name##_plain(__VA_ARGS__);               \
    }
#else
#define CHOOSE(name, ...) return name##_plain(__VA_ARGS__);
#endif

/* s[r][0..15] = q[r][:] . k[:][0..15]: q [rows][dim], k one slab, s rows s_stride floats apart. */
LOSART_INLINE void slab_scores(const float *q, long rows, long dim, const float *k, float *s,
                               long s_stride)
{
    CHOOSE(slab_scores, q, rows, dim, k, s, s_stride)
}

/* s[r][0..15] = w[r][:] . x[:][0..15]: w [rows][dim] of a format's code, x [dim][16], s [rows][16]. */
LOSART_INLINE void slab_products(const void *w, int width, long rows, long dim, const float *x, float *s)
{
    if (width == WIDTH_BFLOAT16) CHOOSE(slab_products_bfloat16, w, rows, dim, x, s)
    else if (width == WIDTH_FLOAT16) CHOOSE(slab_products_float16, w, rows, dim, x, s)
    else CHOOSE(slab_products, w, rows, dim, x, s)
}

/* y[t][r] = w[r][:] . x[t][:]: w the same, x [tokens][dim], 8 tokens at most; y's rows y_stride floats apart. */
LOSART_INLINE void row_products(const void *w, int width, long rows, long dim, const float *x, long tokens, float *y,
                                long y_stride)
{
    if (width == WIDTH_BFLOAT16) CHOOSE(row_products_bfloat16, w, rows, dim, x, tokens, y, y_stride)
    else if (width == WIDTH_FLOAT16) CHOOSE(row_products_float16, w, rows, dim, x, tokens, y, y_stride)
    else CHOOSE(row_products, w, rows, dim, x, tokens, y, y_stride)
}

/* o += p v: p rows p_stride floats apart, v pointers to `slabs` slabs, o [rows][dim]; dim a
 * multiple of 16. */
LOSART_INLINE void slabs_accumulate(const float *p, long p_stride, long rows, const float *const *v,
                                    long slabs, long dim, float *o)
{
    CHOOSE(slabs_accumulate, p, p_stride, rows, v, slabs, dim, o)
}

/* One step of the online softmax for one row over `slabs` slabs of scores.
 *
 * s becomes exp(s - new maximum); *top and *total are the running maximum and sum; where slab_sums
 * is given it gets each slab's sum relative to the new maximum. Returns the factor for what was
 * accumulated so far. A row that has seen only -inf keeps a zero sum; a NaN makes the sum one. */
LOSART_INLINE float softmax_step(float *s, long slabs, float *top, float *total, float *slab_sums)
{
    CHOOSE(softmax_step, s, slabs, top, total, slab_sums)
}

LOSART_INLINE void scale(float *x, long count, float factor) { CHOOSE(scale, x, count, factor) }

/* to = gain times the RMS norm of x, or of total = x + delta where delta is given; NaN where a square overflows. */
LOSART_INLINE void norm(const float *x, const float *delta, const float *gain, long dim, float eps, float *total,
                        float *to)
{
    CHOOSE(norm, x, delta, gain, dim, eps, total, to)
}

/* Turns x[d] with x[half + d] by the angle of these cosines and sines. */
LOSART_INLINE void rotate(float *x, const float *cosines, const float *sines, long half)
{
    CHOOSE(rotate, x, cosines, sines, half)
}

/* to = silu(gates) * ups. */
LOSART_INLINE void gate(const float *gates, const float *ups, long count, float *to)
{
    CHOOSE(gate, gates, ups, count, to)
}

/* y = share * x + (1 - share) * y. */
LOSART_INLINE void mix(const float *x, float share, long count, float *y) { CHOOSE(mix, x, share, count, y) }

LOSART_INLINE void widen_bfloat16(const uint16_t *from, float *to, long count)
{
    CHOOSE(widen_bfloat16, from, to, count)
}

LOSART_INLINE void widen_float16(const uint16_t *from, float *to, long count)
{
    CHOOSE(widen_float16, from, to, count)
}

/* A slab of codes and their scales as the numbers they are, a code times its position's scale: of keys,
 * which are channel-major, or of values. */
LOSART_INLINE void widen_codes(const uint8_t *slab, float *to, long dim, int width, int keys)
{
    CHOOSE(widen_codes, slab, to, dim, width, keys)
}

/* The codes of a key or a value x [dim], `stride` bytes apart. Returns their scale: with it the largest
 * magnitude is the outermost code. What is not all finite gets NaN, so that all of it is read as NaN and
 * shows in the logits. */
LOSART_INLINE float encode(const float *x, long dim, int width, uint8_t *codes, long stride)
{
    CHOOSE(encode, x, dim, width, codes, stride)
}

/* The largest magnitude; infinity where a number is not finite. */
LOSART_INLINE float largest_magnitude(const float *x, long count) { CHOOSE(largest_magnitude, x, count) }

/* The nearest integers of x * factor, ties to even. Returns their sum. */
LOSART_INLINE long round_int8(const float *x, long count, float factor, int8_t *to)
{
    CHOOSE(round_int8, x, count, factor, to)
}
LOSART_INLINE long round_int16(const float *x, long count, float factor, int16_t *to)
{
    CHOOSE(round_int16, x, count, factor, to)
}

/* to[kind][d][0..15] = base[d] + code * step[d], rounded as `width` says, of the codes [2 kinds][dim] of 16 pages. */
LOSART_INLINE void decode_bounds(const uint64_t *codes, const float *base, const float *step, long dim, int width,
                                 float *to)
{
    CHOOSE(decode_bounds, codes, base, step, dim, width, to)
}

/* Rounds to the nearest, ties to even. */
LOSART_INLINE uint16_t narrow_bfloat16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/* Rounds to the nearest, ties to even; what is too large becomes infinity. */
LOSART_INLINE uint16_t narrow_float16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (x != x) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00;
    if (bits < 0x38800000) { /* subnormal: adding 0.5 rounds to units of 2^-24 */
        float shifted;
        memcpy(&shifted, &bits, 4);
        shifted += 0.5f;
        memcpy(&bits, &shifted, 4);
        return sign | (uint16_t)(bits - 0x3f000000);
    }
    return sign | (uint16_t)((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

#endif
