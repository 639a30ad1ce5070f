/* The inner loops for one kind of vector. Included by simd.h once for each, with
 *
 *   SIMD_WIDTH     float lanes of a vector: 16, 8 or 4
 *   SIMD_ROWS      rows that are computed together: as many as the registers hold sums of
 *   SIMD_DOTS      sums of row_products that the registers hold
 *   SIMD_TARGET    attribute that lets the compiler use these vectors
 *   SIMD(name)     name with the kind's suffix
 *
 * A vector type wider than the machine's would be kept in memory, hence one inclusion for each.
 */
#define vec SIMD(vec)
#define ivec SIMD(ivec)
#define uvec SIMD(uvec)
#define hvec SIMD(hvec)
#define PARTS (SLAB / SIMD_WIDTH) /* vectors of a slab */

typedef float vec __attribute__((vector_size(4 * SIMD_WIDTH), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * SIMD_WIDTH)));
typedef uint32_t uvec __attribute__((vector_size(4 * SIMD_WIDTH)));
typedef uint16_t hvec __attribute__((vector_size(2 * SIMD_WIDTH), aligned(2), may_alias));

/* ---- scores: s[r][0..15] = sum over d of q[r][d] * k[d][0..15] --------------------------------- */

#define SCORES(ROWS)                                                                              \
    {                                                                                             \
        vec sum[ROWS][PARTS];                                                                     \
        for (int r = 0; r < ROWS; r++)                                                            \
            for (int i = 0; i < PARTS; i++) sum[r][i] = (vec){0};                                 \
        for (long d = 0; d < dim; d++) {                                                          \
            vec key[PARTS];                                                                       \
            UNROLL for (int i = 0; i < PARTS; i++) key[i] = ((const vec *)(k + d * SLAB))[i];     \
            UNROLL for (int r = 0; r < ROWS; r++) {                                               \
                float x = q[r * dim + d];                                                         \
                UNROLL for (int i = 0; i < PARTS; i++) sum[r][i] += x * key[i];                   \
            }                                                                                     \
        }                                                                                         \
        for (int r = 0; r < ROWS; r++)                                                            \
            for (int i = 0; i < PARTS; i++) ((vec *)(s + r * s_stride))[i] = sum[r][i];           \
    }

SIMD_TARGET static void SIMD(slab_scores)(const float *q, long rows, long dim, const float *k, float *s,
                                          long s_stride)
{
    for (; rows >= SIMD_ROWS; rows -= SIMD_ROWS, q += SIMD_ROWS * dim, s += SIMD_ROWS * s_stride)
        SCORES(SIMD_ROWS)
    switch (rows) {
#if SIMD_ROWS > 3
    case 5: SCORES(5) break;
    case 4: SCORES(4) break;
    case 3: SCORES(3) break;
#endif
    case 2: SCORES(2) break;
    case 1: SCORES(1) break;
    }
}

/* ---- products of a slab of tokens: s[r][0..15] = sum over d of w[r][d] * x[d][0..15] ------------ */

#define WIDE(p) (*(const vec *)(p))
#define WIDENED(p) ((vec)(__builtin_convertvector(*(const hvec *)(p), uvec) << 16))
#define WIDENED_HALF(p) SIMD(widened_half)(*(const hvec *)(p))

/* As float16_value. */
SIMD_TARGET LOSART_INLINE vec SIMD(widened_half)(hvec held)
{
    uvec bits = __builtin_convertvector(held, uvec);
    uvec special = (uvec)((bits & 0x7c00) == 0x7c00) & 0x7f800000;
    vec magnitude = (vec)((bits & 0x7fff) << 13) * 0x1p112f;
    return (vec)((uvec)magnitude | special | (bits & 0x8000) << 16);
}

/* Weights are widened just before they are multiplied, SLAB channels of each row at a time, while the products of the
 * SLAB before still run: done for whole rows in advance it waits for memory while nothing is multiplied. Memory is
 * asked for AHEAD channels earlier, at the end of these rows for the next ones. */
