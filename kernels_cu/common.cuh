/* Shared by all kernels. LOSART_DTYPE names the type in which weights, keys and values are held and
 * in which activations enter products: 0 float32, 1 bfloat16, 2 float16. Arithmetic is float32.
 * Nothing is included: conversions are instructions, and compiling needs no CUDA headers. */
#if LOSART_DTYPE == 1
struct Held { unsigned short bits; };
__device__ __forceinline__ float widen(Held x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ __forceinline__ Held narrow(float x)
{
    Held held;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(held.bits) : "f"(x));
    return held;
}
#elif LOSART_DTYPE == 2
struct Held { unsigned short bits; };
__device__ __forceinline__ float widen(Held x)
{
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
    return value;
}
__device__ __forceinline__ Held narrow(float x)
{
    Held held;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(held.bits) : "f"(x));
    return held;
}
#else
typedef float Held;
__device__ __forceinline__ Held narrow(float x) { return x; }
#endif
__device__ __forceinline__ float widen(float x) { return x; }

/* A kernel starts while the one before it still runs (programmatic dependent launch), and every one calls
 * wait_for_previous before it ends. Before the wait it must write no memory, and may read weights, the
 * cached prefix, and what earlier passes kept. Products, and all that can stand between split_heads and
 * block_attention, let the next one start only when they have waited themselves, so that the kernel after them may
 * also read, before its wait, what was written before them. The others (embedding, add_rms_norm, split_heads,
 * block_attention, cache_write, silu_gate, sampling) let it start at once. */
__device__ __forceinline__ void wait_for_previous()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* The next kernel may start when all blocks of this one have said so or ended. */
__device__ __forceinline__ void let_next_start()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#define WARP 32
#define INFINITE __int_as_float(0x7f800000)
#define NOT_A_NUMBER __int_as_float(0x7fc00000)

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

/* 1 / rms from a mean of squares; NaN where it overflowed, for zeros would hide it. */
__device__ __forceinline__ float inverse_rms(float mean_square, float eps)
{
    return mean_square < INFINITE ? rsqrtf(mean_square + eps) : NOT_A_NUMBER;
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
