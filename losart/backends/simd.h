/* Inner loops of the CPU kernels, on 16 float lanes whatever the machine's vectors are.
 *
 * Written with the vector extension of GCC and Clang, and compiled for several CPU generations
 * where the compiler can choose between them at load time (LOSART_TARGET_CLONES, set by setup.py).
 *
 * A "slab" is 16 consecutive positions of one kv head: keys channel-major, k[dim][16], so that 16
 * scores form in one vector; values position-major, v[16][dim].
 */
#ifndef LOSART_SIMD_H
#define LOSART_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define SLAB 16

#ifdef LOSART_TARGET_CLONES
#define LOSART_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define LOSART_CLONES
#endif
#define LOSART_INLINE static inline __attribute__((always_inline))

typedef float f32x16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t u16x16 __attribute__((vector_size(32), aligned(2), may_alias));

LOSART_INLINE f32x16 broadcast(float x) { return x - (f32x16){0}; }

/* ---- scores ------------------------------------------------------------------------------- */

/* s[r][0..15] = sum over d of q[r][d] * k[d][0..15], for a compile-time number of rows. */
#define SCORES(ROWS)                                                                       \
    {                                                                                      \
        f32x16 sum[ROWS];                                                                  \
        for (int r = 0; r < ROWS; r++) sum[r] = (f32x16){0};                               \
        for (long d = 0; d < dim; d++) {                                                   \
            f32x16 key = *(const f32x16 *)(k + d * SLAB);                                  \
            _Pragma("GCC unroll 6") for (int r = 0; r < ROWS; r++) sum[r] +=               \
                q[r * dim + d] * key;                                                      \
        }                                                                                  \
        for (int r = 0; r < ROWS; r++) *(f32x16 *)(s + r * s_stride) = sum[r];             \
    }

/* q [rows][dim], k one slab [dim][16], s [rows] of s_stride floats. */
LOSART_CLONES static void slab_scores(const float *q, long rows, long dim, const float *k, float *s,
                                      long s_stride)
{
    for (; rows >= 6; rows -= 6, q += 6 * dim, s += 6 * s_stride) SCORES(6)
    switch (rows) {
    case 5: SCORES(5) break;
    case 4: SCORES(4) break;
    case 3: SCORES(3) break;
    case 2: SCORES(2) break;
    case 1: SCORES(1) break;
    }
}

/* ---- weighted sum of values --------------------------------------------------------------- */

/* o[r][c..c+15] += sum over slabs and their positions of p[r][.] * v[.][c..c+15]. */
#define ACCUMULATE(ROWS)                                                                   \
    for (long c = 0; c < dim; c += SLAB) {                                                 \
        f32x16 sum[ROWS];                                                                  \
        for (int r = 0; r < ROWS; r++) sum[r] = *(const f32x16 *)(o + r * dim + c);        \
        for (long b = 0; b < slabs; b++) {                                                 \
            const float *value = v[b] + c, *weight = p + b * SLAB;                         \
            for (long j = 0; j < SLAB; j++) {                                              \
                f32x16 row = *(const f32x16 *)(value + j * dim);                           \
                _Pragma("GCC unroll 6") for (int r = 0; r < ROWS; r++) sum[r] +=           \
                    weight[r * p_stride + j] * row;                                        \
            }                                                                              \
        }                                                                                  \
        for (int r = 0; r < ROWS; r++) *(f32x16 *)(o + r * dim + c) = sum[r];              \
    }

/* p [rows] of p_stride floats, v pointers to `slabs` slabs [16][dim], o [rows][dim]; dim a
 * multiple of 16. */
LOSART_CLONES static void slabs_accumulate(const float *p, long p_stride, long rows,
                                           const float *const *v, long slabs, long dim, float *o)
{
    for (; rows >= 6; rows -= 6, p += 6 * p_stride, o += 6 * dim) ACCUMULATE(6)
    switch (rows) {
    case 5: ACCUMULATE(5) break;
    case 4: ACCUMULATE(4) break;
    case 3: ACCUMULATE(3) break;
    case 2: ACCUMULATE(2) break;
    case 1: ACCUMULATE(1) break;
    }
}

