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

    /* Four neighbouring rows from each of `firsts` on, multiples of 4, all of whose loads are under way together. */
    template <int N> __device__ __forceinline__ void at4(int token, const int (&firsts)[N], float4 (&sums)[N]) const
    {
        float4 none = make_float4(0, 0, 0, 0);
        const float *from = values + (size_t)token * rows;
        int counts[N], most = 0;
#pragma unroll
        for (int n = 0; n < N; n++) {
            sums[n] = bias ? *(const float4 *)(bias + firsts[n]) : none;
            counts[n] = planes(firsts[n] / PANEL);
            most = max(most, counts[n]);
        }
        for (int first = 0; first < most; first += BATCH / N) {
            float4 plane[BATCH / N][N];
#pragma unroll
            for (int i = 0; i < BATCH / N; i++)
#pragma unroll
                for (int n = 0; n < N; n++)
                    plane[i][n] = first + i < counts[n]
                                      ? *(const float4 *)(from + (size_t)(first + i) * tokens * rows + firsts[n])
                                      : none;
#pragma unroll
            for (int i = 0; i < BATCH / N; i++)
#pragma unroll
                for (int n = 0; n < N; n++) {
                    sums[n].x += plane[i][n].x, sums[n].y += plane[i][n].y;
                    sums[n].z += plane[i][n].z, sums[n].w += plane[i][n].w;
                }
        }
    }

    __device__ __forceinline__ float4 at4(int token, int row) const
    {
        float4 sums[1];
        at4(token, {row}, sums);
        return sums[0];
    }
};

/* A kernel's parameters that make up a Product, and the product made of them. */
#define PRODUCT_PARAMETERS                                                                                \
    const float *product_values, const float *product_bias, int product_tokens, int product_rows, int product_steps, \
        int product_share
#define PRODUCT \
    Product { product_values, product_bias, product_tokens, product_rows, product_steps, product_share }
