/* The loops of integer_dots.h for one kind of vector. Included once for each, with
 *
 *   DOT_LANES, DOT_INT, DOT_FLOAT   32-bit lanes of a vector, and its types
 *   DOT_OP(name), DOT_LOAD, DOT_HALF, DOT_STORE, DOT_AND, DOT_ZERO   intrinsics; DOT_HALF loads half a vector
 *   DOT_TOKENS     tokens whose sums the registers hold
 *   DOT_VNNI(name)   its intrinsics, where there is VNNI
 *   DOT_TARGET, DOT(name)   as SIMD_TARGET and SIMD (simd_body.h)
 */
#define DOT_PARTS (PANEL / DOT_LANES)

/* Adds products of pairs of 16 bits to lanes of 32 bits, and of unsigned and signed bytes: without VNNI to lanes of 16
 * bits, which DOT_WIDE adds up in pairs. */
#ifdef DOT_VNNI
#define DOT_PAIRS(sum, x, y) DOT_VNNI(dpwssd)(sum, x, y)
#define DOT_BYTES(sum, x, y) DOT_VNNI(dpbusd)(sum, x, y)
#define DOT_WIDE(sum) (sum)
#else
#define DOT_PAIRS(sum, x, y) DOT_OP(add_epi32)(sum, DOT_OP(madd_epi16)(x, y))
#define DOT_BYTES(sum, x, y) DOT_OP(add_epi16)(sum, DOT_OP(maddubs_epi16)(x, y))
#define DOT_WIDE(sum) DOT_OP(madd_epi16)(sum, DOT_OP(set1_epi16)(1))
#endif

DOT_TARGET static void DOT(widen_block)(const int8_t *codes, long columns, int16_t *w)
{
    /* Whole vectors are stored, as PAIR_TILE will load them. */
    const long step = 2 * DOT_LANES;
    for (long i = 0; i < columns * PANEL; i += step) {
        DOT_STORE(w + i, DOT_OP(cvtepi8_epi16)(DOT_HALF(codes + i)));
        __builtin_prefetch(codes + i + AHEAD);
    }
}

DOT_TARGET LOSART_INLINE DOT_INT DOT(everywhere)(const void *lane)
{
    int32_t bits;
    memcpy(&bits, lane, 4);
    return DOT_OP(set1_epi32)(bits);
}

/* scale * (x_scale * sum - zero * x_sum), of DOT_LANES rows. */
DOT_TARGET LOSART_INLINE DOT_FLOAT DOT(scaled)(DOT_INT sum, float x_scale, float x_sum, const float *scale,
                                               const float *zero, DOT_FLOAT others)
{
    DOT_FLOAT value = DOT_OP(mul_ps)(DOT_OP(cvtepi32_ps)(sum), DOT_OP(set1_ps)(x_scale));
    value = DOT_OP(fnmadd_ps)(DOT_OP(loadu_ps)(zero), DOT_OP(set1_ps)(x_sum), value);
    return DOT_OP(fmadd_ps)(DOT_OP(loadu_ps)(scale), value, others);
}

/* A block of some tokens, added to y. */
#define PAIR_TILE(TOKENS)                                                                                         \
    {                                                                                                             \
        DOT_INT sum[TOKENS][DOT_PARTS];                                                                           \
        UNROLL for (int t = 0; t < TOKENS; t++)                                                                   \
            UNROLL for (int p = 0; p < DOT_PARTS; p++) sum[t][p] = DOT_ZERO;                                      \
        for (long d = 0; d < columns; d += 2) {                                                                   \
            DOT_INT pairs[DOT_PARTS];                                                                             \
            UNROLL for (int p = 0; p < DOT_PARTS; p++) pairs[p] = DOT_LOAD(wide + PANEL * d + 2 * DOT_LANES * p); \
            UNROLL for (int t = 0; t < TOKENS; t++) {                                                             \
                DOT_INT all = DOT(everywhere)(values + t * columns + d);                                          \
                UNROLL for (int p = 0; p < DOT_PARTS; p++) sum[t][p] = DOT_PAIRS(sum[t][p], pairs[p], all);       \
            }                                                                                                     \
        }                                                                                                         \
        UNROLL for (int t = 0; t < TOKENS; t++)                                                                   \
            UNROLL for (int p = 0; p < DOT_PARTS; p++) {                                                          \
                long row = DOT_LANES * p;                                                                         \
                float *to = y + (first + t) * PANEL + row;                                                        \
                DOT_OP(storeu_ps)(to, DOT(scaled)(sum[t][p], x.scales[at + t], x.sums[at + t], scale + row,       \
                                                  zero + row, DOT_OP(loadu_ps)(to)));                             \
            }                                                                                                     \
    }

