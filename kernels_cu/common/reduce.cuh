/* Reductions over lanes, warps and thread blocks; every participant gets the result. */

/* Over groups of LANES neighbouring lanes. */
template <int LANES = WARP, class T> __device__ __forceinline__ T warp_sum(T x)
{
    for (int lane = LANES / 2; lane; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
    return x;
}

__device__ __forceinline__ float warp_max(float x)
{
    for (int lane = WARP / 2; lane; lane /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, lane));
    return x;
}

/* Over the four lanes that hold one row of a tensor-core fragment. */
template <class T> __device__ __forceinline__ T quad_sum(T x)
{
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

template <class T> __device__ __forceinline__ T quad_max(T x)
{
    x = max(x, __shfl_xor_sync(~0u, x, 1));
    return max(x, __shfl_xor_sync(~0u, x, 2));
}

/* `shared` holds one value per warp, and may be in use until all threads get here. */
template <class T> __device__ __forceinline__ T block_sum(T x, T *shared, unsigned warps)
{
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
    __syncthreads();
    x = 0;
    for (unsigned warp = 0; warp < warps; warp++) x += shared[warp];
    return x;
}

/* The same of the largest one. */
__device__ __forceinline__ float block_max(float x, float *shared, unsigned warps)
{
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
    __syncthreads();
    for (unsigned warp = 0; warp < warps; warp++) x = fmaxf(x, shared[warp]);
    return x;
}

/* The same where `shared` is used only once; each warp accumulates the warps' sums as a tree. */
template <class T> __device__ __forceinline__ T block_sum_tree(T x, T *shared, int warps)
{
    x = warp_sum(x);
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = x;
    __syncthreads();
    return warp_sum((int)threadIdx.x % WARP < warps ? shared[threadIdx.x % WARP] : T(0));
}
