/* The loops of integer_dots.h for one kind of vector. Included once for each, with
 *
 *   DOT_LANES, DOT_INT, DOT_FLOAT   32-bit lanes of a vector, and its types
 *   DOT_OP(name), DOT_LOAD, DOT_HALF, DOT_STORE, DOT_AND, DOT_ZERO   intrinsics; DOT_HALF loads half a vector
 *   DOT_TOKENS     tokens whose sums the registers hold
 *   DOT_TARGET, DOT(name)   as SIMD_TARGET and SIMD (simd_body.h)
 */
#define DOT_PARTS (PANEL / DOT_LANES)

DOT_TARGET static void DOT(unpack_block)(const uint8_t *codes, long columns, int bits, int16_t *w)
{
    /* Whole vectors are stored, as add_block will load them. */
    const long step = 2 * DOT_LANES;
    if (bits == 8) {
        for (long i = 0; i < columns * PANEL; i += step) {
            DOT_STORE(w + i, DOT_OP(cvtepi8_epi16)(DOT_HALF(codes + i)));
            __builtin_prefetch(codes + i + AHEAD);
        }
        return;
    }
    for (long i = 0; i < columns / 4; i++, codes += 2 * PANEL, w += 4 * PANEL)
        UNROLL for (long j = 0; j < 2 * PANEL; j += step) {
            DOT_INT both = DOT_OP(cvtepu8_epi16)(DOT_HALF(codes + j));
            DOT_STORE(w + j, DOT_AND(both, DOT_OP(set1_epi16)(15)));
            DOT_STORE(w + 2 * PANEL + j, DOT_OP(srli_epi16)(both, 4));
            __builtin_prefetch(codes + j + AHEAD);
        }
}

#define DOT_TILE(TOKENS)                                                                                          \
    {                                                                                                             \
        DOT_INT sum[TOKENS][DOT_PARTS];                                                                           \
        UNROLL for (int t = 0; t < TOKENS; t++)                                                                   \
            UNROLL for (int p = 0; p < DOT_PARTS; p++) sum[t][p] = DOT_ZERO;                                      \
        for (long d = 0; d < columns; d += 2) {                                                                   \
            DOT_INT pairs[DOT_PARTS];                                                                             \
            UNROLL for (int p = 0; p < DOT_PARTS; p++) pairs[p] = DOT_LOAD(w + PANEL * d + 2 * DOT_LANES * p);    \
            UNROLL for (int t = 0; t < TOKENS; t++) {                                                             \
                int32_t pair;                                                                                     \
                memcpy(&pair, x + t * columns + d, 4);                                                            \
                DOT_INT all = DOT_OP(set1_epi32)(pair);                                                           \
                UNROLL for (int p = 0; p < DOT_PARTS; p++) sum[t][p] =                                            \
                    DOT_OP(add_epi32)(sum[t][p], DOT_OP(madd_epi16)(pairs[p], all));                              \
            }                                                                                                     \
        }                                                                                                         \
        UNROLL for (int t = 0; t < TOKENS; t++)                                                                   \
            UNROLL for (int p = 0; p < DOT_PARTS; p++) {                                                          \
                float *to = sums + t * PANEL + DOT_LANES * p;                                                     \
                DOT_FLOAT value = DOT_OP(mul_ps)(DOT_OP(cvtepi32_ps)(sum[t][p]), DOT_OP(set1_ps)(x_scale[t]));    \
                DOT_FLOAT zeros = DOT_OP(loadu_ps)(zero + DOT_LANES * p);                                         \
                value = DOT_OP(fnmadd_ps)(zeros, DOT_OP(set1_ps)(x_sum[t]), value);                               \
                DOT_FLOAT scales = DOT_OP(loadu_ps)(scale + DOT_LANES * p);                                       \
                DOT_OP(storeu_ps)(to, DOT_OP(fmadd_ps)(scales, value, DOT_OP(loadu_ps)(to)));                     \
            }                                                                                                     \
    }

DOT_TARGET static void DOT(add_block)(const int16_t *w, long columns, const float *scale, const float *zero,
                                      const int16_t *x, const float *x_scale, const float *x_sum, long tokens,
                                      float *sums)
{
    for (; tokens >= DOT_TOKENS; tokens -= DOT_TOKENS, x += DOT_TOKENS * columns, x_scale += DOT_TOKENS,
                                 x_sum += DOT_TOKENS, sums += DOT_TOKENS * PANEL)
        DOT_TILE(DOT_TOKENS)
    switch (tokens) {
#if DOT_TOKENS > 4
    case 7: DOT_TILE(7) break;
    case 6: DOT_TILE(6) break;
    case 5: DOT_TILE(5) break;
    case 4: DOT_TILE(4) break;
#endif
    case 3: DOT_TILE(3) break;
    case 2: DOT_TILE(2) break;
    case 1: DOT_TILE(1) break;
    }
}

#undef DOT_PARTS
#undef DOT_TILE
#undef DOT_LANES
#undef DOT_TOKENS
#undef DOT_TARGET
#undef DOT
#undef DOT_INT
#undef DOT_FLOAT
#undef DOT_OP
#undef DOT_LOAD
#undef DOT_HALF
#undef DOT_STORE
#undef DOT_AND
#undef DOT_ZERO