/* All blocks of some tokens and DOT_LANES rows. */
#define NIBBLE_TILE(TOKENS)                                                                                       \
    {                                                                                                             \
        DOT_FLOAT total[TOKENS];                                                                                  \
        UNROLL for (int t = 0; t < TOKENS; t++) total[t] = DOT_OP(setzero_ps)();                                  \
        for (long b = 0; b < w.blocks; b++) {                                                                     \
            long at = b * x.tokens + first;                                                                       \
            const int8_t *values = (const int8_t *)x.values + at * columns;                                       \
            DOT_INT sum[TOKENS];                                                                                  \
            UNROLL for (int t = 0; t < TOKENS; t++) sum[t] = DOT_ZERO;                                            \
            for (long d = 0; d < columns; d += 8) {                                                               \
                const uint8_t *from = w.codes + PANEL / 2 * (b * columns + d) + 4 * row;                          \
                DOT_INT both = DOT_LOAD(from);                                                                    \
                __builtin_prefetch(from + AHEAD);                                                                 \
                DOT_INT low = DOT_AND(both, DOT_OP(set1_epi8)(15));                                               \
                DOT_INT high = DOT_AND(DOT_OP(srli_epi16)(both, 4), DOT_OP(set1_epi8)(15));                       \
                UNROLL for (int t = 0; t < TOKENS; t++) {                                                         \
                    sum[t] = DOT_BYTES(sum[t], low, DOT(everywhere)(values + t * columns + d));                   \
                    sum[t] = DOT_BYTES(sum[t], high, DOT(everywhere)(values + t * columns + d + 4));              \
                }                                                                                                 \
            }                                                                                                     \
            const float *scale = w.scales + b / w.group_blocks * PANEL + row;                                     \
            const float *zero = w.zeros + b / w.group_blocks * w.zero_step + row;                                 \
            UNROLL for (int t = 0; t < TOKENS; t++) total[t] =                                                    \
                DOT(scaled)(DOT_WIDE(sum[t]), x.scales[at + t], x.sums[at + t], scale, zero, total[t]);           \
        }                                                                                                         \
        UNROLL for (int t = 0; t < TOKENS; t++) DOT_OP(storeu_ps)(y + (first + t) * PANEL + row, total[t]);       \
    }

/* Tiles of DOT_TOKENS tokens, and one of the rest. */
#if DOT_TOKENS > 4
#define DOT_MORE(TILE)                                                                                            \
    case 7: TILE(7) break;                                                                                        \
    case 6: TILE(6) break;                                                                                        \
    case 5: TILE(5) break;                                                                                        \
    case 4: TILE(4) break;
#else
#define DOT_MORE(TILE)
#endif
#define DOT_TILE(TILE)                                                                                            \
    switch (x.tokens - first) {                                                                                   \
    default: TILE(DOT_TOKENS) break;                                                                              \
    DOT_MORE(TILE)                                                                                                \
    case 3: TILE(3) break;                                                                                        \
    case 2: TILE(2) break;                                                                                        \
    case 1: TILE(1) break;                                                                                        \
    }

DOT_TARGET static void DOT(pair_panel)(Panel w, Activations x, float *y)
{
    const long columns = w.columns;
    int16_t wide[BLOCK * PANEL] __attribute__((aligned(64))); /* vectors in two cache lines take longer */
    memset(y, 0, sizeof(float) * x.tokens * PANEL);
    for (long b = 0; b < w.blocks; b++) {
        const float *scale = w.scales + b / w.group_blocks * PANEL, *zero = w.zeros + b / w.group_blocks * w.zero_step;
        DOT(widen_block)((const int8_t *)w.codes + b * columns * PANEL, columns, wide);
        for (long first = 0; first < x.tokens; first += DOT_TOKENS) {
            long at = b * x.tokens + first;
            const int16_t *values = (const int16_t *)x.values + at * columns;
            DOT_TILE(PAIR_TILE)
        }
    }
}

DOT_TARGET static void DOT(panel_product)(Panel w, Activations x, float *y)
{
    const long columns = w.columns;
    if (w.bits == 8) {
        DOT(pair_panel)(w, x, y);
        return;
    }
    for (long first = 0; first < x.tokens; first += DOT_TOKENS)
        for (long row = 0; row < PANEL; row += DOT_LANES) DOT_TILE(NIBBLE_TILE)
}

#undef DOT_TILE
#undef DOT_PAIRS
#undef DOT_BYTES
#undef DOT_WIDE
#undef DOT_VNNI
#undef DOT_MORE
#undef PAIR_TILE
#undef NIBBLE_TILE
#undef DOT_PARTS
#undef DOT_TARGET
#undef DOT
