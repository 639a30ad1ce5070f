/* Shared by all kernels. LOSART_DTYPE names the type in which weights, keys and values are held:
 * 0 float32, 1 bfloat16, 2 float16. Arithmetic and activations are float32. */
#if LOSART_DTYPE == 1
#include <cuda_bf16.h>
typedef __nv_bfloat16 Held;
__device__ __forceinline__ float widen(Held x) { return __bfloat162float(x); }
__device__ __forceinline__ Held narrow(float x) { return __float2bfloat16_rn(x); }
#elif LOSART_DTYPE == 2
#include <cuda_fp16.h>
typedef __half Held;
__device__ __forceinline__ float widen(Held x) { return __half2float(x); }
__device__ __forceinline__ Held narrow(float x) { return __float2half_rn(x); }
#else
typedef float Held;
__device__ __forceinline__ float widen(Held x) { return x; }
__device__ __forceinline__ Held narrow(float x) { return x; }
#endif

#if LOSART_DTYPE
__device__ __forceinline__ float widen(float x) { return x; }
#endif

#define WARP 32
#define INFINITE __int_as_float(0x7f800000)

__device__ __forceinline__ float warp_sum(float x)
{
    for (int lane = WARP / 2; lane; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
    return x;
}

__device__ __forceinline__ float warp_max(float x)
{
    for (int lane = WARP / 2; lane; lane /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, lane));
    return x;
}

/* Sum over a block of whole warps; `shared` holds a float for each warp. All threads get it. */
__device__ __forceinline__ float block_sum(float x, float *shared)
{
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
    __syncthreads();
    x = 0;
    for (int warp = 0; warp < blockDim.x / WARP; warp++) x += shared[warp];
    return x;
}

/* Where a cache's pages lie: the address of each chunk [layers, 2 (keys, values), kv_heads,
 * chunk_positions, head_dim], and how many positions are committed. Read from device memory, so
 * that a captured pass sees the cache as it is when it runs. */
struct CacheView {
    const unsigned long long *chunks;
    const int *length;
    int layer, kv_heads, chunk_positions, head_dim;

    __device__ __forceinline__ Held *row(int value, int head, int position) const
    {
        size_t rows = ((size_t)(layer * 2 + value) * kv_heads + head) * chunk_positions + position % chunk_positions;
        return (Held *)chunks[position / chunk_positions] + rows * head_dim;
    }
};

/* A kernel's parameters that make up a CacheView, and the view made of them. */
#define CACHE_PARAMETERS                                                                          \
    const unsigned long long *cache_chunks, const int *cache_length, int cache_layer, int cache_kv_heads, \
        int cache_chunk_positions, int cache_head_dim
#define CACHE_VIEW \
    CacheView { cache_chunks, cache_length, cache_layer, cache_kv_heads, cache_chunk_positions, cache_head_dim }