#define AHEAD 256
#define WIDEN_SLAB(ROWS, LOAD, to, d)                                                             \
    UNROLL for (int r = 0; r < ROWS; r++)                                                         \
        UNROLL for (int i = 0; i < PARTS; i++)                                                    \
            ((vec *)(to + r * SLAB))[i] = LOAD(w + r * dim + (d) + i * SIMD_WIDTH);

#define PRODUCTS(ROWS, HELD, LOAD, ONE)                                                           \
    {                                                                                             \
        float wide[2][ROWS * SLAB] __attribute__((aligned(64)));                                  \
        vec sum[ROWS][PARTS];                                                                     \
        UNROLL for (int r = 0; r < ROWS; r++)                                                     \
            UNROLL for (int i = 0; i < PARTS; i++) sum[r][i] = (vec){0};                          \
        long whole = dim / SLAB * SLAB;                                                           \
        if (whole) WIDEN_SLAB(ROWS, LOAD, wide[0], 0)                                             \
        for (long d = 0; d < whole; d += SLAB) {                                                  \
            const float *weight = wide[d / SLAB % 2];                                             \
            float *next = wide[(d / SLAB + 1) % 2];                                               \
            if (d * sizeof(HELD) % 64 == 0) {                                                     \
                const HELD *soon = w + d + AHEAD + (d + AHEAD < dim ? 0 : (ROWS - 1) * dim);      \
                UNROLL for (int r = 0; r < ROWS; r++) __builtin_prefetch(soon + r * dim);         \
            }                                                                                     \
            if (d + SLAB < whole) WIDEN_SLAB(ROWS, LOAD, next, d + SLAB)                          \
            UNROLL for (int e = 0; e < SLAB; e++) {                                               \
                vec token[PARTS];                                                                 \
                UNROLL for (int i = 0; i < PARTS; i++) token[i] =                                 \
                    ((const vec *)(x + (d + e) * SLAB))[i];                                       \
                UNROLL for (int r = 0; r < ROWS; r++)                                             \
                    UNROLL for (int i = 0; i < PARTS; i++) sum[r][i] += weight[r * SLAB + e] * token[i]; \
            }                                                                                     \
        }                                                                                         \
        for (long d = whole; d < dim; d++)                                                        \
            UNROLL for (int r = 0; r < ROWS; r++)                                                 \
                UNROLL for (int i = 0; i < PARTS; i++) sum[r][i] +=                               \
                    ONE(w[r * dim + d]) * ((const vec *)(x + d * SLAB))[i];                       \
        UNROLL for (int r = 0; r < ROWS; r++)                                                     \
            UNROLL for (int i = 0; i < PARTS; i++) ((vec *)(s + r * SLAB))[i] = sum[r][i];        \
    }

#define SLAB_PRODUCTS(name, HELD, LOAD, ONE)                                                      \
    SIMD_TARGET static void SIMD(name)(const HELD *w, long rows, long dim, const float *x, float *s) \
    {                                                                                             \
        for (; rows >= SIMD_ROWS; rows -= SIMD_ROWS, w += SIMD_ROWS * dim, s += SIMD_ROWS * SLAB) \
            PRODUCTS(SIMD_ROWS, HELD, LOAD, ONE)                                                  \
        for (; rows; rows--, w += dim, s += SLAB) PRODUCTS(1, HELD, LOAD, ONE)                    \
    }

SLAB_PRODUCTS(slab_products, float, WIDE, )
SLAB_PRODUCTS(slab_products_bfloat16, uint16_t, WIDENED, bfloat16_value)
SLAB_PRODUCTS(slab_products_float16, uint16_t, WIDENED_HALF, float16_value)

/* ---- values: o[r][c] += sum over slabs and their positions j of p[r][j] * v[j][c] --------------- */

