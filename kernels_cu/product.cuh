/* A matrix product [tokens, rows] as linear_tensor leaves it, for the kernel that reads it to add up.
 *
 * Weights are taken in units of PANEL rows and one step of their columns, `steps` to a panel; thread
 * block b took units b * share and on. The blocks of a panel wrote their sums to planes 0, 1, ... of
 * values [planes, tokens, rows]. A product that is whole has one step and share 1. */
#define PANEL 128
#define BATCH 8

struct Product {
    const float *values, *bias; /* bias [rows] or null */
    int tokens, rows, steps, share;

    __device__ __forceinline__ int planes(int panel) const
    {
        return ((panel + 1) * steps - 1) / share - panel * steps / share + 1;
    }

    /* Of a batch of planes all loads are under way at once: the kernels that read products are short, and
     * would otherwise wait for memory several times. */
    __device__ __forceinline__ float at(int token, int row) const
    {
        float sum = bias ? bias[row] : 0.0f;
        const float *from = values + (size_t)token * rows + row;
        int count = planes(row / PANEL);
        for (int first = 0; first < count; first += BATCH) {
            float plane[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; i++)
                plane[i] = first + i < count ? from[(size_t)(first + i) * tokens * rows] : 0.0f;
#pragma unroll
            for (int i = 0; i < BATCH; i++) sum += plane[i];
        }
        return sum;
    }

    /* Four neighbouring rows; of a multiple of 4. */
    __device__ __forceinline__ float4 at4(int token, int row) const
    {
        float4 sum = bias ? *(const float4 *)(bias + row) : make_float4(0, 0, 0, 0);
        const float *from = values + (size_t)token * rows + row;
        int count = planes(row / PANEL);
        for (int first = 0; first < count; first += BATCH) {
            float4 plane[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; i++)
                plane[i] = first + i < count ? *(const float4 *)(from + (size_t)(first + i) * tokens * rows)
                                             : make_float4(0, 0, 0, 0);
#pragma unroll
            for (int i = 0; i < BATCH; i++)
                sum.x += plane[i].x, sum.y += plane[i].y, sum.z += plane[i].z, sum.w += plane[i].w;
        }
        return sum;
    }

    /* at4 of two places, whose loads are under way together. */
    __device__ __forceinline__ void at4_both(int token, int row, int other_row, float4 &sum, float4 &other_sum) const
    {
        float4 none = make_float4(0, 0, 0, 0);
        sum = bias ? *(const float4 *)(bias + row) : none;
        other_sum = bias ? *(const float4 *)(bias + other_row) : none;
        const float *from = values + (size_t)token * rows;
        int count = planes(row / PANEL), other_count = planes(other_row / PANEL);
        for (int first = 0; first < max(count, other_count); first += BATCH / 2) {
            float4 plane[BATCH / 2], other[BATCH / 2];
#pragma unroll
            for (int i = 0; i < BATCH / 2; i++) {
                const float *there = from + (size_t)(first + i) * tokens * rows;
                plane[i] = first + i < count ? *(const float4 *)(there + row) : none;
                other[i] = first + i < other_count ? *(const float4 *)(there + other_row) : none;
            }
#pragma unroll
            for (int i = 0; i < BATCH / 2; i++) {
                sum.x += plane[i].x, sum.y += plane[i].y, sum.z += plane[i].z, sum.w += plane[i].w;
                other_sum.x += other[i].x, other_sum.y += other[i].y;
                other_sum.z += other[i].z, other_sum.w += other[i].w;
            }
        }
    }
};

/* A kernel's parameters that make up a Product, and the product made of them. */
#define PRODUCT_PARAMETERS                                                                                \
    const float *product_values, const float *product_bias, int product_tokens, int product_rows, int product_steps, \
        int product_share
#define PRODUCT \
    Product { product_values, product_bias, product_tokens, product_rows, product_steps, product_share }