/* ---- online softmax ----------------------------------------------------------------------- */

/* e^x for x <= 0 to 2 units in the last place, 0 below -87 (-inf included), NaN for NaN. */
LOSART_INLINE f32x16 exp_negative(f32x16 x)
{
    const f32x16 lowest = broadcast(-87.0f);
    i32x16 alive = ~(x < lowest);
    x = (f32x16)(((i32x16)x & alive) | ((i32x16)lowest & ~alive));
    /* x = n ln2 + r; adding and taking away 1.5 * 2^23 rounds to the nearest whole n. */
    f32x16 shifted = x * 1.44269504088896341f + 12582912.0f;
    f32x16 n = shifted - 12582912.0f;
    f32x16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
    f32x16 y = broadcast(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    i32x16 power = (((i32x16)shifted - 0x4B400000) + 127) << 23;
    return (f32x16)((i32x16)(y * (f32x16)power) & alive);
}

LOSART_INLINE f32x16 larger(f32x16 a, f32x16 b)
{
    i32x16 first = a > b;
    return (f32x16)(((i32x16)a & first) | ((i32x16)b & ~first));
}

LOSART_INLINE float horizontal_sum(f32x16 x)
{
    float lane[SLAB];
    memcpy(lane, &x, sizeof lane);
    for (int half = SLAB / 2; half; half /= 2)
        for (int j = 0; j < half; j++) lane[j] += lane[j + half];
    return lane[0];
}

/* One step of the online softmax for one row over `slabs` slabs of scores.
 *
 * s becomes exp(s - new maximum); *top and *total are the running maximum and sum; where slab_sums
 * is given it gets each slab's sum relative to the new maximum. Returns the factor for what was
 * accumulated so far. A row that has seen only -inf keeps a zero sum; a NaN makes the sum one. */
LOSART_CLONES static float softmax_step(float *s, long slabs, float *top, float *total, float *slab_sums)
{
    f32x16 highest = *(const f32x16 *)s;
    for (long b = 1; b < slabs; b++) highest = larger(*(const f32x16 *)(s + b * SLAB), highest);
    float new_top = *top;
    for (int j = 0; j < SLAB; j++) new_top = highest[j] > new_top ? highest[j] : new_top;
    if (new_top == -INFINITY) {
        for (long i = 0; i < slabs * SLAB; i++) {
            if (s[i] != s[i]) *total = NAN;
            s[i] = 0.0f;
        }
        if (slab_sums) memset(slab_sums, 0, sizeof(float) * slabs);
        return 1.0f;
    }
    f32x16 sum = {0};
    for (long b = 0; b < slabs; b++) {
        f32x16 e = exp_negative(*(const f32x16 *)(s + b * SLAB) - new_top);
        *(f32x16 *)(s + b * SLAB) = e;
        sum += e;
        if (slab_sums) slab_sums[b] = horizontal_sum(e);
    }
    float factor = expf(*top - new_top);
    *top = new_top;
    *total = *total * factor + horizontal_sum(sum);
    return factor;
}

LOSART_CLONES static void scale(float *x, long count, float factor)
{
    for (long i = 0; i < count; i++) x[i] *= factor;
}

/* ---- 16-bit floats ------------------------------------------------------------------------ */

LOSART_CLONES static void widen_bfloat16(const uint16_t *from, float *to, long count)
{
    for (long i = 0; i < count; i++) ((uint32_t *)to)[i] = (uint32_t)from[i] << 16;
}

/* Exponent and mantissa move to their float32 places and are scaled by 2^112, which also makes
 * subnormal numbers right; an exponent of all ones (infinity, NaN) is put back by hand. */
LOSART_CLONES static void widen_float16(const uint16_t *from, float *to, long count)
{
    for (long i = 0; i < count; i++) {
        uint32_t bits = (uint32_t)(from[i] & 0x7fff) << 13;
        uint32_t special = (from[i] & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        magnitude *= 5.192296858534828e33f;
        memcpy(&bits, &magnitude, 4);
        bits |= special | (uint32_t)(from[i] & 0x8000) << 16;
        memcpy(to + i, &bits, 4);
    }
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