#define ACCUMULATE(ROWS)                                                                          \
    for (long c = 0; c < dim; c += SLAB) {                                                        \
        vec sum[ROWS][PARTS];                                                                     \
        for (int r = 0; r < ROWS; r++)                                                            \
            for (int i = 0; i < PARTS; i++) sum[r][i] = ((const vec *)(o + r * dim + c))[i];      \
        for (long b = 0; b < slabs; b++) {                                                        \
            const float *value = v[b] + c, *weight = p + b * SLAB;                                \
            for (long j = 0; j < SLAB; j++) {                                                     \
                vec row[PARTS];                                                                   \
                UNROLL for (int i = 0; i < PARTS; i++) row[i] =                                   \
                    ((const vec *)(value + j * dim))[i];                                          \
                UNROLL for (int r = 0; r < ROWS; r++) {                                           \
                    float x = weight[r * p_stride + j];                                           \
                    UNROLL for (int i = 0; i < PARTS; i++) sum[r][i] += x * row[i];               \
                }                                                                                 \
            }                                                                                     \
        }                                                                                         \
        for (int r = 0; r < ROWS; r++)                                                            \
            for (int i = 0; i < PARTS; i++) ((vec *)(o + r * dim + c))[i] = sum[r][i];            \
    }

SIMD_TARGET static void SIMD(slabs_accumulate)(const float *p, long p_stride, long rows,
                                               const float *const *v, long slabs, long dim, float *o)
{
    for (; rows >= SIMD_ROWS; rows -= SIMD_ROWS, p += SIMD_ROWS * p_stride, o += SIMD_ROWS * dim)
        ACCUMULATE(SIMD_ROWS)
    switch (rows) {
#if SIMD_ROWS > 3
    case 5: ACCUMULATE(5) break;
    case 4: ACCUMULATE(4) break;
    case 3: ACCUMULATE(3) break;
#endif
    case 2: ACCUMULATE(2) break;
    case 1: ACCUMULATE(1) break;
    }
}

