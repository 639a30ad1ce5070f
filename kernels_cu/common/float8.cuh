/* E4M3 numbers: 3 bits after the first, or after 2^-6 where that is larger; no infinities. */
#define LARGEST_FLOAT8 448.0f

/* The bits of the nearest one, ties to even. */
__device__ __forceinline__ int nearest_float8(float x)
{
    float magnitude = fminf(fabsf(x), LARGEST_FLOAT8);
    int exponent = max((int)(__float_as_uint(magnitude) >> 23) - 127, -6);
    int eighths = rintf(magnitude * exp2f(3 - exponent));
    return ((exponent + 6) << 3) + eighths | (__float_as_uint(x) >> 31) << 7;
}

/* The number of these bits: shifted, they are the number with another exponent bias, also if it is subnormal. */
__device__ __forceinline__ float float8_value(unsigned bits)
{
    return __uint_as_float((bits & 0x7f) << 20 | bits >> 7 << 31) * 0x1p120f;
}
