/* Constants, ordering keys of floats, and arithmetic on four floats at a time. */
#define INFINITE __int_as_float(0x7f800000)
#define NOT_A_NUMBER __int_as_float(0x7fc00000)
#define LN_2 0.69314718f
#define LOG2_E 1.44269504f

/* Orders as the floats do; -0 equals 0. */
__device__ __forceinline__ unsigned ascending_key(float x)
{
    unsigned bits = __float_as_uint(x + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

/* The float of an ascending key. */
__device__ __forceinline__ float float_of_key(unsigned key)
{
    return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

/* 1 / rms from a mean of squares; NaN where it overflowed, since zeros would hide it. */
__device__ __forceinline__ float inverse_rms(float mean_square, float eps)
{
    return mean_square < INFINITE ? rsqrtf(mean_square + eps) : NOT_A_NUMBER;
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

__device__ __forceinline__ float4 zero4() { return make_float4(0, 0, 0, 0); }

__device__ __forceinline__ float4 scaled(float4 x, float factor)
{
    return make_float4(x.x * factor, x.y * factor, x.z * factor, x.w * factor);
}

__device__ __forceinline__ float4 times(float4 a, float4 b)
{
    return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w);
}

__device__ __forceinline__ void accumulate(float &sum, float x) { sum += x; }

__device__ __forceinline__ void accumulate(float4 &sum, float4 x)
{
    sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
}

__device__ __forceinline__ void accumulate(float4 &sum, float4 x, float weight)
{
    sum.x += x.x * weight, sum.y += x.y * weight, sum.z += x.z * weight, sum.w += x.w * weight;
}

/* Which product is rounded before it is added must be said: the compiler would choose it anew in each kernel. */
__device__ __forceinline__ float dot(float4 a, float4 b)
{
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.x, b.x, a.y * b.y)));
}

template <class T> __device__ __forceinline__ void store4(T *to, float4 x)
{
    to[0] = narrow<T>(x.x);
    to[1] = narrow<T>(x.y);
    to[2] = narrow<T>(x.z);
    to[3] = narrow<T>(x.w);
}