SIMD_TARGET LOSART_INLINE float SIMD(horizontal_sum)(vec x)
{
    float lane[SIMD_WIDTH];
    memcpy(lane, &x, sizeof lane);
    quad sum = *(const quad *)lane;
    for (int j = 4; j < SIMD_WIDTH; j += 4) sum += *(const quad *)(lane + j);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

/* ---- products of few tokens: y[t][r] = sum over d of w[r][d] * x[t][d] --------------------------- */

/* A row of weights is read once for all tokens, its own channels being the lanes. The next rows are asked for
 * ahead: rows are too short for the machine to see by itself that all of them are read. */
#define DOTS(TOKENS, ROWS, HELD, LOAD, ONE)                                                       \
    for (; rows >= ROWS; rows -= ROWS, w += ROWS * dim, y += ROWS) {                              \
        vec sum[ROWS][TOKENS];                                                                    \
        UNROLL for (int r = 0; r < ROWS; r++)                                                     \
            UNROLL for (int t = 0; t < TOKENS; t++) sum[r][t] = (vec){0};                         \
        long d = 0;                                                                               \
        for (; d + SIMD_WIDTH <= dim; d += SIMD_WIDTH) {                                          \
            vec weight[ROWS];                                                                     \
            UNROLL for (int r = 0; r < ROWS; r++) {                                               \
                weight[r] = LOAD(w + r * dim + d);                                                \
                __builtin_prefetch(w + (ROWS + r) * dim + d);                                     \
            }                                                                                     \
            UNROLL for (int t = 0; t < TOKENS; t++) {                                             \
                vec there = *(const vec *)(x + t * dim + d);                                      \
                UNROLL for (int r = 0; r < ROWS; r++) sum[r][t] += weight[r] * there;             \
            }                                                                                     \
        }                                                                                         \
        UNROLL for (int r = 0; r < ROWS; r++)                                                     \
            UNROLL for (int t = 0; t < TOKENS; t++) {                                             \
                float total = SIMD(horizontal_sum)(sum[r][t]);                                    \
                for (long e = d; e < dim; e++) total += ONE(w[r * dim + e]) * x[t * dim + e];     \
                y[t * y_stride + r] = total;                                                      \
            }                                                                                     \
    }

#define FEW_TOKENS(TOKENS, HELD, LOAD, ONE)                                                       \
    case TOKENS:                                                                                  \
        DOTS(TOKENS, (SIMD_DOTS / TOKENS < 4 ? SIMD_DOTS / TOKENS : 4), HELD, LOAD, ONE)          \
        DOTS(TOKENS, 1, HELD, LOAD, ONE)                                                          \
        break;

#define ROW_PRODUCTS(name, HELD, LOAD, ONE)                                                       \
    SIMD_TARGET static void SIMD(name)(const HELD *w, long rows, long dim, const float *x,        \
                                       long tokens, float *y, long y_stride)                      \
    {                                                                                             \
        switch (tokens) {                                                                         \
            FEW_TOKENS(1, HELD, LOAD, ONE)                                                        \
            FEW_TOKENS(2, HELD, LOAD, ONE)                                                        \
            FEW_TOKENS(3, HELD, LOAD, ONE)                                                        \
            FEW_TOKENS(4, HELD, LOAD, ONE)                                                        \
            FEW_TOKENS(5, HELD, LOAD, ONE)                                                        \
            FEW_TOKENS(6, HELD, LOAD, ONE)                                                        \
            FEW_TOKENS(7, HELD, LOAD, ONE)                                                        \
            FEW_TOKENS(8, HELD, LOAD, ONE)                                                        \
        }                                                                                         \
    }

ROW_PRODUCTS(row_products, float, WIDE, )
ROW_PRODUCTS(row_products_bfloat16, uint16_t, WIDENED, bfloat16_value)
ROW_PRODUCTS(row_products_float16, uint16_t, WIDENED_HALF, float16_value)

/* ---- online softmax ----------------------------------------------------------------------------- */

/* e^x for x <= 0 to 2 units in the last place, 0 below -87 (-inf included), NaN for NaN. */
SIMD_TARGET LOSART_INLINE vec SIMD(exp_negative)(vec x)
{
    const vec lowest = (vec){0} - 87.0f;
    ivec alive = ~(ivec)(x < lowest);
    x = (vec)(((ivec)x & alive) | ((ivec)lowest & ~alive));
    /* x = n ln2 + r; adding and taking away 1.5 * 2^23 rounds to the nearest whole n. */
    vec shifted = x * 1.44269504088896341f + 12582912.0f;
    vec n = shifted - 12582912.0f;
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    ivec power = (((ivec)shifted - 0x4B400000) + 127) << 23;
    return (vec)((ivec)(y * (vec)power) & alive);
}

SIMD_TARGET static float SIMD(softmax_step)(float *s, long slabs, float *top, float *total,
                                            float *slab_sums)
{
    vec highest = *(const vec *)s;
    for (long i = 1; i < slabs * PARTS; i++) {
        vec x = ((const vec *)s)[i];
        ivec larger = x > highest;
        highest = (vec)(((ivec)x & larger) | ((ivec)highest & ~larger));
    }
    float new_top = *top;
    for (int j = 0; j < SIMD_WIDTH; j++) new_top = highest[j] > new_top ? highest[j] : new_top;
    if (new_top == -INFINITY) {
        for (long i = 0; i < slabs * SLAB; i++) {
            if (s[i] != s[i]) *total = NAN;
            s[i] = 0.0f;
        }
        if (slab_sums) memset(slab_sums, 0, sizeof(float) * slabs);
        return 1.0f;
    }
    vec sum = {0};
    for (long b = 0; b < slabs; b++) {
        vec slab_sum = {0};
        for (int i = 0; i < PARTS; i++) {
            vec *scores = (vec *)(s + b * SLAB) + i;
            *scores = SIMD(exp_negative)(*scores - new_top);
            slab_sum += *scores;
        }
        sum += slab_sum;
        if (slab_sums) slab_sums[b] = SIMD(horizontal_sum)(slab_sum);
    }
    float factor = expf(*top - new_top);
    *top = new_top;
    *total = *total * factor + SIMD(horizontal_sum)(sum);
    return factor;
}

SIMD_TARGET static void SIMD(scale)(float *x, long count, float factor)
{
    for (long i = 0; i < count; i++) x[i] *= factor;
}

/* ---- between matmuls ---------------------------------------------------------------------------- */

SIMD_TARGET static void SIMD(norm)(const float *restrict x, const float *restrict delta, const float *restrict gain,
                                   long dim, float eps, float *restrict total, float *restrict to)
{
    vec squares = {0};
    long d = 0;
    for (; d + SIMD_WIDTH <= dim; d += SIMD_WIDTH) {
        vec here = *(const vec *)(x + d);
        if (delta) *(vec *)(total + d) = here += *(const vec *)(delta + d);
        squares += here * here;
    }
    float sum = SIMD(horizontal_sum)(squares);
    for (; d < dim; d++) {
        float here = x[d];
        if (delta) total[d] = here += delta[d];
        sum += here * here;
    }
    if (isinf(sum)) sum = NAN; /* or what overflows would come out as zeros */
    float factor = 1.0f / sqrtf(sum / dim + eps);
    const float *from = delta ? total : x;
    for (d = 0; d < dim; d++) to[d] = from[d] * factor * gain[d];
}

SIMD_TARGET static void SIMD(rotate)(float *restrict x, const float *restrict cosines, const float *restrict sines,
                                     long half)
{
    for (long d = 0; d < half; d++) {
        float first = x[d], second = x[half + d];
        x[d] = first * cosines[d] - second * sines[d];
        x[half + d] = second * cosines[d] + first * sines[d];
    }
}

SIMD_TARGET static void SIMD(gate)(const float *gates, const float *ups, long count, float *to)
{
    for (long i = 0; i < count; i += SIMD_WIDTH) {
        long some = count - i < SIMD_WIDTH ? count - i : SIMD_WIDTH;
        vec g = {0}, up = {0};
        if (some == SIMD_WIDTH) {
            g = *(const vec *)(gates + i);
            up = *(const vec *)(ups + i);
        } else {
            memcpy(&g, gates + i, 4 * some);
            memcpy(&up, ups + i, 4 * some);
        }
        /* Of -|g|, so that nothing overflows. */
        vec e = SIMD(exp_negative)((vec)((uvec)g | 0x80000000u));
        ivec negative = g < 0.0f;
        vec y = g * (vec)(((ivec)e & negative) | ((ivec)((vec){0} + 1.0f) & ~negative)) / (1.0f + e) * up;
        if (some == SIMD_WIDTH) *(vec *)(to + i) = y;
        else memcpy(to + i, &y, 4 * some);
    }
}

SIMD_TARGET static void SIMD(mix)(const float *restrict x, float share, long count, float *restrict y)
{
    for (long i = 0; i < count; i++) y[i] += (x[i] - y[i]) * share;
}

/* ---- 16-bit floats ------------------------------------------------------------------------------ */

SIMD_TARGET static void SIMD(widen_bfloat16)(const uint16_t *from, float *to, long count)
{
    for (long i = 0; i < count; i++) to[i] = bfloat16_value(from[i]);
}

SIMD_TARGET static void SIMD(widen_float16)(const uint16_t *from, float *to, long count)
{
    for (long i = 0; i < count; i++) to[i] = float16_value(from[i]);
}

/* ---- codes of 8 bits ---------------------------------------------------------------------------- */

#define WIDEN_ROWS(ROWS, COLUMNS, VALUE, SCALE)                                                   \
    for (long r = 0; r < ROWS; r++)                                                               \
        for (long c = 0; c < COLUMNS; c++)                                                        \
            to[r * COLUMNS + c] = VALUE(slab[r * COLUMNS + c]) * scales[SCALE];

SIMD_TARGET static void SIMD(widen_codes)(const uint8_t *restrict slab, float *restrict to, long dim,
                                          int width, int keys)
{
    const float *restrict scales = (const float *)(slab + SLAB * dim);
    if (width == WIDTH_INT8 && keys) WIDEN_ROWS(dim, SLAB, int8_value, c)
    else if (width == WIDTH_INT8) WIDEN_ROWS(SLAB, dim, int8_value, r)
    else if (keys) WIDEN_ROWS(dim, SLAB, float8_value, c)
    else WIDEN_ROWS(SLAB, dim, float8_value, r)
}

/* Infinity where a number is not finite. */
SIMD_TARGET static float SIMD(largest_magnitude)(const float *x, long count)
{
    uint32_t top = 0; /* bits: those of a NaN are larger than any */
    for (long i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        bits &= 0x7fffffff;
        top = bits > top ? bits : top;
    }
    float largest;
    top = top > 0x7f800000 ? 0x7f800000 : top;
    memcpy(&largest, &top, 4);
    return largest;
}

#define ENCODE(CODE)                                                                              \
    for (long d = 0; d < dim; d++) codes[d * stride] = CODE(scale > 0.0f ? x[d] / scale : 0.0f);

SIMD_TARGET static float SIMD(encode)(const float *restrict x, long dim, int width, uint8_t *restrict codes,
                                      long stride)
{
    float largest = SIMD(largest_magnitude)(x, dim);
    float scale = largest < INFINITY ? largest / (width == WIDTH_INT8 ? LARGEST_INT8 : LARGEST_FLOAT8) : NAN;
    if (width == WIDTH_INT8) ENCODE(int8_code)
    else ENCODE(float8_code)
    return scale;
}

/* ---- activations in integers -------------------------------------------------------------------- */

#define ROUND_TO(name, TYPE)                                                                      \
    SIMD_TARGET static long SIMD(name)(const float *restrict x, long count, float factor,         \
                                       TYPE *restrict to)                                         \
    {                                                                                             \
        int32_t sum = 0;                                                                          \
        for (long i = 0; i < count; i++) {                                                        \
            int32_t nearest = (int32_t)rintf(x[i] * factor);                                      \
            to[i] = (TYPE)nearest;                                                                \
            sum += nearest;                                                                       \
        }                                                                                         \
        return sum;                                                                               \
    }

ROUND_TO(round_int8, int8_t)
ROUND_TO(round_int16, int16_t)

/* ---- page bounds -------------------------------------------------------------------------------- */

/* Finite values, rounded to the nearest, ties to even; float16 below 2^-14 to units of 2^-24. */
#define HELD(x, BITS)                                                                             \
    ((vec)(((uvec)(x) + ((1u << (BITS - 1)) - 1) + ((uvec)(x) >> BITS & 1)) >> BITS << BITS))

SIMD_TARGET LOSART_INLINE vec SIMD(as_float16)(vec x)
{
    ivec small = ((ivec)x & 0x7fffffff) < 0x38800000;
    return (vec)(((ivec)(x + 0.75f - 0.75f) & small) | ((ivec)HELD(x, 13) & ~small));
}

#define DECODE(ROUNDED)                                                                           \
    for (long d = 0; d < 2 * dim; d++) {                                                          \
        uint32_t halves[2] = {(uint32_t)codes[d], (uint32_t)(codes[d] >> 32)};                    \
        float first = base[d % dim], factor = step[d % dim];                                      \
        UNROLL for (int i = 0; i < PARTS; i++) {                                                  \
            uvec code;                                                                            \
            UNROLL for (int j = 0; j < SIMD_WIDTH; j++) code[j] = halves[(i * SIMD_WIDTH + j) / 8]; \
            vec x = first + __builtin_convertvector((ivec)(code >> shifts[i] & 15), vec) * factor; \
            ((vec *)(to + d * SLAB))[i] = ROUNDED;                                                \
        }                                                                                         \
    }

SIMD_TARGET static void SIMD(decode_bounds)(const uint64_t *codes, const float *base, const float *step, long dim,
                                            int width, float *to)
{
    uvec shifts[PARTS];
    for (int i = 0; i < PARTS; i++)
        for (int j = 0; j < SIMD_WIDTH; j++) shifts[i][j] = (i * SIMD_WIDTH + j) % 8 * 4;
    if (width == WIDTH_BFLOAT16) DECODE(HELD(x, 16))
    else if (width == WIDTH_FLOAT16) DECODE(SIMD(as_float16)(x))
    else DECODE(x)
}

#undef WIDEN_ROWS
#undef ROUND_TO
#undef ENCODE
#undef HELD
#undef DECODE
#undef vec
#undef ivec
#undef uvec
#undef hvec
#undef PARTS
#undef SCORES
#undef ACCUMULATE
#undef WIDE
#undef WIDENED
#undef WIDENED_HALF
#undef AHEAD
#undef WIDEN_SLAB
#undef PRODUCTS
#undef SLAB_PRODUCTS
#undef DOTS
#undef FEW_TOKENS
#undef ROW_PRODUCTS
#undef SIMD_WIDTH
#undef SIMD_ROWS
#undef SIMD_DOTS
#undef SIMD_TARGET
#undef SIMD
