/* panel_product (integer_dots.h) for 64-bit Arm with the dot products of ARMv8.2. */
#include <arm_neon.h>
#include <sys/auxv.h>

#ifndef HWCAP_ASIMDDP
#define HWCAP_ASIMDDP (1 << 20)
#endif
#define NEON_TOKENS 4
#define NEON_TARGET __attribute__((target("arch=armv8.2-a+dotprod")))

NEON_TARGET LOSART_INLINE float32x4_t scaled_neon(int32x4_t sum, float x_scale, float x_sum, const float *scale,
                                                  const float *zero, float32x4_t others)
{
    float32x4_t value = vmulq_n_f32(vcvtq_f32_s32(sum), x_scale);
    value = vfmsq_n_f32(value, vld1q_f32(zero), x_sum);
    return vfmaq_f32(others, vld1q_f32(scale), value);
}

/* All blocks of some tokens, and half of the rows: registers hold the sums. */
#define NIBBLE_TILE(TOKENS)                                                                                       \
    {                                                                                                             \
        float32x4_t total[TOKENS][2];                                                                             \
        UNROLL for (int t = 0; t < TOKENS; t++) total[t][0] = total[t][1] = vdupq_n_f32(0);                       \
        for (long b = 0; b < w.blocks; b++) {                                                                     \
            long at = b * x.tokens + first;                                                                       \
            const int8_t *values = (const int8_t *)x.values + at * columns;                                       \
            int32x4_t sum[TOKENS][2];                                                                             \
            UNROLL for (int t = 0; t < TOKENS; t++) sum[t][0] = sum[t][1] = vdupq_n_s32(0);                       \
            for (long d = 0; d < columns; d += 8) {                                                               \
                const uint8_t *from = w.codes + PANEL / 2 * (b * columns + d) + 4 * row;                          \
                int8x16_t low[2], high[2];                                                                        \
                __builtin_prefetch(from + AHEAD);                                                                 \
                UNROLL for (int p = 0; p < 2; p++) {                                                              \
                    uint8x16_t both = vld1q_u8(from + 16 * p);                                                    \
                    low[p] = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));                                 \
                    high[p] = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));                                           \
                }                                                                                                 \
                UNROLL for (int t = 0; t < TOKENS; t++) {                                                         \
                    int8x8_t eight = vld1_s8(values + t * columns + d);                                           \
                    UNROLL for (int p = 0; p < 2; p++) {                                                          \
                        sum[t][p] = vdotq_lane_s32(sum[t][p], low[p], eight, 0);                                  \
                        sum[t][p] = vdotq_lane_s32(sum[t][p], high[p], eight, 1);                                 \
                    }                                                                                             \
                }                                                                                                 \
            }                                                                                                     \
            const float *scale = w.scales + b / w.group_blocks * PANEL + row;                                     \
            const float *zero = w.zeros + b / w.group_blocks * w.zero_step + row;                                 \
            UNROLL for (int t = 0; t < TOKENS; t++)                                                               \
                UNROLL for (int p = 0; p < 2; p++) total[t][p] = scaled_neon(                                     \
                    sum[t][p], x.scales[at + t], x.sums[at + t], scale + 4 * p, zero + 4 * p, total[t][p]);       \
        }                                                                                                         \
        UNROLL for (int t = 0; t < TOKENS; t++)                                                                   \
            UNROLL for (int p = 0; p < 2; p++) vst1q_f32(y + (first + t) * PANEL + row + 4 * p, total[t][p]);     \
    }

NEON_TARGET static void nibble_panel_neon(Panel w, Activations x, float *y)
{
    const long columns = w.columns;
    for (long first = 0; first < x.tokens; first += NEON_TOKENS)
        for (long row = 0; row < PANEL; row += 8) switch (x.tokens - first) {
            default: NIBBLE_TILE(NEON_TOKENS) break;
            case 3: NIBBLE_TILE(3) break;
            case 2: NIBBLE_TILE(2) break;
            case 1: NIBBLE_TILE(1) break;
            }
}

/* A block of one token, added to y: lanes have the even or the odd columns of a row, four sums of two rows each. */
NEON_TARGET LOSART_INLINE void add_pairs_neon(const int8_t *codes, const int16_t *values, long columns, float x_scale,
                                              float x_sum, const float *scale, const float *zero, float *y)
{
    int32x4_t sum[8];
    UNROLL for (int i = 0; i < 8; i++) sum[i] = vdupq_n_s32(0);
    for (long d = 0; d < columns; d += 2) {
        int32_t pair;
        memcpy(&pair, values + d, 4);
        int16x4_t all = vreinterpret_s16_s32(vdup_n_s32(pair));
        UNROLL for (int i = 0; i < 4; i++) {
            int16x8_t wide = vmovl_s8(vld1_s8(codes + PANEL * d + 8 * i));
            sum[2 * i] = vmlal_s16(sum[2 * i], vget_low_s16(wide), all);
            sum[2 * i + 1] = vmlal_s16(sum[2 * i + 1], vget_high_s16(wide), all);
        }
    }
    UNROLL for (int p = 0; p < 4; p++) {
        int32x4_t rows = vpaddq_s32(sum[2 * p], sum[2 * p + 1]);
        vst1q_f32(y + 4 * p, scaled_neon(rows, x_scale, x_sum, scale + 4 * p, zero + 4 * p, vld1q_f32(y + 4 * p)));
    }
}

NEON_TARGET static void panel_product_neon(Panel w, Activations x, float *y)
{
    if (w.bits == 4) {
        nibble_panel_neon(w, x, y);
        return;
    }
    memset(y, 0, sizeof(float) * x.tokens * PANEL);
    for (long b = 0; b < w.blocks; b++) {
        const float *scale = w.scales + b / w.group_blocks * PANEL;
        const float *zero = w.zeros + b / w.group_blocks * w.zero_step;
        const int8_t *codes = (const int8_t *)w.codes + b * w.columns * PANEL;
        for (long i = 0; i < w.columns * PANEL; i += 64) __builtin_prefetch(codes + i + AHEAD);
        for (long t = 0; t < x.tokens; t++) {
            long at = b * x.tokens + t;
            add_pairs_neon(codes, (const int16_t *)x.values + at * w.columns, w.columns, x.scales[at], x.sums[at], scale,
                           zero, y + t * PANEL);
        }
    }
}

static int has_dot_products(void) { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }

#undef NIBBLE_TILE
