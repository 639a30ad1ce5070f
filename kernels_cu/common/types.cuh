/* Element types: WeightValue of matrices, KVValue of the cache, Activation of what enters a matmul, KVOperand in which
 * keys and values are multiplied on tensor cores and page bounds held. LOSART_WEIGHTS, LOSART_KV, LOSART_ACTIVATIONS
 * and LOSART_KV_OPERANDS are format codes (losart/config/precision.py). Arithmetic is float32.
 *
 * Nothing is included: conversions are inline PTX, and compiling needs no CUDA headers. */
struct BFloat16 {
    unsigned short bits;
};
struct Float16 {
    unsigned short bits;
};
struct Code { /* which has a scale */
    unsigned char bits;
};

template <int FORMAT> struct TypeOf;
template <> struct TypeOf<FLOAT32> {
    using type = float;
};
template <> struct TypeOf<BFLOAT16> {
    using type = BFloat16;
};
template <> struct TypeOf<FLOAT16> {
    using type = Float16;
};
template <> struct TypeOf<KV_INT8> {
    using type = Code;
};
template <> struct TypeOf<KV_FP8> {
    using type = Code;
};

using WeightValue = TypeOf<LOSART_WEIGHTS>::type;
using KVValue = TypeOf<LOSART_KV>::type;
using Activation = TypeOf<LOSART_ACTIVATIONS>::type;
using KVOperand = TypeOf<LOSART_KV_OPERANDS>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(BFloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ __forceinline__ float widen(Float16 x)
{
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(x.bits));
    return value;
}

template <class T> __device__ __forceinline__ T narrow(float x);
template <> __device__ __forceinline__ float narrow<float>(float x) { return x; }
template <> __device__ __forceinline__ BFloat16 narrow<BFloat16>(float x)
{
    BFloat16 value;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(value.bits) : "f"(x));
    return value;
}
template <> __device__ __forceinline__ Float16 narrow<Float16>(float x)
{
    Float16 value;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(value.bits) : "f"(x));
    return value;
}
